"""What happened in each minute, by name: added up by every process of ours, read by charts and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from nih_sched import clock
from nih_sched.dialects import dialect_of
from nih_sched.ledger import Ledger
from nih_sched.store.desk import Desk


@dataclass(frozen=True)
class Minute:
    """One minute of a source."""

    at: datetime  # UTC, its begin
    done: float
    failed: float
    waited: float | None  # seconds from claim to start, on average of those that were looked at


class Counts:
    """The counts of a desk's ledger."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._counts = desk.ledger.counts

    def minutes(self, number: int) -> list[Minute]:
        """The source's last so many minutes, oldest first."""
        c, now = self._counts.c, int(clock.now().timestamp() // 60)
        names = ("done", "failed", "wait_sum", "wait_count")
        query = select(c.minute, c.name, c.value).where(
            c.source == self._desk.source.name, c.minute > now - number, c.name.in_(names)
        )
        found: dict[int, dict[str, float]] = {}
        for minute, name, value in self._desk.read(lambda x: x.execute(query).all()):
            found.setdefault(minute, {})[name] = value
        return [_minute(one, found.get(one, {})) for one in range(now - number + 1, now + 1)]

    def totals(self) -> list[tuple[str, str, float]]:
        """Source, name and value of all that was ever counted; they only grow."""
        c = self._counts.c
        query = select(c.source, c.name, func.sum(c.value)).group_by(c.source, c.name)
        return [(row[0], row[1], float(row[2])) for row in self._desk.read(lambda x: x.execute(query).all())]


def _minute(number: int, values: Mapping[str, float]) -> Minute:
    count = values.get("wait_count", 0.0)
    waited = values.get("wait_sum", 0.0) / count if count else None
    at = datetime.fromtimestamp(60 * number, UTC)
    return Minute(at, values.get("done", 0.0), values.get("failed", 0.0), waited)


def add(engine: Engine, ledger: Ledger, source: str, minute: int, values: Mapping[str, float]) -> None:
    """Add to a minute's counts.

    Raises:
        SQLAlchemyError: nothing was added.
    """
    counts, dialect = ledger.counts, dialect_of(engine)
    for _ in range(2):
        try:
            with dialect.transaction(engine) as connection:
                dialect.begin(connection)
                dialect.wait_briefly(connection)
                _add(connection, counts, source, minute, sorted(values.items()))
        except IntegrityError:
            continue  # another process was first to count this in this minute
        return


def _add(connection: Connection, counts: Any, source: str, minute: int, values: Sequence[tuple[str, float]]) -> None:
    for name, value in values:  # in order, so that two who add never wait for each other in a circle
        same = (counts.c.source == source) & (counts.c.minute == minute) & (counts.c.name == name)
        if not connection.execute(update(counts).where(same).values(value=counts.c.value + value)).rowcount:
            connection.execute(insert(counts).values(source=source, minute=minute, name=name, value=value))
