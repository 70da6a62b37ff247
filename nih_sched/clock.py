"""Time: UTC instants, and waits that a signal can end."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime


def now() -> datetime:
    """The present instant by this machine's clock, timezone-aware, in UTC."""
    return datetime.now(UTC)


def monotonic() -> float:
    """Seconds on a clock that never jumps; only differences mean anything."""
    return time.monotonic()


def boot() -> float:
    """Seconds since this machine was started, those included for which it slept; no change of the date moves it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))  # macOS's MONOTONIC counts sleep


class Bell:
    """A wait that anyone, a signal handler included, can end.

    Python runs signal handlers in the main thread between bytecodes, and Event.wait lets them in.
    """

    def __init__(self) -> None:
        self._rung = threading.Event()

    def ring(self) -> None:
        """End the present wait, and every later one."""
        self._rung.set()

    @property
    def rung(self) -> bool:
        """Whether ring() was called."""
        return self._rung.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether the bell was rung."""
        return self._rung.wait(max(0.0, seconds))
