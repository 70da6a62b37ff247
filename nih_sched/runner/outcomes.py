"""The outcomes of a job's rows: told to the worker at once, written down in groups, and shown to RQ at the end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from nih_sched import broker, clock, telemetry
from nih_sched.dialects.base import reason
from nih_sched.errors import AttemptFailed
from nih_sched.model import DONE, Ended, Fate, Outcome, State, decide, show_key
from nih_sched.runner.hand import Hand
from nih_sched.runner.site import Site
from nih_sched.store import Attempts, Desk, Retries

GROUP, BULK = 0.03, 5000  # seconds after which a horse writes so many bytes itself: 200 rows, too many for its worker
SLACK = 0.3  # seconds after which a horse writes an outcome itself; its worker should have done so long since
HEAVY = 500_000  # bytes of outcomes that are written at once: databases have a limit for one statement
MANY = 10  # rows in one job from which on they are told of together, not each with a line of its own
NAMED = 20  # failed rows that RQ's failed registry is told of
WITHDRAWN = "its owner cancelled or deleted the row before its turn in its batch"
REFUSED = 76  # a horse's exit code: the ledger refuses an outcome, which the worker has been told


class Outcomes:
    """Those of one run.

    Args:
        site: the process's.
        desk: the source's.
        attempts: the run.
        hand: shared with the worker, which writes for us while rows run.
        rows: how many the job has.
    """

    def __init__(self, site: Site, desk: Desk, attempts: Attempts, hand: Hand, rows: int) -> None:
        self._site = site
        self._desk = desk
        self._attempts = attempts
        self._hand = hand
        self._many = rows >= MANY
        self._alone = rows == 1
        # Without a worker of ours nobody could write for us while rows run: each at once, then.
        self._slack = SLACK if site.is_watched else 0.0
        self._pending: list[Ended] = []
        self._since = 0.0
        self._written = 0  # by the worker, as was seen last
        self._ends: list[tuple[Ended, Fate]] = []
        self.counts: Counter[str] = Counter()

    def add(self, ended: Ended) -> None:
        """A row has ended."""
        while not (told := self._hand.tell(ended)):
            self.write()
        now = clock.monotonic()
        if not self._pending:
            self._since = now
        self._pending.append(ended)
        if now - self._since >= self._slack and (written := self._hand.written) > self._written:
            self._since, self._written = now, written  # the worker is at it
        waited = now - self._since
        if waited >= self._slack or told > HEAVY or (waited >= GROUP and told - self._hand.written >= BULK):
            self.write()

    def write(self) -> None:
        """Write down what isn't yet."""
        with self._hand.writing():
            # The worker may have written the first ones.
            first = len(self._pending) - len(self._hand.unwritten()) if self._hand.written else 0
            done, rest = self._pending[:first], self._pending[first:]
            self._pending, self._written = [], 0
            self._ends += [(one, decide(one, self._desk.source)) for one in done if one.outcome is not DONE]
            if rest:
                fates = self._write(rest)
                report_all(rest, fates, together=self._many)
                follows = zip(rest, fates, strict=True)
                self._ends += [(one, fate) for one, fate in follows if fate is not None and one.outcome is not DONE]
            self._hand.forget()
        simply = DONE.value
        self.counts.update([simply if one.outcome is DONE else one.outcome.value for one in (*done, *rest)])

    def _write(self, ended: Sequence[Ended]) -> list[Fate | None]:
        try:
            return self._attempts.finish(ended)
        except DBAPIError as error:
            telemetry.emit("outcome_refused", key=show_key(ended[0].claim.key), reason=reason(error))
            if not self._site.is_watched:
                raise  # nobody to keep it: the lease ends with us, and the row is interrupted
            self._site.flush()
            os._exit(REFUSED)  # our worker keeps what it was told, and goes on trying while other rows run

    def settle(self) -> None:
        """Have RQ show what the ledger says, once a job's rows have ended.

        Raises:
            AttemptFailed: RQ's Retry schedules the next attempt of a job's only row, or RQ's failed registry takes
                the job.
        """
        failed: list[str] = []
        again: list[tuple[Ended, Fate]] = []
        for ended, fate in self._ends:
            words = f"claim {ended.claim.id}, attempt {ended.claim.attempt}: {ended.outcome.value}"
            if fate.state is State.FAILED:
                failed.append(words)
            elif fate.claim_goes_on and ended.outcome is not Outcome.INTERRUPTED:
                if self._alone and ended.outcome is not Outcome.POSTPONED:
                    raise AttemptFailed(words)
                again.append((ended, fate))
        if again:
            send_alone(self._desk, again)
        if failed:
            broker.spend_retries()  # a handler that raised Fail may have some left
            more = [f"and {len(failed) - NAMED} more"] if len(failed) > NAMED else []
            raise AttemptFailed("; ".join([*failed[:NAMED], *more]))


def send_alone(desk: Desk, ends: Sequence[tuple[Ended, Fate]], queue: broker.Queue | None = None) -> None:
    """Have each claim that goes on wait in RQ's scheduled registry, as a job of its own.

    What is postponed spends no try, which RQ's own Retry would; and a row of a batch must not take others with it.
    """
    queue = queue or broker.current_queue()
    if queue is None:
        return
    later = {ended.claim.id: (ended, fate, broker.new_rq_id()) for ended, fate in ends}
    carried = Retries(desk).carry({claim_id: rq_id for claim_id, (_, _, rq_id) in later.items()})
    sends = [
        (broker.job_for(desk.source, [ended.claim._replace(failures=fate.failures)], rq_id), fate.delay or 0.0)
        for claim_id, (ended, fate, rq_id) in later.items()
        if claim_id in carried
    ]
    broker.send_later(queue, sends)


def report_all(ends: Sequence[Ended], fates: Sequence[Fate | None], *, together: bool) -> None:
    """Say how attempts ended; `together`, those that are simply done are told of by one line."""
    for ended, fate in zip(ends, fates, strict=True):
        if not (together and ended.outcome is DONE):
            report(ended, fate)
    simple = [ended.seconds for ended in ends if ended.outcome is DONE]
    if together and simple:
        telemetry.emit("done_together", count=len(simple), seconds=sum(simple))


def report(ended: Ended, fate: Fate | None) -> None:
    """Say how an attempt ended, and what follows; nothing where a newer word stands against it."""
    if fate is None:
        return
    facts = {
        "key": show_key(ended.claim.key),
        "attempt": ended.claim.attempt,
        "outcome": ended.outcome.value,
        "seconds": ended.seconds,
        "reason": _short(ended.reason),
        "claim_id": ended.claim.id,
    }
    if fate.state is State.DONE:
        telemetry.emit("done", **facts)
    elif ended.outcome is Outcome.INTERRUPTED:
        telemetry.emit("interrupted", **facts)
    elif ended.reason == WITHDRAWN:
        telemetry.emit("withdrawn", **facts)
    elif ended.outcome is Outcome.CANCELLED:
        telemetry.emit("cancelled_running", **facts)
    elif fate.claim_goes_on:
        telemetry.emit("retrying", delay=fate.delay, **facts)
    else:
        telemetry.emit("failed", **facts)


def _short(text: str | None) -> str:
    line = (text or "").strip()
    return line if len(line) <= 300 else f"{line[:300]}…"
