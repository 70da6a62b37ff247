"""What processes use, as the kernel counts it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Usage:
    """Of some processes together."""

    cpu: float  # seconds; with those of children that have ended and been waited for
    pss: float  # MB: each shared page divided among those that share it; 0 where the system doesn't say
    count: int


def of(processes: Iterable[psutil.Process]) -> Usage:
    """The usage of these processes; those that have just ended count in their parents."""
    cpu = pss = 0.0
    count = 0
    for process in processes:
        with suppress(psutil.Error, OSError):
            times = process.cpu_times()
            cpu += times.user + times.system
            cpu += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            pss += pss_of(process.pid)
            count += 1
    return Usage(cpu, pss, count)


def cpu_of(pids: Iterable[int]) -> float:
    """CPU seconds of these processes and all their descendants, also of those that have ended meanwhile."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    total += times.user + times.system
                    total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def pss_of(pid: int) -> float:
    """MB, by /proc/PID/smaps_rollup."""
    with suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 1024
    return 0.0


def load() -> str:
    """The machine's load of the last minute, and its cores."""
    return f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
