"""On MariaDB: rows that come by ones and twos are claimed, and begin, in three round trips, as store.swift does in one.

MySQL can't tell what an INSERT has inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, LargeBinary, bindparam, func, insert, literal, not_, select, update

from nih_sched.dialects import Now, quick
from nih_sched.dialects.base import is_any_kept
from nih_sched.model import OPEN_KEY_LENGTH, Claim, State, decode_key
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.pauses import unpaused
from nih_sched.store.swift import Taken


class _NotAsEver(Exception):
    """More care is needed; nothing was claimed."""


def claim(desk: Desk, count: int, rq_ids: Callable[[int], Sequence[str]], producer: str, tries: int) -> Taken:
    """Claim up to so many ready rows, each to travel alone, as Claims does it."""
    opening = desk.once("swift claim", lambda: _make_opening(desk))
    taking = desk.once("swift taking", lambda: _make_taking(desk))
    given = {"its_table": f"{desk.rows.name}\0".encode(), "its_producer": producer, "its_tries": tries}

    def take(connection: Connection) -> list[Claim]:
        (rq_id,) = rq_ids(1)  # and each row's key, for those of one claim
        opened = quick.run(connection, opening, given | {"its_rq_id": f"{rq_id}-", "ready_limit": count}).rows
        claims = [Claim(its_id, decode_key(row_key), its, 1, 0, tries) for its_id, row_key, its in opened]
        keys = [one.key for one in claims]
        if claims and quick.run(connection, taking, desk.given_keys(keys)).touched != len(claims):
            raise _NotAsEver
        return claims

    try:
        claims = desk.transact(take, patience=PATIENCE, lasting=False)
    except _NotAsEver:
        return Taken([], more=True)
    return Taken(claims, more=len(claims) == count)


def _make_opening(desk: Desk) -> Any:
    rows, attempts = desk.rows, desk.ledger.attempts
    (key,) = rows.keys
    row_key = func.concat("[", key, "]")
    hashed = func.sha2(func.concat(bindparam("its_table", type_=LargeBinary()), row_key), 256)
    own = {
        "row_key": row_key,
        "open_key": func.left(hashed, OPEN_KEY_LENGTH),  # as model.open_key_of() makes it
        "rq_id": func.concat(bindparam("its_rq_id"), key),
        "source": literal(desk.source.name),
        "attempt": literal(1),
        "failures": literal(0),
        "tries": bindparam("its_tries", type_=attempts.c.tries.type),
        "claimed_by": bindparam("its_producer", type_=attempts.c.claimed_by.type),
        "claimed_at": Now(),  # one instant for all of a statement
        "sent_at": Now(),
    }
    ready = select(*own.values()).where(desk.is_ready, unpaused(desk.ledger, desk.source.name))
    ready = desk.dialect.lock(ready.order_by(key).limit(bindparam("ready_limit")), rows.table, skip_locked=True)
    opened = insert(attempts).from_select(list(own), ready)
    return opened.returning(attempts.c.id, attempts.c.row_key, attempts.c.rq_id)


def _make_taking(desk: Desk) -> Any:
    rows = desk.rows
    unkept = not_(is_any_kept(desk.ledger.attempts))
    return update(rows.table).where(desk.given_rows, unkept).values({rows.status: rows.words[State.QUEUED]})
