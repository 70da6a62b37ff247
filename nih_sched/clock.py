"""Time: UTC instants, and waits that a signal can end."""

from __future__ import annotations

import contextlib
import os
import re
import select
import threading
import time
from datetime import UTC, datetime

_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # macOS's MONOTONIC counts sleep


def now() -> datetime:
    """The present instant by this machine's clock, timezone-aware, in UTC."""
    return datetime.now(UTC)


def monotonic() -> float:
    """Seconds on a clock that never jumps; only differences mean anything."""
    return time.monotonic()


def boot() -> float:
    """Seconds since this machine was started, those included for which it slept; no change of the date moves it."""
    return time.clock_gettime(_BOOT)


_PERIOD = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|min|h|d|w|)")
_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def period(text: str) -> float:
    """A time that a person has typed, 90, 45s, 10m, 2h, 30d or 1w, in seconds.

    Raises:
        ValueError: it is none.
    """
    found = _PERIOD.fullmatch(text.strip().lower())
    if found is None or len(found[1]) > 9:  # databases run out of dates
        raise ValueError(f"{text!r} is no length of time: expected 90s, 30m, 1h or 2d, say")
    return float(found[1]) * _UNITS[found[2]]


class Bell:
    """A wait that anyone, a signal handler included, can end.

    Python runs signal handlers in the main thread between bytecodes, and a lock's acquire() lets them in. No Event: its
    own lock may be held by the very wait that a handler interrupts, and then its set() waits for ever.
    """

    def __init__(self) -> None:
        self._rung = False
        self._gate = threading.Lock()  # closed until the bell is rung
        self._gate.acquire()
        self._line: int | None = None

    def ring(self) -> None:
        """End the present wait, and every later one."""
        self._rung = True
        self._open()
        if self._line is not None:
            with contextlib.suppress(OSError):
                os.write(self._line, b"!")

    def write_to(self, line: int | None) -> None:
        """Have ring() write a byte to this file descriptor too, for who waits with select(); None: no more."""
        self._line = line
        if line is not None and self.rung:
            self.ring()

    @property
    def rung(self) -> bool:
        """Whether ring() was called."""
        return self._rung

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether the bell was rung."""
        if self._gate.acquire(timeout=max(0.0, seconds)):
            self._open()  # for every later wait
        return self._rung

    def _open(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is open already
            self._gate.release()


class Nudge:
    """A wait that signal handlers end; they may take no lock."""

    def __init__(self) -> None:
        self._heard, self._said = os.pipe()
        os.set_blocking(self._heard, False)
        os.set_blocking(self._said, False)

    def give(self) -> None:
        """End the present wait, or the next one."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._said, b"!")

    def wait(self, seconds: float) -> None:
        """Wait up to so many seconds."""
        if select.select([self._heard], [], [], seconds)[0]:
            os.read(self._heard, 4096)

    def close(self) -> None:
        """It isn't needed any more."""
        os.close(self._heard)
        os.close(self._said)
