"""When a producer ticks, and when it only looks: at once where somebody tells of a row, seldom where nothing moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nih_sched import clock
from nih_sched.settings import Settings
from nih_sched.store import Looks, Seen
from nih_sched.wake import Sign, Wake

FULL_WAIT = 0.05  # seconds between ticks while the queue is full
BUSY_WAIT = 0.02  # seconds between ticks while there is more to claim
QUIET = 0.012  # seconds after a tick for which signs wait, so that many rows that come one by one make one tick
STIRRED = 0.014  # seconds for which they wait at most while rows move, or lately did
GLANCE = 0.007  # seconds between looks for a new row alone, while rows keep coming and nothing tells of them
SHARE = 0.02  # or, if that is longer, this share of the time since one was there
OPEN_WAIT = 0.1  # seconds between ticks while claims of ours are open
LOCKED_WAIT = 0.5  # seconds at most between looks at a ready row that can't be claimed just now
TOLD_WAIT = 5.0  # seconds between looks at an idle table of whose new rows we are told
LATELY = 5.0  # seconds after the last claim's end in which another row is likely
LEDGER_WAIT = 5.0  # seconds between looks for what other producers and workers have on its way


@dataclass(frozen=True)
class Tick:
    """What one tick did."""

    claimed: int
    sent: int
    room: int


class Pace:
    """One producer's.

    Args:
        settings: how often an idle table is looked at, and whether an end is awaited.
        looks: the source's.
        by_time: whether a row may become ready without a change of any, as --where may have it.
    """

    def __init__(self, settings: Settings, looks: Looks, *, by_time: bool) -> None:
        self._settings = settings
        self._looks = looks
        self._by_time = by_time
        self._counts_down = settings.burst or settings.max_rows is not None
        self.moving = True  # whether claims are queued or run, as far as we know
        self.other_pause = False  # whether the last look has found the source paused, or no longer, against our belief
        self._has_room = False  # whether the last tick left any
        self._next_tick = self._next_table = self._brisk_until = 0.0
        # For how many seconds a sign may wait, so that many make one look, and until when that is.
        self._quiet = self._quiet_until = 0.0

    def poll(self, *, told: bool) -> float:
        """Seconds between looks at an idle table; `told`, where new rows are told of."""
        poll = self._settings.poll_interval
        return max(poll, TOLD_WAIT) if told and not self._by_time else poll

    def after(self, tick: Tick, poll: float, *, may_be_over: bool) -> float:
        """Seconds until the next tick, or look, is worth its cost, after this one.

        Args:
            tick: what it did.
            poll: seconds between looks at an idle table.
            may_be_over: whether an end is near that no sign will tell of.
        """
        self._be_quiet(QUIET)
        self._has_room = tick.claimed < tick.room
        if tick.claimed >= tick.room:  # or there is no room: what else is to do will be seen when there is
            self.moving = True
            return BUSY_WAIT if tick.claimed else FULL_WAIT
        if tick.claimed:
            self.moving, self._next_table = True, clock.monotonic() + poll
            return min(poll, OPEN_WAIT)
        seen = self._looks.around(rows=True)
        if seen.ready:  # and yet not claimed: its owner has it locked, say, and nobody will tell when it is free
            poll = min(self._settings.poll_interval, LOCKED_WAIT)
        self._next_table = clock.monotonic() + poll
        waits = self._counts_down and seen.due is not None
        self.moving = bool(tick.sent) or seen.moving or may_be_over or waits
        return min(poll, OPEN_WAIT if self.moving else LEDGER_WAIT, _until(seen))

    def ticked(self, pause: float) -> None:
        """Tick again after so many seconds."""
        self._next_tick = clock.monotonic() + pause

    def is_worth_a_tick(self, sign: Sign, poll: float, *, paused: bool) -> bool:
        """Whether there is something to claim or to send: asked in one statement, where nobody has said so.

        Args:
            sign: what ended the wait.
            poll: as of after().
            paused: whether the source is, as we believe.
        """
        now = clock.monotonic()
        due = now >= self._next_tick
        self.other_pause = False
        if sign is Sign.RING or (due and (self.moving or self._counts_down)):
            return True
        if not due and sign is not Sign.CHANGE:
            return self._looks.ready_up_to(1) > 0
        rows = sign is Sign.CHANGE or now >= self._next_table - 0.001
        seen = self._looks.around(rows=rows)
        self.other_pause = seen.paused != paused
        # A pause: nobody's claims may show it, but it is said, and what was claimed goes back.
        if self.other_pause or seen.ready or (seen.moving and not self.moving) or seen.due == 0.0:
            return True
        # Perhaps a commit of our own workers, or of nobody of ours: the more of them, the longer the next one waits.
        longest = STIRRED if now < self._brisk_until else OPEN_WAIT
        self._be_quiet(min(2 * max(self._quiet, BUSY_WAIT), longest) if sign is Sign.CHANGE else 0.0)
        if rows:
            self._next_table = now + poll
        if not self.moving:
            self._next_tick = now + min(self._next_table - now, LEDGER_WAIT, _until(seen))
        return False

    def wait(self, wake: Wake) -> Sign:
        """Wait until the next tick or glance may be due, or for a sign."""
        now = clock.monotonic()
        if self.moving:
            self._brisk_until = now + LATELY
        brisk = now < self._brisk_until
        # Where nothing tells of new rows and some have come lately, another one is looked for in between.
        pause = self._next_tick - now
        if brisk and self._has_room and not wake.hears_database:
            pause = min(pause, max(GLANCE, SHARE * (now + LATELY - self._brisk_until)))
        return wake.wait(pause, self._quiet_until - now, brisk=brisk)

    def _be_quiet(self, seconds: float) -> None:
        self._quiet, self._quiet_until = seconds, clock.monotonic() + seconds


def _until(seen: Seen) -> float:
    """Seconds until the next retry is due; one that is overdue, because RQ still has it, is looked at anew."""
    if seen.due is None:
        return math.inf
    return seen.due or BUSY_WAIT
