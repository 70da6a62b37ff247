"""What happened in each minute, added up for charts and metrics."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import func, select

from nih_sched.store.desk import Desk
from nih_sched.store.history import minute_now, utc
from nih_sched.store.horizon import NOTE

PATIENCE = 0.5  # seconds for which the database may be busy: what isn't added now is added with the next ones
NEAR = 1000  # records of the end of the ledger among which waiting times are looked for
SAMPLE = 50  # of them


class Tally:
    """The counts of one source."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._counts = desk.ledger.counts

    def add(self, values: Mapping[str, float], *, patience: float = PATIENCE) -> None:
        """Add these to what has happened in the present minute, all by one statement.

        Args:
            values: by name.
            patience: seconds for which a database that is busy is waited for.
        """
        source, minute = self._desk.source.name, self._desk.read(minute_now)
        # In one order everywhere, so that two who add never wait for each other in a circle.
        rows = [
            {"source": source, "minute": minute, "name": name, "value": value} for name, value in sorted(values.items())
        ]
        statement = self._desk.dialect.adding_up(self._counts, rows)
        self._desk.transact(lambda connection: connection.execute(statement), patience=patience)

    def totals(self) -> dict[str, dict[str, float]]:
        """All that has ever been counted, by source and name."""
        c = self._counts.c
        query = select(c.source, c.name, func.sum(c.value)).where(c.name != NOTE).group_by(c.source, c.name)
        found: dict[str, dict[str, float]] = {}
        for source, name, value in self._desk.read(lambda x: x.execute(query).all()):
            found.setdefault(source, {})[name] = float(value)
        return found

    def by_minute(self, minutes: int) -> tuple[int, dict[int, dict[str, float]]]:
        """The source's counts in these last minutes.

        Returns:
            the present minute, since 1970, and by minute and name what was counted.
        """
        c = self._counts.c
        now = self._desk.read(minute_now)
        query = select(c.minute, c.name, c.value).where(c.source == self._desk.source.name, c.minute > now - minutes)
        found: dict[int, dict[str, float]] = {}
        for minute, name, value in self._desk.read(lambda x: x.execute(query).all()):
            found.setdefault(minute, {})[name] = float(value)
        return now, found

    def waits(self, seen: int) -> tuple[int, list[float]]:
        """How long some of the newest claims waited for their start, in seconds.

        Args:
            seen: the newest claim that was looked at before.

        Returns:
            the newest one now, and the waiting times of at most SAMPLE first attempts behind the one before.
        """
        c = self._desk.ledger.attempts.c
        newest = self._desk.read(lambda x: x.execute(select(func.max(c.id))).scalar()) or 0
        query = select(c.id, c.claimed_at, c.started_at).where(c.id > max(seen, newest - NEAR), c.attempt == 1)
        query = query.where(c.source == self._desk.source.name, c.started_at.is_not(None)).order_by(c.id.desc())
        rows = self._desk.read(lambda x: x.execute(query.limit(SAMPLE)).all())
        waits = [max(0.0, (utc(started) - utc(claimed)).total_seconds()) for _, claimed, started in rows]
        return max([seen, *(row[0] for row in rows)]), waits
