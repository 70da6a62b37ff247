"""In the worker, for its horse: what the horse can't do while user code runs, or since it has died."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from nih_sched import broker, clock, telemetry
from nih_sched.errors import NihError
from nih_sched.model import Claim, Ended, Outcome, Trail
from nih_sched.runner.advance import Advance
from nih_sched.runner.ahead import BRIEFLY
from nih_sched.runner.cancelling import Watch
from nih_sched.runner.hand import Hand, share_hand
from nih_sched.runner.outcomes import MANY, report, report_all, send_alone
from nih_sched.runner.site import Site
from nih_sched.store import Attempts, Claims, Desk, Retries
from nih_sched.store.desk import FOREVER
from nih_sched.store.marks import note_unserved
from nih_sched.store.running import running

LONG = 1.0  # seconds after which a row gives those behind it in its batch back
LONGEST = 4.0  # seconds of rows after which a job gives the rest back: twice as many as it was made for
PACE = 0.1  # seconds after which we write what the horse has told: a commit costs as much as ten rows


@dataclass(frozen=True)
class Unwritten:
    """An outcome that the ledger refuses."""

    source: str
    run: str
    ended: Ended


class Steward:
    """Looks after one job's rows while its horse runs them: writes how they ended, gives back what waits too long.

    Args:
        site: the worker's.
        source: the job's source.
        claim_ids: the job's claims.
    """

    def __init__(self, site: Site, source: str, claim_ids: Sequence[int]) -> None:
        self._site = site
        self._source = source
        self._claim_ids = claim_ids
        self._many = len(claim_ids) >= MANY
        self._claim = 0
        self._since = 0.0
        self._first = math.inf  # when the first row was in hand
        self._not_before = 0.0
        self._closed = False
        self._behind_since: float | None = None
        self._told = 0
        self._desk: Desk | None = None
        self._begun: dict[int, tuple[Claim, str]] = {}  # what began under this job
        self._advance = Advance(site)
        self._watch = Watch()

    @property
    def _hand(self) -> Hand:
        return share_hand()  # a new horse has a new one

    @property
    def has_cancelled(self) -> bool:
        """Whether the row in hand was cancelled, and its horse asked to leave it."""
        return self._watch.cancelled is not None

    def look(self, horse: int) -> bool:
        """Called some fifty times a second, with the horse's pid; whether to kill it, since its row is cancelled."""
        now, claim = clock.monotonic(), self._hand.claim
        if claim != self._claim:
            self._claim, self._since = claim, now
            self._first = min(self._first, now)
        before, self._told = self._told, self._hand.told
        if not self._hand.is_behind:
            self._behind_since = None
        elif self._behind_since is None or self._told < before:  # less: its horse has written what was there
            self._behind_since = now
        # What was told just now may have company yet: more rows for the same commit, or the rest of a short job, and
        # then its horse writes it.
        writes = self._behind_since is not None and now - self._behind_since >= PACE
        overdue = now - self._since >= LONG or now - self._first >= LONGEST
        closes = claim != 0 and overdue and not self._closed
        watches, looks = self._watch.is_due(claim), self._advance.is_due
        begins = self._advance.is_asked and not self._closed
        if now < self._not_before or not (writes or closes or watches or begins or looks):
            return False
        try:
            self._desk = self._desk or self._site.desk_for(self._source, patience=BRIEFLY)
            if self._desk is not None:
                if begins:
                    self._begun |= self._advance.begin(self._desk, horse)
                if writes:
                    self._behind_since = None
                    self._write(self._desk)
                if closes:
                    self._give_rest_back(self._desk)
                if looks:
                    self._advance.look(self._desk)
                if watches:
                    return self._watch.look(self._desk, horse)
        except (SQLAlchemyError, NihError):
            self._not_before = clock.monotonic() + LONG
        return False

    def leave(self) -> None:
        """At the job's end: the next horse may be forked now, which must not inherit a connection."""
        self._site.close()

    def _write(self, desk: Desk) -> None:
        with self._hand.writing(BRIEFLY) as had:
            if not had:  # its horse writes, or waits for the database
                self._not_before = clock.monotonic() + LONG
            texts = self._hand.unwritten() if had else []
            if not texts:
                return
            if not all(Ended.claim_told(text) in self._begun for text in texts):
                self._begun = _begun(self._site, desk, self._claim_ids, patience=BRIEFLY)
            for run, ends in _told(texts, self._begun).items():
                fates = Attempts(desk, run, self._site.worker).finish(ends, patience=BRIEFLY)
                report_all(ends, fates, together=self._many)
            self._hand.note_written(texts)

    def _give_rest_back(self, desk: Desk) -> None:
        with self._hand.held_back(BRIEFLY) as had:
            if not had or self._hand.close() != self._claim:
                return  # it has come out of it: then it sees that it is to stop, and does this itself
            ran = {self._claim, *(Ended.claim_told(text) for text in self._hand.unwritten())}
        self._closed = True
        # Briefly: while we wait for a lock of their owner's, nobody looks after the row in hand. Its horse, which gets
        # no further one, gives back what is left.
        begun = _begun(self._site, desk, self._claim_ids, patience=BRIEFLY)
        _take_back(self._site, desk, {i: one for i, one in begun.items() if i not in ran}, patience=BRIEFLY)
        Claims(desk, "", 0).give_back([i for i in self._claim_ids if i not in ran], patience=BRIEFLY)


