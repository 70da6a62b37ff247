"""How instants, durations and texts are said: the same in commands and pages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from nih_sched.telemetry import one_line

FIRST_LINE = 200  # characters of a reason that a sentence or a list shows


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min, 4 d 3 h; tenths only where they matter."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, below, least in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= unit:
            rest = whole % unit // least
            return f"{whole // unit} {name} {rest} {below}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"


def instant(at: datetime, now: datetime) -> str:
    """14:02:11 UTC; with the date where it isn't today's."""
    return f"{at:%H:%M:%S} UTC" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def first_line(text: str | None, longest: int = FIRST_LINE) -> str:
    """The first line of a text that came from a row, made safe for a terminal, and not too long."""
    line = next((line for line in (text or "").strip().splitlines() if line.strip()), "")
    shown = one_line(line[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


def listed(names: Sequence[str], most: int = 5) -> str:
    """a, b and 3 more."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def size(bytes_: float) -> str:
    """12.3 MB."""
    for unit in ("B", "KB", "MB"):
        if bytes_ < 1024:
            return f"{bytes_:.0f} B" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.1f} GB"
