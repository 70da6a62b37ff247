"""How a source does: what `scheduler status` and the overview page show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from nih_sched.dialects import address
from nih_sched.model import Outcome, State, decode_key, show_key
from nih_sched.reports import words
from nih_sched.reports.servers import RedisSeen, look
from nih_sched.store import Desk, Leases, Looks
from nih_sched.store.history import History, utc
from nih_sched.store.looks import FINAL_FAILURES
from nih_sched.store.overview import NAMED, Count, Counts, Ended, LeaderSeen, Overview, Running, Waiting, percentile
from nih_sched.store.pauses import Pause, Pauses

RATE_OVER = 60.0  # seconds
FAILURES = 10  # newest ones shown
READY_SECONDS = 0.1  # for which ready rows are counted


@dataclass(frozen=True)
class StateCount:
    """Rows of one word."""

    states: tuple[str, ...]  # what the word means; nothing for a word that isn't ours
    word: Any
    count: Count


@dataclass(frozen=True)
class Spread:
    """Times of the newest attempts, in seconds."""

    p50: float | None
    p95: float | None
    of: int  # how many attempts that is told from

    @property
    def sentence(self) -> str:
        """In words."""
        if self.p50 is None or self.p95 is None:
            return "nothing has run yet"
        return f"{words.duration(self.p50)} (p50), {words.duration(self.p95)} (p95), of the newest {self.of:,}"


@dataclass(frozen=True)
class WorkerSeen:
    """A worker that is presumed alive, or that RQ knows."""

    name: str
    host: str
    pid: int | None
    runs: tuple[Running, ...]

    @property
    def sentence(self) -> str:
        """What it does."""
        if not self.runs:
            return "idle"
        shown = [f"row {show_key(one.key)} for {words.duration(one.seconds)}" for one in self.runs]
        return f"runs {words.listed(shown, 3)}"


@dataclass(frozen=True)
class FailureSeen:
    """A row that failed for good."""

    key: str
    row: str  # the same, whole
    attempts: int
    outcome: str
    reason: str
    at: datetime | None


@dataclass(frozen=True)
class Status:
    """All of it."""

    at: datetime
    database: str
    table: str
    source: str
    states: tuple[StateCount, ...]
    ready: Count  # ready rows that --where doesn't leave out
    oldest_key: str | None
    oldest_age: float | None  # seconds; None: unknown
    done_rate: float  # a second
    failed_rate: float
    retries: Waiting
    claimed: int  # by a producer, and not begun
    run: Spread
    waited: Spread
    workers: tuple[WorkerSeen, ...]
    redis: RedisSeen
    redis_lost_at: datetime | None
    leader: LeaderSeen | None
    pauses: tuple[Pause, ...]
    failures: tuple[FailureSeen, ...]
    failures_among: int | None  # if there may be more: of the newest so many records of the ledger alone
    unclaimed: int | None  # rows that seem to be on their way with no open claim behind them; None: not looked for

    @property
    def pause(self) -> Pause | None:
        """The source's own."""
        return next((pause for pause in self.pauses if pause.source == self.source), None)

    def facts(self) -> list[tuple[str, str]]:
        """Beside the counts, what there is to say: a name and a sentence each."""
        known = [("paused", pause_words(pause, self.at)) for pause in self.pauses]
        known += [
            ("rate", f"{self.done_rate:.3g} rows/s done, {self.failed_rate:.3g} failed, over the last minute"),
            ("oldest ready row", self._oldest()),
            ("retries waiting", self._retries()),
            ("claimed", f"{self.claimed:,} rows are claimed and haven't begun"),
            ("run time", self.run.sentence),
            ("waiting time", f"{self.waited.sentence}, from claim to start" if self.waited.of else "unknown"),
            ("Redis", self._redis()),
            ("database", f"reachable, {self.database}"),
            ("leader", leader_words(self.leader)),
        ]
        if self.failures_among is not None:
            older = "for older ones: scheduler list --state failed --newest"
            known.append(("failed rows", f"looked for in the newest {self.failures_among:,} attempts; {older}"))
        return known

    def _oldest(self) -> str:
        if self.oldest_key is None:
            return "none"
        if self.oldest_age is None:
            return f"{self.oldest_key}; its age is unknown without --created-column"
        return f"{self.oldest_key}, {words.duration(self.oldest_age)} old"

    def _retries(self) -> str:
        if not self.retries.count or self.retries.next_in is None:
            return "none"
        late = self.retries.next_in < 0
        when = f"overdue for {words.duration(-self.retries.next_in)}" if late else "in "
        return f"{self.retries.count:,}, the next one {when}{'' if late else words.duration(self.retries.next_in)}"

    def _redis(self) -> str:
        since = f", since {words.instant(self.redis_lost_at, self.at)}" if self.redis_lost_at else ""
        return self.redis.sentence + ("" if self.redis.answers else since)

    def as_json(self) -> dict[str, Any]:
        """These facts for a program; instants in ISO 8601, times in seconds."""
        return {
            "at": self.at.isoformat(),
            "database": self.database,
            "table": self.table,
            "source": self.source,
            "states": [{"states": list(one.states), "word": one.word, **vars(one.count)} for one in self.states],
            "ready": vars(self.ready),
            "oldest_ready": {"key": self.oldest_key, "age": self.oldest_age},
            "rate": {"done": self.done_rate, "failed": self.failed_rate},
            "retries": {"waiting": self.retries.count, "next_in": self.retries.next_in},
            "claimed": self.claimed,
            "run_time": {"p50": self.run.p50, "p95": self.run.p95, "of": self.run.of},
            "waiting_time": {"p50": self.waited.p50, "p95": self.waited.p95, "of": self.waited.of},
            "workers": [
                {
                    "name": worker.name,
                    "host": worker.host,
                    "pid": worker.pid,
                    "runs": [
                        {"key": show_key(one.key), "attempt": one.attempt, "seconds": one.seconds}
                        for one in worker.runs
                    ],
                }
                for worker in self.workers
            ],
            "redis": {**self.redis.as_json(), "lost_at": self.redis_lost_at and self.redis_lost_at.isoformat()},
            "leader": None if self.leader is None else vars(self.leader),
            "pauses": [
                {"source": pause.source, "since": utc_iso(pause.at), "by": pause.by, "reason": pause.reason}
                for pause in self.pauses
            ],
            "failures": [{**vars(failure), "at": failure.at and failure.at.isoformat()} for failure in self.failures],
            "failures_among": self.failures_among,
            "unclaimed": self.unclaimed,
        }


