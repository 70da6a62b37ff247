"""Counting events: each process of a tree writes what happened into one pipe, and one of them adds it up.

A write to a pipe takes a microsecond and never waits: what doesn't fit is lost to the metrics, and to them alone.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import telemetry
from nih_sched.errors import NihError
from nih_sched.store import Desk
from nih_sched.store.horizon import Horizon
from nih_sched.store.tally import Tally

EVERY = 5.0  # seconds between additions to the database
PATIENCE = 2.0  # seconds for which the last addition may take
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
NUMBERS = {name: number for number, name in enumerate(NAMES)}
RECORD = struct.Struct("<Bd")  # which name, and how much
READ = RECORD.size * 4096

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


class Counting:
    """A subscriber that writes into a pipe; made before the processes that share it are forked."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Write down what an event counts for."""
        count = EVENTS.get(event)
        if count is None:
            return
        with contextlib.suppress(OSError):  # full, or closed by user code: a chart's loss, not the row's
            os.write(self._in, b"".join(RECORD.pack(NUMBERS[name], value) for name, value in count(facts)))

    def take(self) -> dict[str, float]:
        """What was counted since it was last asked for."""
        found: dict[str, float] = {}
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out, READ):
                for number, value in RECORD.iter_unpack(data):
                    found[NAMES[number]] = found.get(NAMES[number], 0.0) + value
        return found

    def close(self) -> None:
        """Count no more, and close the pipe: its number may be another file's soon."""
        telemetry.unsubscribe(self)
        os.close(self._out)
        os.close(self._in)


class _Adding:
    """Adds up in the database what was counted, now and then."""

    def __init__(self, counting: Counting, desk: Desk) -> None:
        self._counting = counting
        self._tally = Tally(desk)
        self._horizon = Horizon(desk)
        self._left: dict[str, float] = {}
        self._seen = 0  # the newest claim whose waiting time was looked at
        self._over = threading.Event()

    def add(self) -> None:
        """Add up what there is; what the database doesn't take stays for the next time."""
        for name, value in self._counting.take().items():
            self._left[name] = self._left.get(name, 0.0) + value
        if not self._left:
            return
        with contextlib.suppress(SQLAlchemyError, NihError):
            self._seen, waits = self._tally.waits(self._seen)
            for name, value in (one for wait in waits for one in observed("wait", wait)):
                self._left[name] = self._left.get(name, 0.0) + value
            self._tally.add(self._left)
            self._left = {}
            self._horizon.note()

    def go(self) -> None:
        """Add up until told to stop, and once more then."""
        while not self._over.wait(EVERY):
            self.add()
        self.add()

    def stop(self) -> None:
        """Tell go() to end."""
        self._over.set()


@contextlib.contextmanager
def adding_up(counting: Counting, desk: Desk) -> Iterator[None]:
    """Add up meanwhile, and once at the end, what was counted; in a thread, so that nothing waits for it.

    Args:
        counting: what this process, and those that it shares a pipe with, count into.
        desk: the source's.
    """
    adding = _Adding(counting, desk)
    thread = threading.Thread(target=adding.go, daemon=True, name="nih-sched-counts")
    thread.start()
    try:
        yield
    finally:
        adding.stop()
        thread.join(PATIENCE)


def count_here() -> Counting:
    """Count the events of this process and of those forked from it."""
    counting = Counting()
    telemetry.subscribe(counting)
    return counting
