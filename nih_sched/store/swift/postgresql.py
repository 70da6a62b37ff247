"""On PostgreSQL they are claimed, and begin, by one statement that is its own transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, LargeBinary, String, cast, exists, func, not_, select, true, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import bindparam, literal_column

from nih_sched.dialects import Now, quick
from nih_sched.dialects.base import HARD, Opened, is_any_kept
from nih_sched.errors import KeysDontMatch
from nih_sched.model import OPEN_KEY_LENGTH, Claim, StartedRow, State
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.pauses import unpaused
from nih_sched.store.records import Records
from nih_sched.store.swift.parts import Taken, given, new_record


def claim(desk: Desk, count: int, rq_ids: Callable[[int], Sequence[str]], producer: str, tries: int) -> Taken:
    """As of the package."""
    statement = desk.once("swift claim", lambda: _make_claim(desk))

    def take(connection: Connection) -> Sequence[Any]:
        own = {"its_rq_id": rq_ids(count)}  # new ones each time: of a commit whose answer is lost nothing is known
        return quick.run(connection, statement, given(desk, producer, tries) | own | {"ready_limit": count}).rows

    found = desk.insist(lambda: desk.dialect.write_at_once(desk.engine, take), patience=PATIENCE)
    claims = [Claim(claim_id, (key,), rq_id, 1, 0, tries) for *_, claim_id, key, rq_id in found if claim_id is not None]
    _, kept, seen, taken, *_ = found[0]
    if taken != len(claims):
        raise KeysDontMatch(table=desk.rows.name, columns=desk.rows.keys[0].name, wanted=len(claims), taken=taken)
    return Taken(claims, kept or seen > len(claims) or len(claims) == count)


def _make_claim(desk: Desk) -> Any:
    from sqlalchemy.dialects.postgresql import insert  # noqa: PLC0415 - all of a dialect, of no use to the others

    rows, attempts = desk.rows, desk.ledger.attempts
    (key,) = rows.keys
    kept = is_any_kept(attempts)
    ready = select(key.label("its_key")).where(desk.is_ready, unpaused(desk.ledger, desk.source.name), not_(kept))
    ready = ready.order_by(key).limit(bindparam("ready_limit"))
    found = desk.dialect.lock(ready, rows.table, skip_locked=True).cte("found")
    row_key = func.concat("[", cast(found.c.its_key, String), "]")
    hashed = func.sha256(bindparam("its_table", type_=LargeBinary()).op("||")(func.convert_to(row_key, "UTF8")))
    # As model.open_keys_of() makes them.
    open_key = func.left(func.encode(hashed, "hex"), literal_column(str(OPEN_KEY_LENGTH)))
    number = func.row_number().over(order_by=found.c.its_key)
    numbered = select(
        found.c.its_key,
        row_key.label("row_key"),
        open_key.label("open_key"),
        number.label("number"),
        Now().label("instant"),  # one for both: each call of the clock says another
    ).cte("numbered")
    ids = desk.dialect.numbered("its_rq_id")
    same = new_record(desk) | {"claimed_at": numbered.c.instant, "sent_at": numbered.c.instant}
    own = select(numbered.c.row_key, numbered.c.open_key, ids.c.value, *same.values())
    opened = (
        insert(attempts)
        .from_select([*Opened._fields, *same], own.join_from(numbered, ids, ids.c.number == numbered.c.number))
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
    """As of the package."""
    held = records.hold is not None
    statement = desk.once(f"begin with {columns}, {held}", lambda: _make_begin(desk, records, columns))
    its = records.given(claim_ids, known=True, leased=True)

    def begin() -> Sequence[Any]:
        try:
            return desk.dialect.write_at_once(desk.engine, lambda c: quick.run(c, statement, its).rows)
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
