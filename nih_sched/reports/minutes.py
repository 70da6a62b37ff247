"""The last hour in minutes, from what was counted in each: all of it, however much that was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from nih_sched.store import Desk
from nih_sched.store.tally import Tally

MINUTES = 60


@dataclass(frozen=True)
class Minute:
    """One minute of a source."""

    at: datetime  # UTC, its begin
    done: int
    failed: int
    waited: float | None  # seconds from claim to start, on average of those that were looked at


@dataclass(frozen=True)
class Hour:
    """The minutes, oldest first."""

    minutes: tuple[Minute, ...]


def hour(desk: Desk) -> Hour:
    """The source's last hour."""
    now, counts = Tally(desk).by_minute(MINUTES)
    return Hour(tuple(_minute(at, counts.get(at, {})) for at in range(now - MINUTES + 1, now + 1)))


def _minute(at: int, counts: Mapping[str, float]) -> Minute:
    # The names are those of metrics, which stands above us.
    waits = sum(value for name, value in counts.items() if name.startswith("wait_le_"))
    waited = counts.get("wait_sum", 0.0) / waits if waits else None
    began = datetime.fromtimestamp(at * 60, UTC)
    return Minute(began, round(counts.get("done", 0.0)), round(counts.get("failed", 0.0)), waited)
