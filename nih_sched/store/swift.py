"""On PostgreSQL: rows that come by ones and twos are claimed, and begin, by one statement that is its own transaction.

Each takes what is as it nearly always is, and touches nothing else: that is left for the careful way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Integer, LargeBinary, String, cast, exists, func, literal, not_, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import bindparam, literal_column

from nih_sched.dialects import Now, quick
from nih_sched.dialects.base import HARD, Opened, is_any_kept
from nih_sched.errors import KeysDontMatch
from nih_sched.model import OPEN_KEY_LENGTH, Claim, StartedRow, State
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.pauses import unpaused
from nih_sched.store.records import Records


class Taken(NamedTuple):
    """What was claimed, and whether the careful way has more to do."""

    claims: list[Claim]
    more: bool


def fits(desk: Desk) -> bool:
    """Whether all can be said in SQL: a row's key is its table's primary key, and one whole number."""
    (key, *others) = desk.rows.keys
    plain = not others and key.primary_key and isinstance(key.type, Integer)
    able = desk.dialect.writes_in_ctes or getattr(desk.engine.dialect, "is_mariadb", False)
    # A write that changes nothing would still fire the user's triggers.
    return able and plain and desk.rows.words[State.QUEUED] != desk.rows.words[State.STARTED]


def claim(desk: Desk, count: int, rq_ids: Callable[[int], Sequence[str]], producer: str, tries: int) -> Taken:
    """Claim up to so many ready rows, each to travel alone, as Claims does it.

    Raises:
        KeysDontMatch: the table lets no row of its be Queued, without a word.
    """
    statement = desk.once("swift claim", lambda: _make_claim(desk))

    def take(connection: Connection) -> Sequence[Any]:
        given = {
            "its_table": f"{desk.rows.name}\0".encode(),
            "its_rq_id": rq_ids(count),  # new ones each time: of a commit whose answer is lost nothing is known
            "its_producer": producer,
            "its_tries": tries,
            "ready_limit": count,
        }
        return quick.run(connection, statement, given).rows

    found = desk.insist(lambda: desk.read(take), patience=PATIENCE)
    claims = [Claim(claim_id, (key,), rq_id, 1, 0, tries) for *_, claim_id, key, rq_id in found if claim_id is not None]
    _, kept, seen, taken, *_ = found[0]
    if taken != len(claims):
        raise KeysDontMatch(table=desk.rows.name, columns=desk.rows.keys[0].name, wanted=len(claims), taken=taken)
    return Taken(claims, kept or seen > len(claims) or len(claims) == count)


def _make_claim(desk: Desk) -> Any:
    rows, attempts = desk.rows, desk.ledger.attempts
    (key,) = rows.keys
    kept = is_any_kept(attempts)
    ready = select(key.label("its_key")).where(desk.is_ready, unpaused(desk.ledger, desk.source.name), not_(kept))
    ready = ready.order_by(key).limit(bindparam("ready_limit"))
    found = desk.dialect.lock(ready, rows.table, skip_locked=True).cte("found")
    row_key = func.concat("[", cast(found.c.its_key, String), "]")
    hashed = func.sha256(bindparam("its_table", type_=LargeBinary()).op("||")(func.convert_to(row_key, "UTF8")))
    # As model.open_key_of() makes it.
    open_key = func.left(func.encode(hashed, "hex"), literal_column(str(OPEN_KEY_LENGTH)))
    number = func.row_number().over(order_by=found.c.its_key)
    numbered = select(
        found.c.its_key,
        row_key.label("row_key"),
        open_key.label("open_key"),
        number.label("number"),
        Now().label("instant"),  # one for both: each call of the clock says another
    ).cte("numbered")
    given = desk.dialect.numbered("its_rq_id")
    same = {
        "source": literal(desk.source.name),
        "attempt": literal(1),
        "failures": literal(0),
        "tries": bindparam("its_tries", type_=attempts.c.tries.type),
        "claimed_by": bindparam("its_producer", type_=attempts.c.claimed_by.type),
        "claimed_at": numbered.c.instant,
        "sent_at": numbered.c.instant,
    }
    own = select(numbered.c.row_key, numbered.c.open_key, given.c.value, *same.values())
    opened = (
        insert(attempts)
        .from_select([*Opened._fields, *same], own.join_from(numbered, given, given.c.number == numbered.c.number))
        .on_conflict_do_nothing(index_elements=[attempts.c.open_key])
        .returning(attempts.c.id, attempts.c.row_key, attempts.c.rq_id)
        .cte("opened")
    )
    taken = (
        update(rows.table)
        .where(key == numbered.c.its_key, numbered.c.row_key == opened.c.row_key)
        .values({rows.status: rows.words[State.QUEUED]})
        .returning(key.label("its_key"))
        .cte("taken")
    )
    facts = select(
        kept.label("kept"),
        select(func.count()).select_from(found).scalar_subquery().label("seen"),
        select(func.count()).select_from(taken).scalar_subquery().label("taken"),
    ).subquery("facts")
    # As a claim's transaction does it: https://www.postgresql.org/docs/current/wal-async-commit.html
    soon = func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), true())
    every = facts.outerjoin(opened, true()).outerjoin(numbered, numbered.c.row_key == opened.c.row_key)
    return select(soon, *facts.c, opened.c.id, numbered.c.its_key, opened.c.rq_id).select_from(every)


def begin(desk: Desk, records: Records, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
    """Begin those of these claims against which nothing stands, and their rows.

    What isn't as it was claimed, what is locked, and all under a lost lease, is left alone.
    """
    held = records.hold is not None
    statement = desk.once(f"begin with {columns}, {held}", lambda: _make_begin(desk, records, columns))
    given = records.given(claim_ids, known=True, leased=True)

    def begin() -> Sequence[Any]:
        try:
            return desk.read(lambda c: quick.run(c, statement, given).rows)
        except DBAPIError as error:
            if not desk.dialect.gave_up(error):
                raise
            return ()  # a trigger of the owner's waits, say: then the lease is renewed last of all

    return records.begun(desk.insist(begin, patience=PATIENCE), columns)


def _make_begin(desk: Desk, records: Records, columns: Sequence[str]) -> Any:
    rows, attempts, leases = desk.rows, desk.ledger.attempts, desk.ledger.leases
    (key,) = rows.keys
    c = attempts.c
    where = attempts.join(rows.table, key == cast(func.btrim(c.row_key, literal_column("'[]'")), key.type))
    of = [attempts, rows.table]
    if records.hold is not None:
        where = where.join(leases, (leases.c.id == bindparam("its_lease")) & leases.c.died.is_(None))
        of.append(leases)
    queued = desk.dialect.is_word(rows.status, rows.words[State.QUEUED])
    # The lease is among what is locked: its keeper mustn't wait while we do.
    hardly = func.set_config("lock_timeout", HARD, literal_column("true"))
    fit = select(c.id.label("claim"), key.label("its_key"), hardly.label("hardly")).select_from(where)
    fit = fit.where(records.these, records.may_start_as_known, queued)
    these = fit.with_for_update(of=of, skip_locked=True, key_share=True).cte("fit")
    begun = records.make_mark(c.id == these.c.claim).returning(*records.head).cte("begun")
    wanted = rows.labelled(columns)
    started = (
        update(rows.table)
        .where(key == these.c.its_key)
        .values({rows.status: rows.words[State.STARTED]})
        .returning(these.c.claim.label("nih_sched_claim"), *wanted)
        .cte("started")
    )
    both = begun.join(started, started.c.nih_sched_claim == begun.c.id)
    statement = select(*begun.c, *(started.c[one.name] for one in wanted)).select_from(both)
    if records.hold is None:
        return statement
    return statement.add_cte(records.make_renew().where(exists(select(these.c.claim))).cte("renewed"))
