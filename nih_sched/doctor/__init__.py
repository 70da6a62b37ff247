"""What is wrong with a source, why it matters, and what to type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from nih_sched.doctor import crew, database, redis, rows
from nih_sched.doctor.finding import Finding, Visit
from nih_sched.settings import Settings
from nih_sched.store import Desk

if TYPE_CHECKING:
    from redis import Redis

Check = Callable[[Visit], Sequence[Finding]]
# A connection to Redis; or what to say of there being none.
Reach = Callable[[], "tuple[Redis | None, Sequence[Finding]]"]

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


def findings(settings: Settings, desk: Desk, reach: Reach) -> list[Finding]:
    """Everything that is wrong, problems before advice; none means that all is well.

    Args:
        settings: as for a scheduler.
        desk: the source's.
        reach: connects to Redis.
    """
    # It may have to read the whole table: that takes as long as to import Redis.
    beside = {rows.orphans: desk.beside(partial(rows.orphans_of, desk))}
    connection, found = reach()
    visit = Visit(settings, desk, connection)
    checked = [finding for check in CHECKS for finding in (beside[check]() if check in beside else check(visit))]
    return [*found, *sorted(checked, key=lambda finding: not finding.is_problem)]


__all__ = ["CHECKS", "Finding", "Visit", "findings"]
