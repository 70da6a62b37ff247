"""Questions about a source that change nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Integer, Select, bindparam, case, func, literal, literal_column, or_, select
from sqlalchemy.sql import ColumnElement

from nih_sched import clock
from nih_sched.dialects import Now
from nih_sched.model import Outcome, State, decode_key, encode_key
from nih_sched.store.desk import Desk
from nih_sched.store.pauses import unpaused
from nih_sched.store.retries import seconds_between, sent, waiting

MOST_OPEN = 100_000  # open claims that are looked at
HEADS = 100  # retries, of any source, among which the first of ours is looked for
UNSEEN = 100_000  # ids that may have been given out in transactions which haven't committed yet
_ONE: ColumnElement[int] = literal_column("1", Integer)
WALK = 0.1  # seconds for which failures are looked for
STEP, MOST = 2000, 32_000  # records of the walk's first step, and of its longest
FINAL_FAILURES = (Outcome.FAILED.value, Outcome.TIMED_OUT.value, Outcome.CRASHED.value, Outcome.LOST.value)


@dataclass(frozen=True)
class Seen:
    """What there is to do for a source; while it is paused, only what moves is."""

    ready: bool  # ready rows
    moving: bool  # claims that are queued or run
    paused: bool  # the source
    due: float | None  # seconds until the next of the others is; None when none waits


class Progress(NamedTuple):
    """How far a claim has come."""

    runs: bool
    seconds: float | None  # that it has run by now, or that its last attempt ran; None before the first


class Looks:
    """Counts and lists, straight from table and ledger."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._attempts = desk.ledger.attempts

    @property
    def _unpaused(self) -> ColumnElement[bool]:
        return unpaused(self._desk.ledger, self._desk.source.name)

    def now(self) -> datetime:
        """The database's clock."""
        return self._desk.read(_instant)

    def ready(self) -> int:
        """How many ready rows are ours."""
        query = select(func.count()).select_from(self._desk.rows.table).where(self._desk.is_ready)
        return int(self._desk.read(lambda c: c.execute(query).scalar_one()))

    def ready_up_to(self, limit: int) -> int:
        """How many rows are ready to be claimed, counted to `limit` at most."""
        some = self._first_ready(self._desk.rows.keys[0]).limit(bindparam("ready_limit", limit)).subquery()
        return int(self._desk.read(lambda c: c.execute(select(func.count()).select_from(some)).scalar_one()))

    def _first_ready(self, fact: ColumnElement[Any]) -> Select[Any]:
        # In the claims' order: else PostgreSQL reads the table, without the index, where it takes many rows for ready
        # that have ended since it last counted.
        rows = self._desk.rows
        return select(fact).where(self._desk.is_ready, self._unpaused).order_by(*rows.keys)

    def around(self, *, rows: bool) -> Seen:
        """What there is to do, in one statement; with `rows`, the table is looked at too, and not the ledger alone."""
        desk, attempts = self._desk, self._attempts
        c = attempts.c
        ours = (c.source == desk.source.name) & (c.open_key > "")  # not NULL, said so that SQLite uses the index
        moving = select(_ONE).where(ours, or_(c.started_at.is_not(None), sent(attempts))).order_by(c.open_key)
        # By order and limit alone PostgreSQL uses the index whatever it believes of the ledger.
        waits = waiting(attempts, desk.source.name) & self._unpaused
        heads = select(c.due_at, case((waits, c.due_at)).label("ours")).where(c.due_at.is_not(None))
        first = heads.order_by(c.due_at).limit(HEADS).subquery()
        query = select(
            _is_any(self._first_ready(_ONE)) if rows else literal(0),
            _is_any(moving),
            func.min(first.c.ours),
            func.count(),
            Now(),
            case((self._unpaused, 0), else_=1),
        ).select_from(first)
        ready_one, moving_one, due, seen, now, paused = desk.read(lambda connection: connection.execute(query).one())
        if due is None and seen == HEADS:  # all of them others'
            due = desk.read(lambda connection: connection.execute(select(func.min(c.due_at)).where(waits)).scalar())
        wait = None if due is None else max(0.0, seconds_between(now, due))
        return Seen(bool(ready_one), bool(moving_one), bool(paused), wait)

    def by_word(self) -> dict[Any, int]:
        """How many rows there are of each word in the status column."""
        status = self._desk.rows.status
        query = select(status, func.count()).group_by(status)
        return {row[0]: row[1] for row in self._desk.read(lambda c: c.execute(query).all())}

    def open_claims_up_to(self, limit: int, producer: str | None = None) -> int:
        """How many claims of this source haven't ended: queued, running, waiting to retry.

        Args:
            limit: counted to so many at most.
            producer: only those that this one opened.
        """
        c = self._attempts.c
        some = select(c.id).where(c.open_key > "", c.source == self._desk.source.name)
        if producer is not None:
            some = some.where(c.claimed_by == producer)
        query = select(func.count()).select_from(some.order_by(c.open_key).limit(limit).subquery())
        return int(self._desk.read(lambda connection: connection.execute(query).scalar_one()))

    def open_ends(self) -> tuple[int | None, bool, int | None]:
        """The least id of open claims, whether there are more than were looked at, and the newest id of all."""
        c = self._attempts.c
        # In the index's order, so that it is used; see Retries.carriers.
        open_ones = select(c.id).where(c.open_key > "").order_by(c.open_key).limit(MOST_OPEN).subquery()
        newest = select(func.max(c.id)).scalar_subquery()
        query = select(func.min(open_ones.c.id), func.count(), newest).select_from(open_ones)
        least, amount, last = self._desk.read(lambda connection: connection.execute(query).one())
        return least, amount == MOST_OPEN, last

    def first_to_end(self) -> int:
        """A claim id below which none will end from now on."""
        least, more, last = self.open_ends()
        if more or last is None:
            return 0
        beyond = max(0, int(last) - UNSEEN)
        return beyond if least is None else min(int(least), beyond)

    def ended_since(self, since: datetime, producer: str | None = None, first: int = 0) -> dict[str, int]:
        """How many claims of this source have ended since an instant, by outcome.

        Args:
            since: the instant, by the database's clock.
            producer: only those that this one opened.
            first: the id from which on they are looked for, as first_to_end() said then; 0: all of the ledger.
        """
        c = self._attempts.c
        query = (
            select(c.outcome, func.count())
            .where(c.source == self._desk.source.name, c.of_claim.is_(None), c.finished_at >= since, c.id >= first)
            .group_by(c.outcome)
        )
        if producer is not None:
            query = query.where(c.claimed_by == producer)
        return {row[0]: row[1] for row in self._desk.read(lambda connection: connection.execute(query).all())}

    def progress(self, claim_ids: Iterable[int]) -> dict[int, Progress]:
        """How far these claims have come, by id; those that were given back are missing."""
        c = self._attempts.c
        query = select(c.id, c.seconds, c.started_at, c.finished_at, Now()).where(c.id.in_(list(claim_ids)))
        progress = dict[int, Progress]()
        for its, seconds, began, ended, now in self._desk.read(lambda connection: connection.execute(query).all()):
            runs = began is not None and ended is None
            progress[its] = Progress(runs, max(0.0, seconds_between(began, now)) if runs else seconds)
        return progress

    def last_failures(self, limit: int, seconds: float = WALK) -> tuple[list[Any], int | None]:
        """Rows in the failed state whose claims failed last: row_key, outcome, attempt, reason, finished_at.

        Args:
            limit: how many rows at most.
            seconds: for which the ledger is looked through, newest records first: there may be none for a long way.

        Returns:
            the rows; and how many records were looked through when time was over, or None if it wasn't.
        """
        rows = self._desk.rows
        newest: dict[str, Any] = {}
        records, looked_at = self._failed_claims(5 * limit, seconds)
        for record in records:
            newest.setdefault(record.row_key, record)
        if not newest:
            return [], looked_at
        keys = [decode_key(row_key) for row_key in newest]
        query = select(*rows.keys).where(
            rows.keyed(keys), self._desk.dialect.is_word(rows.status, rows.words[State.FAILED])
        )
        failed = {encode_key(tuple(row)) for row in self._desk.read(lambda c: c.execute(query).all())}
        return [record for row_key, record in newest.items() if row_key in failed][:limit], looked_at

    def _failed_claims(self, limit: int, seconds: float) -> tuple[list[Any], int | None]:
        c, until = self._attempts.c, clock.monotonic() + seconds
        query = (
            select(c.row_key, c.outcome, c.attempt, c.reason, c.finished_at)
            .where(c.source == self._desk.source.name, c.of_claim.is_(None), c.outcome.in_(FINAL_FAILURES))
            .where(c.id > bindparam("behind"), c.id <= bindparam("up_to"))
            .order_by(c.id.desc())
            .limit(limit)
        )
        # Asked apart: for both together SQLite reads the table.
        ends = select(*(select(one(c.id)).scalar_subquery() for one in (func.min, func.max)))
        first, last = self._desk.read(lambda x: x.execute(ends).one())
        found: list[Any] = []
        up_to, step = last or 0, STEP
        while up_to >= (first or 1) and len(found) < limit:
            ids = {"behind": up_to - step, "up_to": up_to}
            found += self._desk.read(lambda x, its=ids: x.execute(query, its).all())  # type: ignore[misc]
            up_to, step = up_to - step, min(2 * step, MOST)
            if clock.monotonic() >= until:  # asked after a step: the newest ones are looked at in any case
                break
        is_all = up_to < (first or 1) or len(found) >= limit
        return found[:limit], None if is_all else last - up_to


def _is_any(query: Select[Any]) -> ColumnElement[int]:
    # Not EXISTS: of a query in it PostgreSQL ignores the order.
    return func.coalesce(query.limit(1).scalar_subquery(), 0)


def _instant(connection: Connection) -> datetime:
    instant: datetime = connection.execute(select(Now())).scalar_one()
    return instant
