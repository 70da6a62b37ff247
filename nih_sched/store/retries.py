"""Claims that wait for their next attempt: which are due, and who sends them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Column, Connection, Select, Table, bindparam, case, func, or_, select, update
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import After, Now
from nih_sched.model import Claim, decode_key
from nih_sched.store.desk import FOREVER, Desk

PAGE = 2000  # open claims that are looked at together


@dataclass(frozen=True)
class Due:
    """A claim whose next attempt is due and hasn't been sent."""

    claim: Claim
    overdue: float  # seconds


class Retries:
    """The ledger holds due_at; whoever takes a due claim first sends it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        attempts = desk.ledger.attempts
        self._attempts = attempts
        self._waiting = waiting(attempts, desk.source.name)
        self._sent = sent(attempts)
        # open_key > "", not NULL: said so that SQLite uses the index
        unstarted = (attempts.c.source == desk.source.name) & (attempts.c.open_key > "")
        self._unstarted = unstarted & attempts.c.started_at.is_(None) & self._sent

    def due(self, limit: int) -> list[Due]:
        """Unsent claims that are due, longest due first."""
        # By order and limit alone, PostgreSQL uses the index whatever it believes of a table that it hasn't analyzed;
        # of a small one only where a single record is wanted.
        first = self._desk.once("first due", self._make_first)
        if not self._desk.read(lambda connection: connection.execute(first).scalar()):
            return []
        heads = self._desk.once(
            f"heads of due, {limit}", lambda: self._make_due(self._attempts.c.due_at.is_not(None), limit)
        )
        found = self._desk.read(lambda connection: connection.execute(heads).all())
        if len(found) == limit and found[-1].is_due and not all(row.is_ours for row in found):
            exact = self._desk.once(f"due, {limit}", lambda: self._make_due(self._waiting, limit))
            found = self._desk.read(lambda connection: connection.execute(exact).all())
        return [Due(_claim(row), seconds_between(row.due_at, row.now)) for row in found if row.is_due and row.is_ours]

    def _make_first(self) -> Any:
        due = self._attempts.c.due_at
        return select(_flag(due <= Now())).where(due.is_not(None)).order_by(due).limit(1)

    def _make_due(self, among: ColumnElement[bool], limit: int) -> Any:
        c = self._attempts.c
        is_due, is_ours = _flag(c.due_at <= Now()).label("is_due"), _flag(self._waiting).label("is_ours")
        facts = (c.id, c.row_key, c.rq_id, c.attempt, c.failures, c.tries, c.due_at, Now().label("now"))
        return select(*facts, is_due, is_ours).where(among).order_by(c.due_at).limit(limit)

    def take(self, due: Due, rq_id: str) -> bool:
        """Mark a due claim as sent under `rq_id`; False when another producer was first."""
        statement = (
            update(self._attempts)
            .where(self._waiting, self._attempts.c.id == due.claim.id, self._attempts.c.rq_id == due.claim.rq_id)
            .values(sent_at=Now(), due_at=None, rq_id=rq_id)
        )
        return bool(self._desk.transact(lambda connection: connection.execute(statement).rowcount))

    def carry(self, rq_ids: Mapping[int, str]) -> set[int]:
        """Note under which RQ ids waiting claims stand in RQ's scheduled registry.

        Args:
            rq_ids: by claim id.

        Returns:
            which claims still wait.
        """
        return self._desk.transact(lambda connection: self._carry(connection, rq_ids))

    def _carry(self, connection: Connection, rq_ids: Mapping[int, str]) -> set[int]:
        c = self._attempts.c
        query = select(c.id).where(self._desk.among(c.id, rq_ids), self._waiting)
        found = set(connection.execute(self._desk.dialect.lock(query, self._attempts)).scalars())
        if found:
            statement = update(self._attempts).where(c.id == bindparam("its_id")).values(rq_id=bindparam("its_rq_id"))
            connection.execute(statement, [{"its_id": one, "its_rq_id": rq_ids[one]} for one in found])
        return found

    def unstarted(self, rq_ids: Container[str] | None = None) -> list[Claim]:
        """Claims (carried by these jobs) that were sent, haven't begun, and don't wait for a time."""
        c = self._attempts.c
        query = self._open_ones(c.id, c.row_key, c.attempt, c.failures, c.tries)
        found: list[Claim] = []
        after: str | None = ""
        while after is not None:
            page = self._desk.read(partial(_page, query, after))
            found += [_claim(row) for row in page if row.is_unstarted and (rq_ids is None or row.rq_id in rq_ids)]
            after = page[-1].open_key if len(page) == PAGE else None
        return found

    def carriers(self) -> set[str]:
        """The RQ ids of the jobs that carry what unstarted() would give."""
        query = self._desk.once("carriers", self._make_carriers)
        found = set[str]()
        after: str | None = ""
        while after is not None:
            page = self._desk.read(partial(_page, query, after))
            found |= {row.rq_id for row in page if row.is_unstarted}
            after = max(row.last for row in page) if sum(row.number for row in page) == PAGE else None
        return found

    def _make_carriers(self) -> Any:
        some = self._open_ones().subquery()
        last, any_unstarted = func.max(some.c.open_key), func.max(some.c.is_unstarted)
        facts = (last.label("last"), any_unstarted.label("is_unstarted"), func.count().label("number"))
        return select(some.c.rq_id, *facts).group_by(some.c.rq_id)

    def _open_ones(self, *facts: Column[Any]) -> Select[Any]:
        # In order and in pages, so that PostgreSQL walks the index: that alone forgets the entries of what has ended,
        # which else are looked up again each time until a vacuum comes.
        c = self._attempts.c
        is_unstarted = _flag(self._unstarted).label("is_unstarted")
        query = select(*facts, c.rq_id, c.open_key, is_unstarted).where(c.open_key > bindparam("after_key"))
        return query.order_by(c.open_key).limit(PAGE)

    def hand_over(self, claim: Claim, rq_id: str) -> bool:
        """Have another job carry a claim that hasn't begun; False when it has by now, or another carries it."""
        c = self._attempts.c
        statement = (
            update(self._attempts)
            .where(c.id == claim.id, c.rq_id == claim.rq_id, c.open_key.is_not(None), c.started_at.is_(None))
            .where(self._sent)
            .values(rq_id=rq_id, sent_at=Now(), due_at=None)
        )
        return bool(self._desk.transact(lambda connection: connection.execute(statement).rowcount))

    def put_off(self, claim_ids: Sequence[int], seconds: float, rq_id: str | None = None) -> None:
        """Have claims that didn't begin sent again in some seconds: the RQ job that carried them has ended.

        Args:
            claim_ids: which.
            seconds: how soon.
            rq_id: the job that has ended; a claim that another job carries by now is left alone.
        """
        c = self._attempts.c
        statement = (
            update(self._attempts)
            .where(self._desk.among(c.id, claim_ids), c.open_key.is_not(None), c.started_at.is_(None))
            .where(or_(c.due_at.is_(None), c.due_at <= Now()))  # one that waits for its time goes on waiting
            .values(due_at=After(seconds), sent_at=None)
        )
        if rq_id is not None:
            statement = statement.where(c.rq_id == rq_id)
        self._desk.transact(lambda connection: connection.execute(statement), patience=FOREVER)