def status(desk: Desk, redis_url: str | None, *, created: str | None = None) -> Status:
    """Look at a source; takes less than half a second, whatever the table's size.

    Args:
        desk: the source's.
        redis_url: where Redis is; None: nowhere known.
        created: the column that says when a row was added.
    """
    overview = Overview(desk)
    # What takes longest, while we ask the rest.
    counting = desk.beside(overview.by_word)
    counting_ready = desk.beside(partial(overview.ready, seconds=READY_SECONDS))
    running, claimed, retries = overview.running(), overview.claimed(), overview.retries()
    begun = len(running) if len(running) < NAMED else overview.begun()
    first = overview.first_ready(created)
    samples, now = overview.ended(), History(desk).now()
    redis, (failures, among) = look(redis_url, desk.source.name), _failures(desk)
    redis_lost_at, leader, pauses = overview.redis_lost_at(), overview.leader(), tuple(Pauses(desk).all())
    workers = _workers(desk, running, redis)
    done, failed = _rates(samples)
    counts, ready = counting(), counting_ready()
    if not desk.rows.conditions:
        word = desk.rows.words[State.READY]
        if ready.more and (counts.whole or counts.about):
            ready = Count(max(ready.rows, counts.by_word.get(word, 0)), about=counts.about)
        elif counts.about:
            counts = counts.beside(word, ready.rows)
    on_their_way = {desk.rows.words[state] for state in (State.QUEUED, State.STARTED, State.RETRYING)}
    extra = sum(counts.by_word.get(word, 0) for word in on_their_way) - begun - claimed - retries.count
    known = {desk.rows.words[State.STARTED]: begun}
    if desk.rows.words[State.QUEUED] == desk.rows.words[State.RETRYING]:  # else it is the row that tells which it has
        known[desk.rows.words[State.QUEUED]] = claimed + retries.count
    return Status(
        at=now,
        database=address(desk.engine.url),
        table=desk.rows.name,
        source=desk.source.name,
        states=_states(desk, counts, known, ready),
        ready=ready,
        oldest_key=None if first is None else show_key(first[0]),
        oldest_age=None if first is None else first[1],
        done_rate=done,
        failed_rate=failed,
        retries=retries,
        claimed=claimed,
        run=_spread([one.seconds for one in samples if one.seconds is not None]),
        waited=_spread([one.waited for one in samples if one.waited is not None]),
        workers=workers,
        redis=redis,
        redis_lost_at=redis_lost_at,
        leader=leader,
        pauses=pauses,
        failures=failures,
        failures_among=among,
        unclaimed=None if counts.about else max(0, extra),
    )


