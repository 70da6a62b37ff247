"""Counting events: each process of a tree writes what happened into one pipe, and one of them adds it up.

A write to a pipe takes a microsecond and never waits: what doesn't fit is lost to the metrics, and to them alone.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import telemetry
from nih_sched.counts import EVENTS, NAMES, observed
from nih_sched.errors import NihError
from nih_sched.store import Desk
from nih_sched.store.horizon import Horizon
from nih_sched.store.tally import Tally

EVERY = 5.0  # seconds between additions to the database
PATIENCE = 2.0  # seconds for which the last addition may take
NUMBERS = {name: number for number, name in enumerate(NAMES)}
RECORD = struct.Struct("<Bd")  # which name, and how much
READ = RECORD.size * 4096


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


Theirs = Callable[[], Mapping[str, float]]


class _Adding:
    """Adds up in the database what was counted, now and then."""

    def __init__(self, counting: Counting, desk: Desk, theirs: Theirs) -> None:
        self._counting = counting
        self._theirs = theirs
        self._tally = Tally(desk)
        self._horizon = Horizon(desk)
        self._left: dict[str, float] = {}
        self._seen = 0  # the newest claim whose waiting time was looked at
        self._over = threading.Event()

    def add(self) -> None:
        """Add up what there is; what the database doesn't take stays for the next time."""
        for name, value in (*self._counting.take().items(), *self._theirs().items()):
            self._left[name] = self._left.get(name, 0.0) + value
        with contextlib.suppress(SQLAlchemyError, NihError):
            if self._left:
                self._add()
                self._horizon.moved()
            self._horizon.note()

    def _add(self) -> None:
        self._seen, waits = self._tally.waits(self._seen)
        for name, value in (one for wait in waits for one in observed("wait", wait)):
            self._left[name] = self._left.get(name, 0.0) + value
        self._tally.add(self._left)
        self._left = {}

    def go(self) -> None:
        """Add up until told to stop, and once more then."""
        while not self._over.wait(EVERY):
            self.add()
        self.add()

    def stop(self) -> None:
        """Tell go() to end."""
        self._over.set()


@contextlib.contextmanager
def adding_up(counting: Counting, desk: Desk, theirs: Theirs = dict) -> Iterator[None]:
    """Add up meanwhile, and once at the end, what was counted; in a thread, so that nothing waits for it.

    Args:
        counting: what this process, and those that it shares a pipe with, count into.
        desk: the source's.
        theirs: gives what processes have counted that share nothing with this one, each time what is new.
    """
    adding = _Adding(counting, desk, theirs)
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
