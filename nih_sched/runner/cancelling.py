"""Rows that are cancelled once they have begun.

One that runs: seen by its worker, or under a stock worker by its horse's keeper. One that waits behind others of its
batch: seen by its horse, before its turn.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import clock, host, telemetry
from nih_sched.dialects.base import reason
from nih_sched.errors import NihError
from nih_sched.model import Claim, Ended, Outcome, StartedRow, Trail
from nih_sched.runner.hand import share_hand
from nih_sched.runner.outcomes import WITHDRAWN, report
from nih_sched.runner.perform import CANCELLED, INTERRUPT
from nih_sched.runner.site import Site
from nih_sched.store import Attempts, Desk
from nih_sched.store.cancels import Cancels

AFTER = 1.0  # seconds that a row must have run before it is looked at: short ones never are
EVERY = 1.0  # seconds between looks at its word: with KILL_AFTER and the ticks, 5 must do under load too
TICK = 0.2  # seconds between a keeper's looks at the hand
KILL_AFTER = 2.5  # seconds from asking a horse to leave its row, a command has 2, to killing it
SOME = 20  # rows that are looked at together at least
FRESH = 0.4  # seconds for which rows that wait count as wanted: those of a short batch are never looked at


class Waiting:
    """Rows that have begun together, in their horse, which runs them one after the other.

    Args:
        desk: the source's.
        rows: in their order.
        since: when they began, or before, by clock.monotonic().
        ask: the number of the ask at which their worker has begun them, and looks after them; 0: it hasn't.
    """

    def __init__(self, desk: Desk, rows: Sequence[StartedRow], since: float, ask: int = 0) -> None:
        self._desk = desk
        self.rows = rows
        self._ask = ask
        self._looked = since
        self._first, self._end = 0, len(rows)  # of those looked at: all have just begun
        self._unwanted: set[int] = set()

    def withdrawn(self, number: int) -> Ended | None:
        """How the row with this number ends without having run, if its owner has cancelled or deleted it."""
        now = clock.monotonic()
        if self._ask and now - self._looked >= FRESH and not self._unwanted:
            self._looked = max(self._looked, share_hand().wanted_at(self._ask))
        if now - self._looked >= FRESH or number >= self._end:
            # Those alone whose turn may come before the next look.
            self._first, self._end = number, number + 2 * (number - self._first) + SOME
            # With the database away its owner can't have done so either, and its outcome can wait.
            with contextlib.suppress(SQLAlchemyError):
                some = self.rows[number : self._end]
                self._unwanted = Cancels(self._desk).unwanted([row.claim for row in some])
            self._looked = clock.monotonic()
        claim = self.rows[number].claim
        if claim.id not in self._unwanted:
            return None
        return Ended(claim, Outcome.CANCELLED, reason=WITHDRAWN, seconds=0.0, at=clock.boot())


class Watch:
    """Of one worker's or one horse's rows in hand."""

    def __init__(self) -> None:
        self._claim, self._since = 0, 0.0
        self._known: tuple[Claim, str] | None = None
        self._next = 0.0
        self._asked = 0.0  # when the horse was asked to leave the row; 0.0: it wasn't
        self._may_not = False  # the cancelled word says nothing here

    @property
    def cancelled(self) -> tuple[Claim, str] | None:
        """The row that its horse was asked to leave, and the run that guards it."""
        return self._known if self._asked else None

    def is_due(self, claim: int) -> bool:
        """Whether to look now, with this claim in hand."""
        now = clock.monotonic()
        if claim != self._claim:
            self._claim, self._since, self._known, self._asked = claim, now, None, 0.0
            self._next = now + AFTER
        return claim != 0 and now >= self._next and not self._may_not

    def look(self, desk: Desk, horse: int) -> bool:
        """Look at the row's word; ask its horse to leave it if it is the cancelled one.

        Args:
            desk: the source's.
            horse: its pid.

        Returns:
            whether the horse was asked long ago and still has the row: it must be killed.
        """
        now, hand = clock.monotonic(), share_hand()
        if self._asked:
            return now - self._asked >= KILL_AFTER and hand.claim == self._claim
        self._next = now + EVERY
        cancels = Cancels(desk)
        self._may_not = not cancels.can_be
        self._known = self._known or (None if self._may_not else cancels.running(self._claim))
        if self._known is None or not cancels.is_cancelled(self._known[0]):
            return False
        with hand.held_back(AFTER) as had:
            if not had or hand.close() != self._claim:
                return False  # it has come out of it
            hand.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.kill(horse, INTERRUPT)
        self._asked = self._next = clock.monotonic()
        return False


def keepers_watch(site: Site, source: str, horse: int) -> Callable[[threading.Event], None]:
    """What a stock worker's horse has its keeper do: look whether its row is cancelled, and have it stopped.

    Args:
        site: the horse's.
        source: whose rows it runs.
        horse: its pid.
    """
    share_hand()  # made before the fork, so that both have it
    born = host.born(horse)

    def go(over: threading.Event) -> None:
        watch = Watch()
        while not over.wait(TICK):
            if not watch.is_due(share_hand().claim):
                continue
            try:
                site.forked()
                desk = site.known_desk(source) or site.desk_for(source, patience=0.0)
                if desk is not None and watch.look(desk, horse):
                    _end(site, desk, watch, (horse, born))
            except (SQLAlchemyError, NihError) as error:
                telemetry.emit("job_failed", source=source, reason=reason(error))
                over.wait(EVERY)

    return go


def _end(site: Site, desk: Desk, watch: Watch, horse: tuple[int, int | None]) -> None:
    found = watch.cancelled
    if found is None or site.slot is None:
        return
    host.end_all([site.slot.lease], [horse])
    trail = Trail(share_hand().tail.text())
    ended = Ended(found[0], Outcome.CANCELLED, reason=f"{CANCELLED}; it had to be killed", trail=trail)
    by = site.worker or f"{socket.gethostname()}-{horse[0]}"
    (fate,) = Attempts(desk, found[1], by).finish([ended])
    report(ended, fate)
