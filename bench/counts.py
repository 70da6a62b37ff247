"""What the handlers counted, see work/bench_work.py."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import servers

_SLOT = struct.Struct("@qqqq")
WORK = Path(__file__).with_name("work")


@dataclass(frozen=True)
class Runs:
    """Of all processes together; times by CLOCK_MONOTONIC."""

    runs: int
    first_ns: int
    last_ns: int
    inside: float  # seconds inside of handlers

    @property
    def span(self) -> float:
        """Seconds from the first run's start to the last one's end."""
        return (self.last_ns - self.first_ns) / 1e9


@dataclass(frozen=True)
class Counts:
    """A place where one system's handlers count."""

    folder: Path = field(default_factory=lambda: servers.folder("counts"))
    spin: bool = False

    @property
    def stamps(self) -> str:
        """The file in which handlers say when they begin."""
        return str(self.folder.with_suffix(".stamps"))

    @property
    def env(self) -> Mapping[str, str]:
        """For the processes that run handlers."""
        return {
            "BENCH_COUNTS": str(self.folder),
            "BENCH_STAMPS": self.stamps,
            "BENCH_SPIN": "1" if self.spin else "0",
            "PYTHONPATH": str(WORK),
        }

    def read(self) -> Runs:
        """The sum so far."""
        slots = [_SLOT.unpack(raw) for path in self.folder.iterdir() if len(raw := path.read_bytes()) == _SLOT.size]
        slots = [slot for slot in slots if slot[0]]
        if not slots:
            return Runs(0, 0, 0, 0.0)
        return Runs(
            sum(slot[0] for slot in slots),
            min(slot[1] for slot in slots),
            max(slot[2] for slot in slots),
            sum(slot[3] for slot in slots) / 1e9,
        )
