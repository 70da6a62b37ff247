"""A job's claims in its horse, begun portion by portion: the next one by its worker, while this one runs."""

from __future__ import annotations

from collections.abc import Sequence

from nih_sched import clock, telemetry
from nih_sched.keeper import vouched_until
from nih_sched.model import StartedRow
from nih_sched.runner.ahead import Ask
from nih_sched.runner.cancelling import Waiting
from nih_sched.runner.hand import share_hand
from nih_sched.runner.outcomes import MANY
from nih_sched.runner.site import Site
from nih_sched.store import Attempts, Desk, Hold
from nih_sched.store.records import LeaseLost


class Starts:
    """One run's.

    Args:
        site: the process's.
        desk: the source's.
        attempts: the run.
        hold: the horse's on its lease.
        claim_ids: the job's claims.
    """

    def __init__(self, site: Site, desk: Desk, attempts: Attempts, hold: Hold | None, claim_ids: Sequence[int]) -> None:
        self._site = site
        self._desk = desk
        self._attempts = attempts
        self._hold = hold
        self._portion = site.portion(desk)
        self._asked: list[int] = []  # what the worker begins
        self._asked_at = 0.0
        self._asks = 0
        self._given: tuple[int, float] | None = None  # how many rows were given last, and when
        self.waiting = list(dict.fromkeys(claim_ids))  # those after what was asked for
        self.have_begun = False  # whether any have

    def begin(self) -> Waiting | None:
        """Have the next portion begin, which may be of no row; None when there is none any more."""
        now = clock.monotonic()
        if self._given:
            self._portion.timed(self._given[0], now - self._given[1])
        asked, self._asked = self._asked, []
        if asked:
            rows = share_hand().ahead.collect()
            if rows is not None:
                return self._note(Waiting(self._desk, rows, self._asked_at, self._asks))
            self._portion.asks &= not share_hand().ahead.has_failed
            return self._note(Waiting(self._desk, self._start(asked), now))
        if self.waiting:
            return self._note(Waiting(self._desk, self._start(self._next(self._portion.lead(len(self.waiting)))), now))
        return None

    def _note(self, begun: Waiting) -> Waiting:
        self._given = len(begun.rows), clock.monotonic()
        self.have_begun = self.have_begun or bool(begun.rows)
        return begun

    def go_ahead(self, begun: Waiting) -> None:
        """Before these run: have what follows begin meanwhile, where that is worth it."""
        self._portion.note(begun.rows)
        if len(begun.rows) >= MANY:
            telemetry.emit("started_together", count=len(begun.rows))
        if self._site.is_watched and self._portion.is_worth_asking(len(self.waiting)):
            self._asked, self._asked_at = self._next(self._portion.size), clock.monotonic()
            self._asks += 1
            share_hand().ahead.ask(Ask(self._asks, self._attempts.run, self._desk.facts, self._asked))

    def begun_in_vain(self) -> Sequence[StartedRow]:
        """At an early end: what the worker has begun, or may have begun unheard; the rest is in `waiting`."""
        asked, self._asked = self._asked, []
        rows = share_hand().ahead.collect() if asked else []
        if rows is None:
            rows = self._start(asked) if share_hand().ahead.has_failed else []
        self.waiting = [*asked, *self.waiting]
        return rows

    def _next(self, count: int) -> list[int]:
        some, self.waiting = self.waiting[:count], self.waiting[count:]
        return some

    def _start(self, claim_ids: Sequence[int]) -> list[StartedRow]:
        site, hold, sent = self._site, self._hold, clock.boot()
        try:
            rows = self._attempts.start(claim_ids, site.handler.columns)
        except LeaseLost:
            if site.slot:
                site.slot.lose()  # the worker takes a new one
            raise
        if hold and site.slot:
            site.slot.mount(hold.horse, hold.horse_born or 0, vouched_until(sent, hold.seconds))
        return rows
