"""What is wrong with a source, why it matters, and what to type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from nih_sched.doctor import crew, database, redis, rows
from nih_sched.doctor.finding import Finding, Visit

Check = Callable[[Visit], Sequence[Finding]]

# In the order in which they are told. A new check is a function, and a line here.
CHECKS: tuple[Check, ...] = (
    database.rights,
    database.version,
    database.clock,
    database.journal,
    redis.version,
    redis.memory,
    redis.persistence,
    crew.pauses,
    crew.producers,
    crew.workers,
    crew.retries,
    crew.handler,
    crew.dashboard,
    rows.orphans,
    rows.words,
    rows.index,
    rows.ledger,
)


def findings(visit: Visit) -> list[Finding]:
    """Everything that is wrong, problems before advice; none means that all is well."""
    beside = {rows.orphans: visit.desk.beside(partial(rows.orphans, visit))}  # it may have to read the whole table
    found = [finding for check in CHECKS for finding in (beside[check]() if check in beside else check(visit))]
    return sorted(found, key=lambda finding: not finding.is_problem)


__all__ = ["CHECKS", "Finding", "Visit", "findings"]
