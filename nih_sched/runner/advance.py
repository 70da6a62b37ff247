"""In the worker: the rows that it begins for its horse, while that runs those before them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from nih_sched import clock, host
from nih_sched.model import Claim, StartedRow
from nih_sched.runner.hand import share_hand
from nih_sched.runner.site import Site
from nih_sched.store import Attempts, Desk, Hold
from nih_sched.store.cancels import Cancels

LOOK_EVERY = 0.25  # seconds between looks whether they are still wanted; a horse looks itself after 0.4
BRIEFLY = 0.5  # seconds for which a database that is away is tried while the horse may be waiting for us


class Advance:
    """One job's.

    Args:
        site: the worker's.
        claim_ids: the job's claims.
    """

    def __init__(self, site: Site, claim_ids: Sequence[int]) -> None:
        self._site = site
        self._claim_ids = claim_ids
        self._given: list[Claim] = []  # in the order in which the horse runs them
        self._before = 0  # how many of the job come before those, at most
        self._next_look = 0.0

    @property
    def is_asked(self) -> bool:
        """Whether the horse has asked for rows."""
        return share_hand().ahead.is_asked

    @property
    def is_due(self) -> bool:
        """Whether to look at those that wait."""
        return bool(self._given) and clock.monotonic() >= self._next_look

    def begin(self, desk: Desk, horse: int) -> dict[int, tuple[Claim, str]]:
        """Begin what the horse has asked for. Whatever is in the way, the horse meets it itself.

        Args:
            desk: the source's.
            horse: its pid.

        Returns:
            by its id, each claim that has begun, and the run that guards it.
        """
        slot, ahead = self._site.slot, share_hand().ahead
        if slot is None or (ask := ahead.accept()) is None:
            return {}
        rows: list[StartedRow] | None = None
        with contextlib.suppress(Exception):  # the horse meets it itself, and says so
            if ask.facts == desk.facts:
                hold = Hold(slot.lease, self._site.settings.lease, horse, host.born(horse))
                attempts = Attempts(desk, ask.run, self._site.worker, hold)
                rows = attempts.start_together(ask.claim_ids, self._site.handler.columns, patience=BRIEFLY)
        if rows is None:
            self._given, self._next_look = [], float("inf")  # how far the horse has come among them isn't known now
        elif not self._given:
            self._before = list(self._claim_ids).index(ask.claim_ids[0])
            self._next_look = clock.monotonic() + LOOK_EVERY
        ahead.give(rows)
        given = [row.claim for row in rows or ()]
        self._given += given
        return {claim.id: (claim, ask.run) for claim in given}

    def look(self, desk: Desk) -> None:
        """See whether an owner has cancelled or deleted some of those that wait; then their horse looks itself."""
        now = clock.monotonic()
        self._next_look = now + LOOK_EVERY
        waiting = self._given[max(0, share_hand().taken - self._before) :]
        if waiting and not Cancels(desk).unwanted(waiting):
            share_hand().note_wanted(now)
