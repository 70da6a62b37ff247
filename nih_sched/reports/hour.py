"""The last hour in minutes, as far back as the newest attempts of the ledger tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from nih_sched.model import Outcome
from nih_sched.store import Desk
from nih_sched.store.history import History
from nih_sched.store.looks import FINAL_FAILURES
from nih_sched.store.overview import SAMPLE, Overview, Sample

MINUTES = 60


@dataclass(frozen=True)
class Minute:
    """One minute of a source."""

    at: datetime  # UTC, its begin
    done: int
    failed: int
    waited: float | None  # seconds from claim to start, on average


@dataclass(frozen=True)
class Hour:
    """The minutes, oldest first."""

    minutes: tuple[Minute, ...]
    told_of: int  # attempts
    since: datetime | None  # what ended before isn't told; None: all of the hour is


def hour(desk: Desk) -> Hour:
    """The source's last hour."""
    samples, now = Overview(desk).samples(), History(desk).now()
    last = now.replace(second=0, microsecond=0)
    minutes = [last - timedelta(minutes=back) for back in reversed(range(MINUTES))]
    by_minute: dict[datetime, list[Sample]] = {}
    for one in samples:
        by_minute.setdefault(one.finished_at.replace(second=0, microsecond=0), []).append(one)
    oldest = min((one.finished_at for one in samples), default=now)
    reaches = len(samples) < SAMPLE or oldest <= minutes[0]
    told = tuple(_minute(at, by_minute.get(at, ())) for at in minutes)
    return Hour(told, sum(one.done + one.failed for one in told), None if reaches else oldest)


def _minute(at: datetime, samples: Sequence[Sample]) -> Minute:
    waits = [one.waited for one in samples if one.waited is not None]
    done = sum(one.outcome == Outcome.DONE.value for one in samples)
    failed = sum(one.outcome in FINAL_FAILURES for one in samples)
    return Minute(at, done, failed, sum(waits) / len(waits) if waits else None)
