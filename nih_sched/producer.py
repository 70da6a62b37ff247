"""tick: room -> claim -> enqueue, and what waits for a retry is sent when it is due."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from typing import Protocol

from redis import Redis
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from nih_sched import broker, clock, telemetry
from nih_sched.batches import Batches, rq_ids
from nih_sched.dialects import address
from nih_sched.dialects.base import reason
from nih_sched.errors import ClaimRefused, DatabaseRefused, NihError
from nih_sched.model import Claim, State
from nih_sched.pace import Pace, Tick
from nih_sched.settings import Settings
from nih_sched.store import Claims, Desk, Due, Looks, Retries
from nih_sched.store.claims import TAKEN
from nih_sched.store.desk import register
from nih_sched.store.marks import note_redis
from nih_sched.store.pauses import Pauses
from nih_sched.wake import Sign, Wake

COUNT_EVERY = 1.0  # seconds between counts of workers
PUT_OFF = 10  # ticks in a row that only claim, while new rows keep coming in ones and twos
UNCARRIED_AFTER = 2.5  # seconds overdue after which a retry is sent anew though RQ still seems to be at it
DUE_AT_ONCE = 500
PAUSE_EVERY = 1.0  # seconds between looks whether the source is paused
OUTAGE_WAIT = 1.0  # seconds between looks while Redis or the database is away


class Rescuer(Protocol):
    """Who looks after what was lost; its methods keep their own time, and may be called at any."""

    def tick(self) -> None:
        """Called while claims are queued or run."""

    def rest(self) -> None:
        """Called while none is."""

    def doubt_redis(self) -> None:
        """Called when Redis is back."""


class Producer:
    """One of any number of producers of a source; the database decides between them."""

    def __init__(self, settings: Settings, desk: Desk, connection: Redis) -> None:
        self._settings = settings
        self._desk = desk
        self._queue = broker.queue_of(connection, desk.source.name)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._claims = Claims(desk, self.name, settings.tries)
        self._retries = Retries(desk)
        self._batches = Batches(Looks(desk), settings.batch_size)
        self.looks = Looks(desk)
        self._left = settings.max_rows
        self._away: set[str] = set()  # which of database and Redis we have said to be lost
        self._began, self._first = self.looks.now(), self.looks.first_to_end()
        self._hears_redis = False
        # What --where asks may come true without a change of any row.
        self._pace = Pace(settings, self.looks, by_time=bool(desk.rows.conditions))
        self._workers, self._next_count = 0, 0.0
        self._put_off = 0  # for so many ticks in a row new rows have been all that we looked after
        self._paused, self._next_pause = False, 0.0
        register(desk)
        note_redis(desk, away=False)  # one that ended while it was may have left the mark

    def tick(self) -> Tick:
        """Claim and enqueue as many ready rows as there is room for, then send what is due.

        Raises:
            ClaimRefused: the database won't have a row in its queued state; nothing was claimed.
        """
        if (self._paused or not self._next_pause) and self._is_paused():
            return Tick(0, 0, 1)
        workers = max(self._settings.max_concurrent_jobs, self._workers)
        # While nothing moves and Redis is heard, nothing waits there: a new row is spared the question.
        asks = self._pace.moving or self._away or not self._hears_redis
        size, waiting = self._batches.size_for(workers), broker.waiting(self._queue) if asks else 0
        hungry = max(0, workers - waiting)
        # A job for each who is hungry, or one more for each: those are sent before the next ones are claimed.
        room = min((workers * self._batches.ahead - waiting) * size, max((hungry or workers) * size, TAKEN))
        if self._left is not None:
            room = min(room, self._left)
        claimed = self._claim(room, size, max(1, hungry)) if room > 0 else 0
        self._batches.note_claim(claimed, room, size, workers, self._settings.max_concurrent_jobs)
        # What has waited for seconds can wait for a new row, and until that has started: the cores are busy with it.
        if 0 < claimed < room and self._put_off < PUT_OFF:
            self._put_off += 1
            return Tick(claimed, 0, room)
        self._put_off = 0
        if self._is_paused():  # after the claim, which a new row waits for: no start heeds it later than the pause
            return Tick(claimed, 0, 1)
        sent = self._send_due()
        self._count_workers()
        self._batches.look()
        return Tick(claimed, sent, room)

    def pause_after(self, tick: Tick, poll: float) -> float:
        """Seconds until the next tick, or look, is worth its cost.

        Args:
            tick: what the last one did.
            poll: seconds between looks at an idle table.
        """
        # The last row may have ended since is_over() asked: no sign of that will come, and any other puts a tick off.
        may_be_over = self._settings.burst or (self._left is not None and self._left <= 0)
        return self._pace.after(tick, poll, may_be_over=may_be_over)

    def is_over(self, tick: Tick) -> bool:
        """Whether --burst or --max-rows has reached its end."""
        if self._left is not None and self._left <= 0:
            return not self.looks.open_claims_up_to(1, self.name)
        if not self._settings.burst or tick.claimed or tick.sent or tick.room <= 0:
            return False
        return not self.looks.open_claims_up_to(1) and not self.looks.ready_up_to(1)

    def ended(self) -> dict[str, int]:
        """How many claims ended since this producer began, by outcome; under --max-rows only its own."""
        return self.looks.ended_since(self._began, self.name if self._left is not None else None, self._first)

    def stop(self) -> None:
        """Give back what was claimed and not begun, and take its jobs out of the queue."""
        self._withdraw(self._claims.give_back())

    def _withdraw(self, void: list[str]) -> None:
        if void:
            telemetry.emit("given_back", count=len(void))
            with contextlib.suppress(*broker.OUTAGES):  # left there, the jobs are refused by their tokens
                broker.patiently(lambda: broker.withdraw(self._queue, void))

    def _is_paused(self) -> bool:
        """Whether the source is paused; then what anybody has claimed meanwhile is given back."""
        due = clock.monotonic() >= self._next_pause
        if due or self._paused:
            pause = Pauses(self._desk).of(self._desk.source.name)
            if (pause is not None) != self._paused:
                by, why = (pause.by, pause.reason or "no reason given") if pause else ("", "")
                telemetry.emit("heeds_pause" if pause else "goes_on", source=self._desk.source.name, by=by, reason=why)
            self._paused = pause is not None
        if due:
            self._next_pause = clock.monotonic() + PAUSE_EVERY
            if self._paused:
                self._withdraw(self._claims.give_all_back())
        return self._paused

    def loop(self, wake: Wake, rescuer: Rescuer) -> dict[str, int] | None:
        """Tick until told to stop (None) or until the end of --burst or --max-rows (the outcomes' counts).

        Args:
            wake: ends our waits when it is time to stop, or when there may be a new row.
            rescuer: called before each tick, and at each look.
        """
        sign, pace = Sign.RING, self._pace
        while not wake.stopped:
            try:
                poll = pace.poll(told=wake.live)
                if pace.is_worth_a_tick(sign, poll, paused=self._paused):
                    if pace.other_pause:
                        self._next_pause = 0.0
                    self._hears_redis = wake.hears_redis
                    tick = self.tick()
                    if self.is_over(tick):
                        return self.ended()
                    pace.ticked(self.pause_after(tick, poll))
                # After that: a row that has just come goes first.
                if pace.moving:
                    rescuer.tick()
                elif sign is not Sign.RING:
                    rescuer.rest()
                wake.tend()
            except broker.OUTAGES as error:
                self._lost("redis", str(error))
                sign = Sign.RING  # so that a whole tick shows that it is back
                wake.rest(OUTAGE_WAIT)
                continue
            except SQLAlchemyError as error:
                if not self._desk.dialect.is_transient(error):
                    raise
                self._lost("database", reason(error))
                self._desk.dialect.forget_connections(self._desk.engine)
                wake.cut_off()
                sign = Sign.RING
                wake.rest(OUTAGE_WAIT)
                continue
            for server in sorted(self._away):
                telemetry.emit(f"{server}_back")
            if "redis" in self._away:
                self._note_redis(away=False)
                rescuer.doubt_redis()
            self._away.clear()
            sign = pace.wait(wake)
        return None

    def _count_workers(self) -> None:
        if clock.monotonic() >= self._next_count:
            self._next_count = clock.monotonic() + COUNT_EVERY
            self._workers = broker.worker_count(self._queue)

    def _claim(self, room: int, size: int, hungry: int) -> int:
        jobs = set[str]()

        def ids(count: int) -> list[str]:
            found = rq_ids(count, size, max(1, hungry - len(jobs)))
            jobs.update(found)
            return found

        try:
            claims = self._claims.claim(room, ids, hungry)
        except DBAPIError as error:
            if self._desk.dialect.is_transient(error):
                raise
            if not (odd := self._claims.set_aside(error)):
                raise self._refused(error) from error
            for one in odd:
                telemetry.emit("left_alone", row=str(one), table=self._desk.rows.name, key=one.key)
            return self._claim(room, size, hungry)
        if claims:
            self._send_new(claims)
        if void := self._claims.take_void():  # after the sending, which must not wait for it: it is refused anyway
            broker.withdraw(self._queue, void)
        self._batches.sent(claims)
        return len(claims)

    def _send_new(self, claims: list[Claim]) -> None:
        try:
            broker.send(self._queue, broker.jobs_for(self._desk.source, claims))
        except broker.OUTAGES:
            self._claims.give_back([claim.id for claim in claims])  # what did arrive is refused by its token
            raise
        if self._left is not None:
            self._left -= len(claims)
        telemetry.emit("claimed", count=len(claims))

    def _send_due(self) -> int:
        sent = 0
        for due in self._retries.due(DUE_AT_ONCE):
            rq_id = due.claim.rq_id
            if broker.promote(self._queue, rq_id):
                sent += self._retries.take(due, rq_id)
                continue
            stands = broker.standing(self._queue, rq_id)
            if stands is broker.Standing.QUEUED:
                self._retries.take(due, rq_id)  # RQ has sent it by itself, as it does without a wait
            elif stands is broker.Standing.GONE or due.overdue >= UNCARRIED_AFTER:
                sent += self._send_anew(due)
        if sent:
            telemetry.emit("retries_sent", count=sent)
        return sent

    def _send_anew(self, due: Due) -> bool:
        rq_id = broker.new_rq_id()
        if not self._retries.take(due, rq_id):
            return False
        try:
            broker.send(self._queue, [broker.job_for(self._desk.source, [due.claim], rq_id)])
        except broker.OUTAGES:
            self._retries.put_off([due.claim.id], 0.0)
            raise
        return True

    def _lost(self, server: str, why: str) -> None:
        if server not in self._away:
            self._away.add(server)
            telemetry.emit(f"{server}_lost", reason=why)
            if server == "redis":
                self._note_redis(away=True)

    def _note_redis(self, *, away: bool) -> None:
        with contextlib.suppress(SQLAlchemyError):  # for those who ask why nothing moves; the loop has its own news
            note_redis(self._desk, away=away)

    def _refused(self, error: DBAPIError) -> NihError:
        rows = self._desk.rows
        if not (error.statement or "").startswith("UPDATE"):
            return DatabaseRefused(address=address(self._desk.engine.url), what="a claim", reason=reason(error))
        return ClaimRefused(
            column=rows.status.name, table=rows.name, word=rows.words[State.QUEUED], reason=reason(error)
        )
