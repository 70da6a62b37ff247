"""What an event counts for: the names of what is added up by the minute. Pure; who counts where is others' matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

BOUNDS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, float("inf"))  # seconds
SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, float("inf"))  # rows of a batch
COUNTERS = (
    *("claimed", "done", "failed", "retried", "rescued", "stale", "interrupted", "cancelled"),
    *("database_errors", "redis_errors"),
)
HISTOGRAMS = {"run": BOUNDS, "wait": BOUNDS, "batch": SIZES}
NAMES = (
    *COUNTERS,
    *(f"{name}_sum" for name in HISTOGRAMS),
    *(f"{name}_le_{bound:g}" for name, bounds in HISTOGRAMS.items() for bound in bounds),
)

Counted = Iterable[tuple[str, float]]


def observed(name: str, value: float, times: float = 1) -> list[tuple[str, float]]:
    """What a histogram counts when it sees this value so many times."""
    bound = next(bound for bound in HISTOGRAMS[name] if value <= bound)
    return [(f"{name}_le_{bound:g}", times), (f"{name}_sum", value * times)]


def _ended(name: str) -> Callable[[dict[str, Any]], Counted]:
    return lambda facts: [(name, 1), *observed("run", facts["seconds"] or 0.0)]


def _together(facts: dict[str, Any]) -> Counted:
    # Rows of a batch are told of by one event: each counts with their mean.
    return [("done", facts["count"]), *observed("run", facts["seconds"] / facts["count"], facts["count"])]


EVENTS: dict[str, Callable[[dict[str, Any]], Counted]] = {
    "claimed": lambda facts: [("claimed", facts["count"])],
    "started": lambda facts: observed("batch", 1),
    "started_together": lambda facts: observed("batch", facts["count"]),
    "done": _ended("done"),
    "done_together": _together,
    "failed": _ended("failed"),
    "retrying": _ended("retried"),
    "cancelled_running": _ended("cancelled"),
    "interrupted": lambda facts: [("interrupted", 1)],
    "rescued": lambda facts: [("rescued", 1)],
    "stale": lambda facts: [("stale", 1)],
    "database_lost": lambda facts: [("database_errors", 1)],
    "redis_lost": lambda facts: [("redis_errors", 1)],
}


class Memory:
    """A subscriber that keeps what events count for, in a process that shares no pipe with others."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Keep what an event counts for."""
        for name, value in EVENTS[event](facts) if event in EVENTS else ():
            self._values[name] = self._values.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """What was counted since it was last asked for."""
        values, self._values = self._values, {}
        return values
