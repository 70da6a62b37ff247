"""A chart of the last hour, as the server draws it: bars for done and failed, a line for the time that rows waited."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from nih_sched.reports import Hour, Minute

WIDTH, HEIGHT = 600.0, 120.0
TOP = 0.9  # of the height is the longest wait's: a line on the edge would be cut


@dataclass(frozen=True)
class Bar:
    """A minute, in the picture's units from its upper left corner."""

    x: float
    width: float
    done_y: float
    done_height: float
    failed_y: float
    failed_height: float
    label: str


@dataclass(frozen=True)
class Chart:
    """The picture, and what it shows in words."""

    bars: tuple[Bar, ...]
    waits: tuple[str, ...]  # points of polylines: one for minutes that follow each other
    most: int  # rows a minute
    longest: float  # seconds
    minutes: tuple[Minute, ...]  # those in which anything happened, newest first
    began: datetime  # UTC, its left edge
    width: float = WIDTH
    height: float = HEIGHT


def draw(hour: Hour) -> Chart:
    """The chart of an hour."""
    minutes = hour.minutes
    most = max((one.done + one.failed for one in minutes), default=0)
    longest = max((one.waited or 0.0 for one in minutes), default=0.0)
    step = WIDTH / max(1, len(minutes))
    bars, lines, last = [], list[list[str]](), -2
    for number, one in enumerate(minutes):
        done = HEIGHT * one.done / most if most else 0.0
        failed = HEIGHT * one.failed / most if most else 0.0
        label = f"{one.at:%H:%M} UTC: {one.done:,} done, {one.failed:,} failed"
        bars.append(Bar(number * step, step * 0.8, HEIGHT - done, done, HEIGHT - done - failed, failed, label))
        if one.waited is not None and longest:
            if number != last + 1:
                lines.append([])
            last, y = number, HEIGHT - TOP * HEIGHT * one.waited / longest
            lines[-1] += [
                f"{number * step + share * step:.1f},{y:.1f}" for share in (0.0, 0.8)
            ]  # seen where it is alone
    told = tuple(one for one in reversed(minutes) if one.done or one.failed)
    return Chart(tuple(bars), tuple(map(" ".join, lines)), most, longest, told, minutes[0].at)
