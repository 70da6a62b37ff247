"""What the handlers counted, see work/bench_work.py."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import servers

_SLOT = struct.Struct("@qqqq")
TAIL = 64 * 1024  # a row is looked for in the newest stamps only
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
    def env(self) -> Mapping[str, str]:
        """For the processes that run handlers."""
        return {
            "BENCH_COUNTS": str(self.folder),
            "BENCH_STAMPS": str(self.folder.with_suffix(".stamps")),
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

    def stamp_of(self, row: int) -> int | None:
        """When this row's handler first began, if it has."""
        path = self.folder.with_suffix(".stamps")
        if not path.exists():
            return None
        start = max(0, path.stat().st_size - TAIL)
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read() if start else b"\n" + file.read()
        found = re.search(rf"\n{row} (\d+)\n".encode(), lines)
        return int(found[1]) if found else None
