"""A job's claims in its horse, begun portion by portion: the next one by its worker, while this one runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nih_sched import clock, telemetry
from nih_sched.keeper import vouched_until
from nih_sched.model import StartedRow
from nih_sched.runner.ahead import Ask
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
        self.since = 0.0  # when those that were given last began, or before
        self.waiting = list(dict.fromkeys(claim_ids))  # those after that

    def __iter__(self) -> Iterator[list[StartedRow]]:
        """Rows that have begun: those of a portion, which may be none."""
        while self._asked or self.waiting:
            rows = self.ahead() if self._asked else self._start(self._next(self._portion.lead(len(self.waiting))))
            if self._site.is_watched and self._portion.is_worth_asking(len(self.waiting)):
                self._asked, self._asked_at = self._next(self._portion.size), clock.monotonic()
                share_hand().ahead.ask(Ask(self._attempts.run, self._desk.facts, self._asked))
            self._portion.note(rows)
            if len(rows) >= MANY:
                telemetry.emit("started_together", count=len(rows))
            began = clock.monotonic()
            yield rows
            self._portion.timed(len(rows), clock.monotonic() - began)

    def ahead(self) -> list[StartedRow]:
        """Those that were asked for, begun; none if none were."""
        asked, self._asked = self._asked, []
        if not asked:
            return []
        if (rows := share_hand().ahead.collect()) is None:
            self._portion.asks &= not share_hand().ahead.has_failed
            return self._start(asked)
        self.since = self._asked_at
        return rows

    def _next(self, count: int) -> list[int]:
        some, self.waiting = self.waiting[:count], self.waiting[count:]
        return some

    def _start(self, claim_ids: Sequence[int]) -> list[StartedRow]:
        site, hold, sent = self._site, self._hold, clock.boot()
        self.since = clock.monotonic()
        try:
            rows = self._attempts.start(claim_ids, site.handler.columns)
        except LeaseLost:
            if site.slot:
                site.slot.lose()  # the worker takes a new one
            raise
        if hold and site.slot:
            site.slot.mount(hold.horse, hold.horse_born or 0, vouched_until(sent, hold.seconds))
        return rows
