"""Forgetting: history that has grown old, and old counts by the minute; by short transactions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, case, delete, func, or_, select, tuple_
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import After
from nih_sched.model import Outcome
from nih_sched.store.desk import Desk
from nih_sched.store.history import minute_now
from nih_sched.store.horizon import NOTE

CHUNK = 500  # records that are looked at, and claims that are forgotten, by one transaction
LEAST = 60.0  # seconds for which everything is kept: an outcome's answer may be lost, and asked for again
MINUTES = 2 * 1440  # for which counts are kept by the minute
FOLDED = 0  # the minute that holds all older ones
FOLDS = 2000  # counts folded by one transaction


@dataclass(frozen=True)
class Pruned:
    """What one chunk did."""

    records: int
    last: int | None  # records up to this id have been looked at; None: there are no more that are old enough


class Pruning:
    """Statements on ended claims; an open one is never touched, nor one that the row's next claim must know of.

    Args:
        desk: a source's.
        done: seconds for which done claims are kept.
        others: seconds for which all others are.
        everywhere: whether claims of all sources of this ledger are meant.
    """

    def __init__(self, desk: Desk, done: float, others: float, *, everywhere: bool = False) -> None:
        self._desk = desk
        self._attempts = desk.ledger.attempts
        self._done, self._others = max(done, LEAST), max(others, LEAST)
        self._everywhere = everywhere

    def chunk(self, after: int) -> Pruned:
        """Forget what is old among the next records, by id, with all their attempts.

        Args:
            after: the id behind which to look; 0 at first.
        """
        c = self._attempts.c
        # Ids grow with the time of the claim: behind a claim that is too young are only younger ones.
        young = case((c.claimed_at > After(-min(self._done, self._others)), 1), else_=0)
        query = select(c.id, case((self._is_old(), 1), else_=0), young).where(c.id > after).order_by(c.id).limit(CHUNK)
        found = self._desk.read(lambda connection: connection.execute(query).all())
        old = [row[0] for row in found if row[1]]
        records = self._desk.transact(lambda connection: self._forget(connection, old)) if old else 0
        is_last = len(found) < CHUNK or bool(found[-1][2])
        return Pruned(records, None if is_last else found[-1][0])

    def _is_old(self) -> ColumnElement[bool]:
        c = self._attempts.c
        ended = func.coalesce(c.finished_at, c.claimed_at)  # a claim that its owner's change has closed never began
        is_done = func.coalesce(c.outcome, "") == Outcome.DONE.value
        old = or_(and_(is_done, ended < After(-self._done)), and_(~is_done, ended < After(-self._others)))
        over = and_(c.of_claim.is_(None), c.open_key.is_(None), c.kept_key.is_(None))
        return and_(over, old) if self._everywhere else and_(over, old, c.source == self._desk.source.name)

    def _forget(self, connection: Connection, claim_ids: Sequence[int]) -> int:
        c = self._attempts.c
        these = self._desk.among(c.id, claim_ids)
        query = select(c.id).where(these, self._is_old())
        ids = list(connection.execute(self._desk.dialect.lock(query, self._attempts)).scalars())
        if not ids:
            return 0
        count = connection.execute(delete(self._attempts).where(self._desk.among(c.of_claim, ids))).rowcount
        return count + connection.execute(delete(self._attempts).where(self._desk.among(c.id, ids))).rowcount

    def fold(self) -> bool:
        """Add old counts of this source to those of minute 0; return whether there may be more of them."""
        return self._desk.transact(self._fold)

    def _fold(self, connection: Connection) -> bool:
        counts = self._desk.ledger.counts
        c = counts.c
        first = minute_now(connection) - MINUTES
        old = (c.source == self._desk.source.name) & (c.minute > FOLDED) & (c.minute < first)
        query: Select[Any] = select(c.minute, c.name, c.value).where(old).order_by(c.minute, c.name).limit(FOLDS)
        found = connection.execute(self._desk.dialect.lock(query, counts)).all()
        sums: dict[str, float] = defaultdict(float)
        for _, name, value in found:
            sums[name] += 0 if name == NOTE else value  # ids, which add up to nothing
        if found:
            its = {"source": self._desk.source.name, "minute": FOLDED}
            whole = [{**its, "name": name, "value": value} for name, value in sorted(sums.items())]
            connection.execute(self._desk.dialect.adding_up(counts, whole))
            these = tuple_(c.minute, c.name).in_([(row.minute, row.name) for row in found])
            connection.execute(delete(counts).where(c.source == self._desk.source.name, these))
        return len(found) == FOLDS