def waiting(attempts: Table, source: str) -> ColumnElement[bool]:
    """Claims of a source that wait for their next attempt, sent by nobody yet."""
    c = attempts.c
    open_one = (c.source == source) & c.due_at.is_not(None) & c.open_key.is_not(None) & c.started_at.is_(None)
    # Version 1 leaves the time of the last sending there, and due_at once it has sent.
    return open_one & or_(c.sent_at.is_(None), c.sent_at < c.due_at)


def sent(attempts: Table) -> ColumnElement[bool]:
    """Claims that don't wait for a time, as far as they haven't started."""
    return or_(attempts.c.due_at.is_(None), attempts.c.sent_at >= attempts.c.due_at)


def seconds_between(earlier: datetime, later: datetime) -> float:
    """From one instant of the database's to another."""
    # Python subtracts two instants of one time zone by their wall clocks, an hour wrong when summer time begins.
    if earlier.tzinfo is not None:
        earlier, later = earlier.astimezone(UTC), later.astimezone(UTC)
    return (later - earlier).total_seconds()


def _page(query: Any, after: str, connection: Connection) -> Sequence[Any]:
    return connection.execute(query, {"after_key": after}).all()


def _flag(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return case((condition, 1), else_=0)  # MariaDB has no plain one


def _claim(row: Any) -> Claim:
    return Claim(row.id, decode_key(row.row_key), row.rq_id, row.attempt, row.failures, row.tries)