def crashed(
    site: Site, source: str, claim_ids: Sequence[int], rq_id: str, queue: broker.Queue, *, outcome: Outcome, how: str
) -> list[Unwritten]:
    """End what a horse that died had in hand, which it can't do any more; write what it had told.

    Args:
        site: the worker's.
        source: the job's source.
        claim_ids: the job's claims.
        rq_id: the job's id.
        queue: where it came from.
        outcome: crashed; interrupted if the worker stopped the horse, which spends no try; timed out if it had to.
        how: the horse's end in words.

    Returns:
        outcomes that the horse had reached, and the ledger refuses.
    """
    desk = site.desk_for(source)
    if desk is None:
        return []
    hand, begun = share_hand(), _begun(site, desk, claim_ids)
    unwritten: list[Unwritten] = []
    for run, ends in _told(hand.unwritten(), begun).items():
        for ended in ends:
            begun.pop(ended.claim.id)
            try:
                (fate,) = Attempts(desk, run, site.worker).finish([ended])
                report(ended, fate)
            except DBAPIError:
                unwritten.append(Unwritten(source, run, ended))
    alone = len(claim_ids) == 1
    deaths: list[tuple[Ended, str]] = []
    if hand.claim in begun:
        claim, run = begun.pop(hand.claim)
        deaths = [(Ended(claim, outcome, reason=how, trail=Trail(hand.tail.text())), run)]
    elif not hand.taken:  # it died of what it read, perhaps: then so may the next
        ending = outcome if alone else Outcome.INTERRUPTED
        deaths = [(Ended(claim, ending, reason=how), run) for claim, run in begun.values()]
        begun = {}
    for ended, run in deaths:
        (fate,) = Attempts(desk, run, site.worker).finish([ended])
        report(ended, fate)
        if fate is not None and fate.claim_goes_on and ended.outcome is not Outcome.INTERRUPTED and not alone:
            with contextlib.suppress(*broker.OUTAGES):  # only to be seen there: the producer sends it when it is due
                send_alone(desk, [(ended, fate)], queue)
    _take_back(site, desk, begun)
    if not alone:
        Claims(desk, "", 0).give_back(claim_ids)
    Retries(desk).put_off(claim_ids, 0.0, rq_id)
    return unwritten


def _begun(
    site: Site, desk: Desk, claim_ids: Sequence[int], patience: float | None = None
) -> dict[int, tuple[Claim, str]]:
    found = running(desk, claim_ids, site.worker, patience=patience)
    return {claim.id: (claim, run) for claim, run in found}


def _told(texts: Sequence[bytes], begun: dict[int, tuple[Claim, str]]) -> dict[str, list[Ended]]:
    """By run, the outcomes that aren't written; one that the horse was just writing isn't running any more."""
    ends: dict[str, list[Ended]] = {}
    for text in texts:
        if found := begun.get(Ended.claim_told(text)):
            claim, run = found
            ends.setdefault(run, []).append(Ended.from_told(text, claim))
    return ends


def _take_back(site: Site, desk: Desk, begun: dict[int, tuple[Claim, str]], patience: float = FOREVER) -> None:
    for run in {run for _, run in begun.values()}:
        claims = [claim for claim, its_run in begun.values() if its_run == run]
        Attempts(desk, run, site.worker).take_back(claims, patience=patience)


def write_again(site: Site, unwritten: Unwritten) -> bool:
    """Try to write a refused outcome; whether it is written, or void, now."""
    desk = site.desk_for(unwritten.source)
    if desk is None:
        return True
    try:
        (fate,) = Attempts(desk, unwritten.run, site.worker).finish([unwritten.ended], patience=0.0)
    except DBAPIError:
        return False
    report(unwritten.ended, fate)
    return True


def give_back(site: Site, source: str, claim_ids: Sequence[int]) -> None:
    """Give claims that haven't begun back: this worker stops, or doesn't serve their source."""
    desk = site.desk_for(source)
    if desk is None:
        return
    if not site.serves(desk.source.name):
        telemetry.emit("unserved", count=len(claim_ids), source=desk.source.name)
        note_unserved(desk, len(claim_ids))
    Claims(desk, "", 0).give_back(claim_ids)
