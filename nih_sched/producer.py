"""tick: room -> claim -> enqueue, and what waits for a retry is sent when it is due."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from redis import Redis
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from nih_sched import broker, clock, telemetry
from nih_sched.dialects import address
from nih_sched.dialects.base import reason
from nih_sched.errors import ClaimRefused, DatabaseRefused, NihError
from nih_sched.model import Claim, State
from nih_sched.settings import Settings
from nih_sched.store import Claims, Desk, Due, Looks, Retries
from nih_sched.store.desk import register

PREFETCH = 4  # jobs that wait in Redis for each worker: enough that none idles, few enough that rows wait in the table
BUSY_WAIT = 0.02  # seconds between ticks while there is more to claim
OPEN_WAIT = 0.1  # seconds between ticks while claims of ours are open
UNCARRIED_AFTER = 1.0  # seconds overdue after which a retry that RQ doesn't show any more is sent anew
DUE_AT_ONCE = 500
RESCUE_EVERY = 1.0  # seconds between looks for what was lost
OUTAGE_WAIT = 1.0  # seconds between looks while Redis or the database is away


@dataclass(frozen=True)
class Tick:
    """What one tick did."""

    claimed: int
    sent: int
    room: int


class Producer:
    """One of any number of producers of a source; the database decides between them."""

    def __init__(self, settings: Settings, desk: Desk, connection: Redis) -> None:
        self._settings = settings
        self._desk = desk
        self._queue = broker.queue_of(connection, desk.source.name)
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._claims = Claims(desk, self.name, settings.tries)
        self._retries = Retries(desk)
        self.looks = Looks(desk)
        self._left = settings.max_rows
        self._away: set[str] = set()  # which of database and Redis we have said to be lost
        self._began = self.looks.now()
        register(desk)

    def tick(self) -> Tick:
        """Send what is due, then claim and enqueue as many ready rows as there is room for.

        Raises:
            ClaimRefused: the database won't have a row in its queued state; nothing was claimed.
        """
        sent = self._send_due()
        room = max(self._settings.max_concurrent_jobs, broker.worker_count(self._queue)) * PREFETCH
        room -= broker.waiting(self._queue)
        if self._left is not None:
            room = min(room, self._left)
        claimed = self._claim(room) if room > 0 else 0
        return Tick(claimed, sent, room)

    def pause_after(self, tick: Tick) -> float:
        """Seconds until the next tick is worth its cost."""
        if tick.claimed and tick.claimed >= tick.room:
            return BUSY_WAIT
        if not tick.claimed and not tick.sent and not self.looks.open_claims():
            return self._settings.poll_interval
        due = self._retries.seconds_to_next()
        waits = [OPEN_WAIT, self._settings.poll_interval]
        return min(waits if due is None else [*waits, max(due, 0.001)])

    def is_over(self, tick: Tick) -> bool:
        """Whether --burst or --max-rows has reached its end."""
        if self._left is not None and self._left <= 0:
            return self.looks.open_claims(self.name) == 0
        if not self._settings.burst or tick.claimed or tick.sent:
            return False
        return self.looks.open_claims() == 0 and self.looks.ready() == 0

    def ended(self) -> dict[str, int]:
        """How many claims ended since this producer began, by outcome; under --max-rows only its own."""
        return self.looks.ended_since(self._began, self.name if self._left is not None else None)

    def stop(self) -> None:
        """Give back what was claimed and not begun, and take its jobs out of the queue."""
        void = self._claims.give_back()
        if void:
            telemetry.emit("given_back", count=len(void))
            with contextlib.suppress(*broker.OUTAGES):  # left there, the jobs are refused by their tokens
                broker.patiently(lambda: broker.withdraw(self._queue, void))

    def loop(self, stop: clock.Bell, rescue: Callable[[], None]) -> dict[str, int] | None:
        """Tick until told to stop (None) or until the end of --burst or --max-rows (the outcomes' counts).

        Args:
            stop: rung when it is time to stop.
            rescue: called about once a second at least, and before each tick.
        """
        next_tick = clock.monotonic()
        while not stop.rung:
            try:
                rescue()
                if clock.monotonic() >= next_tick:
                    tick = self.tick()
                    if self.is_over(tick):
                        return self.ended()
                    next_tick = clock.monotonic() + self.pause_after(tick)
            except broker.OUTAGES as error:
                self._lost("redis", str(error))
                stop.wait(OUTAGE_WAIT)
                continue
            except SQLAlchemyError as error:
                if not self._desk.dialect.is_transient(error):
                    raise
                self._lost("database", reason(error))
                self._desk.dialect.forget_connections(self._desk.engine)
                stop.wait(OUTAGE_WAIT)
                continue
            for server in sorted(self._away):
                telemetry.emit(f"{server}_back")
            self._away.clear()
            stop.wait(min(next_tick - clock.monotonic(), RESCUE_EVERY))
        return None

    def _claim(self, room: int) -> int:
        try:
            claims = self._claims.claim(room, broker.new_rq_id)
        except DBAPIError as error:
            if self._desk.dialect.is_transient(error):
                raise
            raise self._refused(error) from error
        if claims:
            self._send_new(claims)
        if self._claims.void:  # after the sending, which must not wait for it: what is void is refused anyway
            broker.withdraw(self._queue, self._claims.void)
            self._claims.void.clear()
        return len(claims)

    def _send_new(self, claims: list[Claim]) -> None:
        try:
            broker.send(self._queue, [broker.job_for(self._desk.source, claim, claim.rq_id) for claim in claims])
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
            broker.send(self._queue, [broker.job_for(self._desk.source, due.claim, rq_id)])
        except broker.OUTAGES:
            self._retries.put_off([due.claim.id], 0.0)
            raise
        return True

    def _lost(self, server: str, why: str) -> None:
        if server not in self._away:
            self._away.add(server)
            telemetry.emit(f"{server}_lost", reason=why)

    def _refused(self, error: DBAPIError) -> NihError:
        rows = self._desk.rows
        if not (error.statement or "").startswith("UPDATE"):
            return DatabaseRefused(address=address(self._desk.engine.url), what="a claim", reason=reason(error))
        return ClaimRefused(
            column=rows.status.name, table=rows.name, word=rows.words[State.QUEUED], reason=reason(error)
        )
