"""Claims that wait for their next attempt: which are due, and who sends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select, update

from nih_sched.dialects import After, Now
from nih_sched.store.desk import FOREVER, Desk


@dataclass(frozen=True)
class Due:
    """A claim whose next attempt is due and hasn't been sent."""

    claim_id: int
    rq_id: str
    failures: int
    tries: int
    overdue: float  # seconds


class Retries:
    """The ledger holds due_at; whoever takes a due claim first sends it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        attempts = desk.ledger.attempts
        self._attempts = attempts
        self._waiting = (
            (attempts.c.source == desk.source.name)
            & attempts.c.due_at.is_not(None)
            & attempts.c.open_key.is_not(None)
            & attempts.c.started_at.is_(None)
            & or_(attempts.c.sent_at.is_(None), attempts.c.sent_at < attempts.c.due_at)
        )

    def due(self, limit: int) -> list[Due]:
        """Unsent claims that are due, longest due first."""
        c = self._attempts.c
        query = (
            select(c.id, c.rq_id, c.failures, c.tries, c.due_at, Now().label("now"))
            .where(self._waiting, c.due_at <= Now())
            .order_by(c.due_at)
            .limit(limit)
        )
        return [
            Due(row.id, row.rq_id, row.failures, row.tries, (row.now - row.due_at).total_seconds())
            for row in self._desk.read(lambda connection: connection.execute(query).all())
        ]

    def take(self, due: Due, rq_id: str) -> bool:
        """Mark a due claim as sent under `rq_id`; False when another producer was first."""
        statement = (
            update(self._attempts)
            .where(self._waiting, self._attempts.c.id == due.claim_id, self._attempts.c.rq_id == due.rq_id)
            .values(sent_at=Now(), rq_id=rq_id)
        )
        return bool(self._desk.transact(lambda connection: connection.execute(statement).rowcount))

    def carry(self, claim_id: int, rq_id: str) -> bool:
        """Note under which RQ id a waiting claim stands in RQ's scheduled registry."""
        statement = update(self._attempts).where(self._waiting, self._attempts.c.id == claim_id).values(rq_id=rq_id)
        return bool(self._desk.transact(lambda connection: connection.execute(statement).rowcount))

    def unstarted(self, age: float) -> list[tuple[int, str]]:
        """(claim id, RQ id) of claims sent at least `age` seconds ago that haven't begun and don't wait for a time."""
        c = self._attempts.c
        query = select(c.id, c.rq_id).where(
            c.source == self._desk.source.name,
            c.open_key.is_not(None),
            c.started_at.is_(None),
            c.due_at.is_(None),
            c.sent_at <= After(-age),
        )
        return [(row.id, row.rq_id) for row in self._desk.read(lambda connection: connection.execute(query).all())]

    def put_off(self, claim_ids: Sequence[int], seconds: float) -> None:
        """Have claims that didn't begin sent again in some seconds: the RQ job that carried them has ended."""
        c = self._attempts.c
        statement = (
            update(self._attempts)
            .where(c.id.in_(claim_ids), c.open_key.is_not(None), c.started_at.is_(None))
            .where(or_(c.due_at.is_(None), c.due_at <= Now()))  # one that waits for its time goes on waiting
            .values(due_at=After(seconds))
        )
        self._desk.transact(lambda connection: connection.execute(statement), patience=FOREVER)

    def seconds_to_next(self) -> float | None:
        """Seconds until the next waiting claim is due, by the database's clock; None when none waits."""
        query = select(func.min(self._attempts.c.due_at), Now()).where(self._waiting)
        earliest, now = self._desk.read(lambda connection: connection.execute(query).one())
        return None if earliest is None else max(0.0, (earliest - now).total_seconds())
