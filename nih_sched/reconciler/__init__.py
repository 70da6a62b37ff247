"""tick: lost -> rescue. In whichever producer leads its source: dead leases' rows, and claims that nobody carries."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator

from redis import Redis
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from nih_sched import broker, clock, host, telemetry
from nih_sched.model import Claim, Ended, Outcome, show_key
from nih_sched.reconciler.pruner import Pruner
from nih_sched.reconciler.watch import Standstill
from nih_sched.store import Attempts, Desk, Lease, Leases, Retries
from nih_sched.store.leader import Leader
from nih_sched.store.running import orphaned

EVERY = 1.0  # seconds between ticks
RENEW_EVERY = 3.0  # seconds between a leader's renewals
UNCARRIED_AFTER = 1.8  # seconds for which a claim must be seen to stand nowhere: RQ's own steps take less
SLOW = 15.0  # seconds for which a worker that we don't know to be dead may take to begin: imports, a stock one's
SHARE, LONGEST = 50, 15.0  # from one look for them to the next: so many times what it took, and seconds at most
AT_ONCE = 500
PATIENCE = 1.0  # seconds for a row that its owner has locked
LINGER = 5.0  # seconds for which the watch goes on after the source's last claim has ended
REST_EVERY = 10.0  # seconds between looks at the leases while nothing of the source is on its way
GONE_EVERY = 10.0  # seconds between looks for attempts whose lease isn't there at all


class Reconciler:
    """One producer's; all of them watch, the leader rescues. Two leaders at once would harm nothing."""

    def __init__(self, desk: Desk, connection: Redis, name: str, pruner: Pruner | None = None) -> None:
        self._desk = desk
        self._pruner = pruner
        self._queue = broker.queue_of(connection, desk.source.name)
        self._name = name
        self._retries = Retries(desk)
        self._leases = Leases(desk.engine, desk.ledger)
        pid = os.getpid()
        self._leader = Leader(desk, name, host.host_id(), pid, host.born(pid) or 0)
        self._leads = False
        self._beats: Standstill[str] = Standstill()
        self._uncarried: Standstill[str] = Standstill()  # jobs
        self._dead_workers: deque[str] = deque(maxlen=1000)  # that RQ may take for alive, for some minutes
        self._next = self._next_renewal = self._next_gone = self._next_rest = self._next_carry = 0.0
        self._carry_pause = 0.0
        self._busy = clock.boot()  # when there was last anything to look after
        self._known_dead: set[str] = set()  # while at rest
        self._said = False  # that we lead

    def tick(self) -> None:
        """Watch; and, if this producer leads, rescue.

        Raises:
            SQLAlchemyError, redis.RedisError: a server is away; then nothing is taken for dead on return for as long
                as a lease lasts.
        """
        self._busy = clock.boot()
        self._turn()

    def rest(self) -> None:
        """Called instead of tick() while no claim of the source is queued or runs: there is nothing to rescue.

        Let another lead, who may have something to look after. Look at the leases now and then, so that those of lost
        machines are ended in the end; short ones only while something is on its way, because looks so rare prove
        nothing about them.

        Raises:
            SQLAlchemyError, redis.RedisError: as tick().
        """
        now = clock.boot()
        if now < self._busy + LINGER:
            self._turn()
            return
        self.close()
        if now < self._next_rest:
            return
        self._next_rest = now + REST_EVERY
        self._prune()  # nobody leads while nothing moves, and history grows old all the same
        with self._watching():
            leases, still = self._see()
        dead = {lease.id for lease in leases.values() if lease.died is not None}
        dead |= {name for name, seconds in still.items() if seconds >= leases[name].seconds}
        fresh, self._known_dead = dead - self._known_dead, dead
        if fresh:
            self._turn()

    def _turn(self) -> None:
        now = clock.boot()
        if now < self._next:
            return
        self._next = now + EVERY
        with self._watching():
            self._lead(now)
            dead = self._find_dead()
            if self._leads:
                self._rescue(dead)
                self._carry()
                self._prune()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, *broker.OUTAGES):
            self._beats.cut_off()
            self._uncarried.cut_off()
            raise

    def doubt_redis(self) -> None:
        """It was away, and may have lost what it held: look for that at the next tick."""
        self._next_carry = 0.0

    def close(self) -> None:
        """Let another lead, at once."""
        led, self._leads = self._leads, False
        if led:
            self._leader.resign()

    def _prune(self) -> None:
        if self._pruner is not None:
            self._pruner.turn()

    def _lead(self, now: float) -> None:
        if self._leads and now < self._next_renewal:
            return
        self._leads = self._leader.lead(host.lives)
        self._next_renewal = now + RENEW_EVERY
        if self._leads and not self._said:  # no news after a rest in which nobody else has led
            telemetry.emit("leading", source=self._desk.source.name)
        self._said = self._leads

    def _see(self) -> tuple[dict[str, Lease], dict[str, float]]:
        """All leases by id, and for how long each that isn't dead has stood still."""
        leases = {lease.id: lease for lease in self._leases.all()}
        alive = {lease.id: lease.beat for lease in leases.values() if lease.died is None}
        shortest = min((lease.seconds for lease in leases.values()), default=self._desk.source.lease)
        return leases, self._beats.see(clock.boot(), alive, longest_gap=max(shortest / 4, 2 * EVERY))

    def _find_dead(self) -> list[str]:
        leases, still = self._see()
        dead = [lease.id for lease in leases.values() if lease.died is not None]
        self._dead_workers += {leases[one].worker for one in dead}.difference(self._dead_workers)
        for name, seconds in still.items():
            lease = leases[name]
            if seconds >= lease.seconds and self._leads and self._leases.end(lease.id, "its lease ran out", lease.beat):
                telemetry.emit("lease_ended", worker=lease.worker, seconds=lease.seconds)
                dead.append(lease.id)
                self._dead_workers.append(lease.worker)
        return dead

    def _rescue(self, dead: list[str]) -> None:
        if not dead and clock.boot() < self._next_gone:
            return
        self._next_gone = clock.boot() + GONE_EVERY
        hows = {lease.id: f"{lease.died}: {lease.worker}" for lease in self._leases.all() if lease.died}
        for claim, run, lease in orphaned(self._desk, dead, AT_ONCE):
            ended = Ended(claim, Outcome.INTERRUPTED, reason=hows.get(lease, "its lease is gone"))
            try:
                (fate,) = Attempts(self._desk, run, self._name).finish([ended], patience=PATIENCE)
            except DBAPIError as error:
                if error.connection_invalidated or not self._desk.dialect.is_transient(error):
                    raise
                continue  # its owner has it locked: at the next tick again, and the others now
            if fate is not None:
                telemetry.emit("rescued", key=show_key(claim.key), reason=ended.reason, state=fate.state.value)
                broker.retire(self._queue, claim.rq_id)
        if dead:
            self._leases.forget_dead()

    def _may_begin(self, rq_id: str, seconds: float) -> bool:
        """Whether a job that stands in no queue for so many seconds may yet begin its rows."""
        worker = broker.holder(self._queue, rq_id)
        return worker is not None and worker not in self._dead_workers and seconds < SLOW

    def _carry(self) -> None:
        """Have claims sent again that wait for a worker, but whose RQ job waits nowhere."""
        began = clock.boot()
        if began < self._next_carry:
            return
        nowhere = self._look_for_uncarried()
        # Beside thousands of claims a look takes a while, of cores that rows want.
        pause = min(LONGEST, SHARE * (clock.boot() - began))
        if pause > UNCARRIED_AFTER and not all(self._may_begin(rq_id, 0.0) for rq_id in nowhere):
            pause = UNCARRIED_AFTER
        self._carry_pause, self._next_carry = pause, began + pause

    def _look_for_uncarried(self) -> set[str]:
        """Send them again; return the jobs that stand in no queue, of which most are in their workers' hands."""
        jobs = self._retries.carriers()
        if jobs:
            jobs -= broker.queued_ids(self._queue)
        still = self._uncarried.see(clock.boot(), dict.fromkeys(jobs), longest_gap=self._carry_pause + 10 * EVERY)
        overdue = {rq_id: seconds for rq_id, seconds in still.items() if seconds >= UNCARRIED_AFTER}
        gone = {rq_id for rq_id, seconds in overdue.items() if not self._may_begin(rq_id, seconds)}
        lost: dict[str, list[Claim]] = {}  # by the job that carried them
        for claim in self._retries.unstarted(gone) if gone else []:
            lost.setdefault(claim.rq_id, []).append(claim)
        again = 0
        for old, claims in lost.items():
            rq_id = broker.new_rq_id()
            if ours := [claim for claim in claims if self._retries.hand_over(claim, rq_id)]:
                broker.send(self._queue, [broker.job_for(self._desk.source, ours, rq_id)])
                broker.retire(self._queue, old)
                again += len(ours)
        if again:
            telemetry.emit("sent_again", count=again)
        return jobs
