"""On MariaDB they are claimed in three round trips, and begin in three.

MySQL can't tell what an INSERT has inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    LargeBinary,
    bindparam,
    cast,
    func,
    insert,
    not_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import Now, quick
from nih_sched.dialects.base import is_any_kept
from nih_sched.model import OPEN_KEY_LENGTH, Claim, StartedRow, State, decode_key
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.pauses import unpaused
from nih_sched.store.records import LeaseLost, Records
from nih_sched.store.swift.parts import Taken, given, new_record


class _NotAsEver(Exception):
    """More care is needed; nothing was claimed."""


def claim(desk: Desk, count: int, rq_ids: Callable[[int], Sequence[str]], producer: str, tries: int) -> Taken:
    """As of the package."""
    opening = desk.once("swift claim", lambda: _make_opening(desk))
    taking = desk.once("swift taking", lambda: _make_taking(desk))

    def take(connection: Connection) -> list[Claim]:
        (rq_id,) = rq_ids(1)  # and each row's key, for those of one claim
        own = {"its_rq_id": f"{rq_id}-", "ready_limit": count}
        opened = quick.run(connection, opening, given(desk, producer, tries) | own).rows
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
        "open_key": func.left(hashed, OPEN_KEY_LENGTH),  # as model.open_keys_of() makes them
        "rq_id": func.concat(bindparam("its_rq_id"), key),
        **new_record(desk),
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


def begin(desk: Desk, records: Records, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
    """As of the package."""
    fitting = desk.once(f"fitting with {columns}", lambda: _make_fitting(desk, records, columns))
    held = "held" if records.hold else "free"
    marking = desk.once(f"mark joined, {held}", lambda: _make_marking(desk, records))

    def begin(connection: Connection) -> Sequence[Any]:
        found = quick.run(connection, fitting, records.given(claim_ids, known=True)).rows
        if found:
            keys = desk.given_keys([decode_key(row[1]) for row in found])
            its = records.given([row[0] for row in found], leased=True) | keys
            # All of them are locked by now, so that there is one reason alone to leave them as they are.
            if not quick.run(connection, marking, its).touched:
                raise LeaseLost
        return found

    return records.begun(desk.transact(begin, patience=PATIENCE), columns)


def _make_fitting(desk: Desk, records: Records, columns: Sequence[str]) -> Any:
    rows = desk.rows
    queued = desk.dialect.is_word(rows.status, rows.words[State.QUEUED])
    fit = select(*records.head, *rows.labelled(columns))
    fit = fit.select_from(desk.ledger.attempts.join(rows.table, _is_its_row(desk)))
    fit = fit.where(records.these, records.may_start_as_known, queued)
    # Whatever it believes of a small table: what it reads, it locks.
    fit = fit.prefix_with("STRAIGHT_JOIN").with_hint(rows.table, "FORCE INDEX (PRIMARY)")
    return desk.dialect.lock(fit, rows.table, skip_locked=True)


def _make_marking(desk: Desk, records: Records) -> Any:
    mark = records.make_mark(records.these, desk.given_rows, _is_its_row(desk))
    mark = mark.values({desk.rows.status: desk.rows.words[State.STARTED]})
    if records.hold is None:
        return mark
    return mark.where(records.holds_lease).values(records.renewed)  # each row of a table is written once


def _is_its_row(desk: Desk) -> ColumnElement[bool]:
    (key,) = desk.rows.keys
    row_key = desk.ledger.attempts.c.row_key
    return key == cast(func.substr(row_key, 2, func.char_length(row_key) - 2), BigInteger())