def leader_words(leader: LeaderSeen | None) -> str:
    """Who leads."""
    if leader is None or not leader.holds:
        return "none at this moment; an idle producer leads nothing"
    return f"producer {leader.name}, pid {leader.pid} on {leader.host}"


def pause_words(pause: Pause, now: datetime) -> str:
    """Who paused what, since when, and why."""
    since = words.instant(datetime.fromisoformat(utc_iso(pause.at)), now)
    why = f": {words.first_line(pause.reason)}" if pause.reason else ""
    return f"source {pause.source} is paused by {words.first_line(pause.by)} since {since}{why}"


def utc_iso(instant: datetime) -> str:
    """An instant of the database's, in UTC."""
    text: str = utc(instant).isoformat()
    return text


def _states(desk: Desk, counts: Counts, known: dict[Any, int], ready: Count) -> tuple[StateCount, ...]:
    """Rows by word; where not all could be counted, at least so many as are known of otherwise."""
    by_word: dict[Any, list[State]] = {}
    for state in State:
        by_word.setdefault(desk.rows.words[state], []).append(state)
    left = dict(counts.by_word)
    shown = []
    for word, states in by_word.items():
        count = _count(counts, left.pop(word, 0), known.get(word, 0))
        all_ready = not ready.more and not desk.rows.conditions
        if State.READY in states and not counts.whole and (all_ready or ready.rows >= count.rows):
            count = ready
        shown.append(StateCount(tuple(state.value for state in states), word, count))
    return (*shown, *(StateCount((), word, _count(counts, count, 0)) for word, count in left.items()))


def _count(counts: Counts, rows: int, known: int) -> Count:
    if counts.whole:
        return Count(rows)
    if counts.about and (rows > known or not known):
        return Count(int(float(f"{rows:.3g}")), about=True)  # more digits would say nothing
    return Count(max(rows, known), more=True)


def _rates(samples: Sequence[Ended]) -> tuple[float, float]:
    lately = [one for one in samples if one.age <= RATE_OVER]
    if not lately:
        return 0.0, 0.0
    span = RATE_OVER
    if len(lately) == len(samples):  # there may have been more: the sample doesn't reach back so far
        span = max(0.001, *(one.age for one in lately))
    if len(lately) < 50:
        span = RATE_OVER  # too few to tell a rate from a moment
    done = sum(one.outcome == Outcome.DONE.value for one in lately)
    return done / span, sum(one.outcome in FINAL_FAILURES for one in lately) / span


def _spread(values: Sequence[float]) -> Spread:
    return Spread(percentile(values, 0.5), percentile(values, 0.95), len(values))


def _workers(desk: Desk, running: Sequence[Running], redis: RedisSeen) -> tuple[WorkerSeen, ...]:
    by_worker: dict[str, list[Running]] = {}
    for one in running:
        by_worker.setdefault(one.worker, []).append(one)
    known: dict[str, WorkerSeen] = {}
    for lease in Leases(desk.engine, desk.ledger).all():
        if lease.died is None:
            host = lease.host.partition(" ")[0]
            known[lease.worker] = WorkerSeen(lease.worker, host, lease.pid, tuple(by_worker.get(lease.worker, ())))
    for name in (*redis.workers, *by_worker):
        known.setdefault(name, WorkerSeen(name, "", None, tuple(by_worker.get(name, ()))))
    return tuple(sorted(known.values(), key=lambda worker: worker.name))


def _failures(desk: Desk) -> tuple[tuple[FailureSeen, ...], int | None]:
    found, among = Looks(desk).last_failures(FAILURES)
    shown = tuple(
        FailureSeen(
            words.first_line(show_key(decode_key(row.row_key))),
            show_key(decode_key(row.row_key)),
            row.attempt,
            row.outcome,
            words.first_line(row.reason),
            utc(row.finished_at),
        )
        for row in found
    )
    return shown, among
