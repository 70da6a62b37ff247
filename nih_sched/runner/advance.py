"""In the worker: the rows that it begins for its horse, while that runs those before them."""

from __future__ import annotations

import contextlib

from nih_sched import clock, host
from nih_sched.model import Claim, StartedRow
from nih_sched.runner.ahead import BRIEFLY
from nih_sched.runner.hand import share_hand
from nih_sched.runner.site import Site
from nih_sched.store import Attempts, Desk, Hold
from nih_sched.store.cancels import Cancels

LOOK_EVERY = 0.25  # seconds between looks whether they are still wanted; a horse looks itself after 0.4


class Advance:
    """One job's.

    Args:
        site: the worker's.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._given: list[Claim] = []  # last, in the order in which the horse runs them
        self._places: dict[int, int] = {}  # by claim, its place among those
        self._ask = 0  # its number
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
        self._given = [row.claim for row in rows or ()]
        begun = {claim.id: (claim, ask.run) for claim in self._given}
        if not ahead.give(rows):  # its horse looks after them
            self._given = []
        self._places = {claim.id: place for place, claim in enumerate(self._given)}
        self._ask, self._next_look = ask.number, clock.monotonic() + LOOK_EVERY
        return begun

    def look(self, desk: Desk) -> None:
        """See whether an owner has cancelled or deleted some of those that wait; then their horse looks itself."""
        now = clock.monotonic()
        self._next_look = now + LOOK_EVERY
        # Those before the row in hand have run.
        waiting = self._given[self._places.get(share_hand().claim, 0) :]
        if not Cancels(desk).unwanted(waiting):
            share_hand().note_wanted(self._ask, now)
