"""Checks of the database server."""

from __future__ import annotations

from datetime import UTC, datetime

from nih_sched.dialects import address
from nih_sched.doctor.finding import Finding, Visit
from nih_sched.store.history import History

SKEW = 2.0  # seconds by which clocks may differ


def rights(visit: Visit) -> list[Finding]:
    """What we may do there; tried out in a transaction that is rolled back, on no row at all."""
    return [
        Finding(
            "rights",
            f"The database refuses {what}: {why}",
            "Rows would be claimed and then stick, or nothing would be claimed at all.",
            "Have its owner grant it: docs/databases.md lists the rights.",
        )
        for what, why in visit.checkup.refused()
    ]


def version(visit: Visit) -> list[Finding]:
    """A server older than we are tested with."""
    found, oldest = visit.checkup.version(), visit.desk.dialect.oldest(visit.desk.engine)
    if found >= oldest:
        return []
    return [
        Finding(
            "old-database",
            f"{address(visit.desk.engine.url)} is version {_dotted(found)}; the oldest served is {_dotted(oldest)}",
            "Statements may fail, or not keep what they promise.",
            "Upgrade the server.",
        )
    ]


def clock(visit: Visit) -> list[Finding]:
    """Clocks that differ."""
    before = datetime.now(UTC)
    skew = (History(visit.desk).now() - before).total_seconds()
    taken = (datetime.now(UTC) - before).total_seconds()
    if -SKEW <= skew <= SKEW + taken:
        return []
    return [
        Finding(
            "clock-skew",
            f"The database's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's",
            "Leases and retries go by the database's clock alone, so nothing breaks; but RQ and our logs show other "
            "times than the ledger.",
            "Have both machines follow NTP: timedatectl status",
            is_problem=False,
        )
    ]


def journal(visit: Visit) -> list[Finding]:
    """An SQLite file in which readers and writers wait for each other."""
    mode = visit.desk.dialect.journal_mode(visit.desk.engine)
    if mode in (None, "wal", "memory"):
        return []
    return [
        Finding(
            "sqlite-journal",
            f"The SQLite file's journal mode is {mode}, not wal",
            "While anybody reads, nobody can write: claims and ends wait for your own queries, and they for ours.",
            "scheduler doctor --fix, or: sqlite3 FILE 'PRAGMA journal_mode = WAL'",
            is_problem=False,
            fix=lambda: _fix_journal(visit),
        )
    ]


def _fix_journal(visit: Visit) -> str:
    visit.desk.dialect.prepare(visit.desk.engine)
    return f"The journal mode is {visit.desk.dialect.journal_mode(visit.desk.engine)} now."


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
