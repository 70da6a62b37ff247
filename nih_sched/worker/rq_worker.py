"""The RQ worker class: runs our one function and nothing else, and knows how to stop without losing a row."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from redis.exceptions import RedisError
from rq import Queue
from rq.executions import Execution
from rq.job import Job

from nih_sched import broker, clock, host, keeper, runner, telemetry
from nih_sched.keeper import Slots
from nih_sched.model import Outcome
from nih_sched.worker.horse import HorseHalf
from nih_sched.worker.judge import how_it_died, not_ours
from nih_sched.worker.thin import Raw
from nih_sched.worker.warm import BEGUN, DONE, PATIENCE, TIRED, Order, WarmHorse

REFUSED_WAIT = 2.0  # seconds until an outcome that the ledger refused is tried again
LATE = 10.0  # seconds past a row's timeout after which a horse that didn't heed it, in C code say, is killed
LISTEN_AGAIN = 2.0  # seconds until the thread that hears RQ's commands listens again after an error
DEAF = 20.0  # seconds for which a horse, frozen perhaps, may take to begin a job
REST = 10.0  # seconds without a job after which a horse ends; the next job has a new one, some 20 ms later
LOOK = 0.02  # seconds between looks at the rows while a job runs


class Worker(HorseHalf):
    """Usable by itself, as `rq worker -S json -w nih_sched.worker.Worker QUEUE`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._horse_too_late = self._horse_broke = False
        self._horse_end: tuple[int | None, Any] = (None, None)
        self._warm: WarmHorse | None = None
        self._said: list[Order] = []  # to the horse, of the job that runs
        self._handed = ""  # the job that a horse got before we have looked at it
        self._begun = self._fresh = False  # whether the horse has taken the order; whether it was forked for that
        self._handed_over = self._last_job = 0.0  # when it got the order; when the last job was over
        self._steward: runner.Steward | None = None  # of the job that runs
        self._unwritten: list[runner.Unwritten] = []  # outcomes that the ledger refuses
        self._next_writing = 0.0
        self._keeper = 0  # the pid of a keeper of our own
        self._slots: Slots | None = None

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """RQ's, after handler and database have shown that they work, and with a keeper."""
        self._ensure_slot()
        super().bootstrap(*args, **kwargs)

    def _ensure_slot(self) -> None:
        """Before a fork: have a keeper, and a place where it finds us."""
        if self.slot is None:
            self._slots = Slots(1)
            (self.slot,) = self._slots.slots
        if self._slots is not None:
            self._ensure_keeper(self._slots)
        self.site.slot = self.slot

    def _ensure_keeper(self, slots: Slots) -> None:
        if not self._keeper or os.waitpid(self._keeper, os.WNOHANG)[0]:
            self.site.close()  # no fork may carry a connection: SQLite's would go on writing to a file that is gone
            self._keeper = keeper.start(slots, self.site.settings, patrol=True)
            self.job_monitoring_interval = max(1, min(self.job_monitoring_interval, int(self.site.settings.lease / 6)))

    def keep_as(self, before: Worker | None) -> None:
        """Go on with the lease and the keeper of the worker that this process was before."""
        if before is not None:
            self.slot, self._slots, self._keeper = before.slot, before._slots, before._keeper
            self._unwritten = before._unwritten

    def leave(self) -> None:
        """At this worker's end: it needs neither horse nor lease nor keeper any more."""
        self._dismiss_horse()
        self._next_writing = 0.0
        self._write_again()
        self.site.leave_lease()
        self.site.close()
        if self._slots is not None:
            self._slots.close()

    def _dismiss_horse(self) -> None:
        if self._warm is not None:
            self._warm.bury(PATIENCE)
            self._warm = None

    def teardown(self) -> None:
        """RQ's; a stock command that runs this class knows no other end."""
        if not self.is_horse:
            self._dismiss_horse()
            thread: Any = self.pubsub_thread
            if thread is not None:
                # First: it looks once Redis answers that it has unsubscribed. Else in a minute, and RQ waits a second.
                thread.stop()
        super().teardown()  # type: ignore[no-untyped-call]

    def subscribe(self) -> None:
        """RQ's; its listening thread would end with a traceback when Redis is frozen, or while we close it."""
        super().subscribe()  # type: ignore[no-untyped-call]
        thread: Any = self.pubsub_thread
        thread.exception_handler = lambda error, pubsub, thread: time.sleep(LISTEN_AGAIN)

    def fetched(self, rq_id: str, raw: Raw) -> None:
        """A horse that waits begins at once, while we look at the job; it looks, too."""
        if self._warm is not None and not self._stop_requested:
            (queue,) = self.queues
            self._steward = None
            self._hand_over(rq_id, queue.name, raw)
            self._handed = rq_id

    def execute_job(self, job: Job, queue: Queue) -> None:
        """RQ's, for our one function; whoever can write to Redis can't have anything else run here."""
        is_handed, self._handed = self._handed == job.id, ""
        if reason := not_ours(job):
            telemetry.emit("refused_job", rq_id=job.id, reason=reason)
            self.handle_job_failure(job, queue, exc_string=f"refused: {reason}")
            if is_handed:  # its horse has refused it, too
                self.wait_for_horse()
                self._horse_pid = 0
                if self._warm is not None:
                    self._warm.heard()
            return
        source, claim_ids = job.args
        if self._stop_requested and not is_handed:
            runner.give_back(self.site, source, claim_ids)
            self.site.close()
            broker.withdraw(queue, [job.id])
            return
        self._steward = runner.Steward(self.site, source, claim_ids)
        if not is_handed:
            self.site.learn(source)
            self._ensure_slot()
        try:
            if is_handed:  # its rows may run already: whatever fails from here on, they are looked after
                self._ensure_slot()
            else:
                self.fork_work_horse(job, queue)
            execution = self.prepare_execution(job)  # while the horse runs
            self._say({"execution": execution.id, "created": execution.created_at.timestamp()})
            self.monitor_work_horse(job, queue, execution)
        finally:
            self._end_unwatched_horse()
            self._steward.leave()
            self._last_job = clock.monotonic()
            self._after(job, queue, died_in_hand=runner.share_hand().claim != 0)

    def _end_unwatched_horse(self) -> None:
        """What keeps us from watching a horse ends it: else it would run rows on that are given back."""
        if self._warm is not None and self._horse_end == (None, None):
            with _undisturbed():
                self._horse_broke = True
                warm, self._warm = self._warm, None
                self._horse_end = warm.bury()[1:]

    def _after(self, job: Job, queue: Queue, *, died_in_hand: bool) -> None:
        """End what a horse that died had in hand, in its stead; RQ itself may be cut off from Redis at this moment."""
        if self._warm is not None:
            self._warm.heard()  # that it is done; not before RQ's alarm is off
        status, rusage = self._horse_end
        unvouched = self._kept.killed
        self._kept.dismount()  # the horse is gone; our own writing may take as long as the database is away
        if status == 0 and not died_in_hand:
            return
        outcome = Outcome.TIMED_OUT if self._horse_too_late else Outcome.CRASHED
        how = "ran on past its timeout, and was killed" if self._horse_too_late else how_it_died(status, rusage)
        if unvouched:
            outcome, how = Outcome.INTERRUPTED, "its lease couldn't be renewed, so it was stopped"
        if self._horse_broke:
            outcome, how = Outcome.INTERRUPTED, "its worker met an error, and stopped it"
        if self._horse_asked_to_stop:
            outcome, how = Outcome.INTERRUPTED, "its worker was told to stop"
        if self._steward is not None and self._steward.has_cancelled:
            outcome, how = Outcome.CANCELLED, f"{runner.CANCELLED}; it had to be killed"
        source, claim_ids = job.args
        host.end_all([self._kept.lease], claims=claim_ids)  # before others run the row: a command has its own group
        self._unwritten += runner.crashed(self.site, source, claim_ids, job.id, queue, outcome=outcome, how=how)
        self.site.close()
        if outcome in (Outcome.INTERRUPTED, Outcome.CANCELLED) or status == 0:
            # RQ must not schedule it again: the claims are given back, or RQ takes the job for running still.
            with contextlib.suppress(*broker.OUTAGES):
                broker.withdraw(queue, [job.id])

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        """RQ's; a horse that is there already gets the job, with what Redis holds of it."""
        self._hand_over(job.id, queue.name, self.raw_of(job))

    def _hand_over(self, rq_id: str, queue: str, raw: Raw) -> None:
        self._horse_asked_to_stop = self._horse_too_late = self._horse_broke = False
        self._horse_end = (None, None)
        self._kept.dismount()
        self._begun = self._fresh = False
        self._handed_over = clock.monotonic()
        self._said = []
        if self._warm is not None:
            runner.share_hand().reset()
            self._horse_pid = self._warm.pid
        else:
            self._fork()
        self._say({"job": rq_id, "queue": queue, "raw": raw})

    def _fork(self) -> WarmHorse:
        self.site.close()  # no fork may carry a connection
        runner.new_hand()  # one that died may have had the old one's lock
        self._warm = WarmHorse(self.be_horse, self.site.close)
        self._horse_pid = self._warm.pid
        self._fresh, self._handed_over = True, clock.monotonic()
        for order in self._said:
            self._warm.hand_over(order)
        return self._warm

    def _say(self, order: Order) -> None:
        assert self._warm is not None  # noqa: S101 - fork_work_horse has seen to it
        self._said.append(order)
        self._warm.hand_over(order)

    def monitor_work_horse(self, job: Job, queue: Queue, execution: Execution) -> None:
        """RQ's; ours is measured on a clock that nobody sets, while RQ would kill by the wall clock."""
        job.timeout = -1
        super().monitor_work_horse(job, queue, execution)

    def wait_for_horse(self) -> tuple[int | None, int | None, Any]:
        """RQ's; looks after the rows meanwhile, and remembers how the horse ended."""
        warm = self._warm
        if warm is None:
            return None, None, None
        while (answer := warm.answer(LOOK)) not in (DONE, TIRED):
            if answer == BEGUN:
                self._begun = True
                warm.heard()
            elif answer is None:
                with _undisturbed():
                    self._look_after(warm.pid)
            elif self._begun or self._fresh:
                break
            else:
                with _undisturbed():  # it died between two jobs: of nobody's row
                    warm.bury()
                    self._kept.dismount()
                    warm = self._fork()
        if answer == DONE:
            self._horse_end = (0, None)
            return warm.pid, 0, None
        with _undisturbed():
            self._warm = None
            pid, status, rusage = warm.bury(PATIENCE if answer == TIRED else 0.0)
            self._horse_end = (status, rusage)
        return pid, status, rusage

    def _look_after(self, pid: int) -> None:
        slot = self._kept
        self._horse_too_late = runner.share_hand().late(LATE)
        deaf = not self._begun and clock.monotonic() - self._handed_over > DEAF
        if self._horse_too_late or deaf or slot.lapsed:  # the keeper may be frozen, or dead
            if not self._horse_too_late:
                slot.kill_noted()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        elif self._steward is not None and self._steward.look(pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """RQ's; Redis being away is no reason to leave a running horse alone."""
        if self._slots is not None:
            self._ensure_keeper(self._slots)
        with contextlib.suppress(RedisError):  # whatever it refuses
            super().maintain_heartbeats(job, execution)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """RQ's, which it asks each time before it waits for a job."""
        due = super().should_run_maintenance_tasks
        self._write_again()
        self._let_horse_rest()
        return due

    def _let_horse_rest(self) -> None:
        """A horse that has had nothing to do for a while ends, unless its start is the user's and may be dear."""
        rested = self._warm is not None and clock.monotonic() - self._last_job >= REST
        if rested and not self.site.settings.on_horse_start:
            self._dismiss_horse()

    def _write_again(self) -> None:
        if self._unwritten and clock.monotonic() >= self._next_writing:
            self._unwritten = [one for one in self._unwritten if not runner.write_again(self.site, one)]
            self.site.close()
            self._next_writing = clock.monotonic() + REFUSED_WAIT


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    # RQ's heartbeat comes by an alarm that raises: not into the middle of a transaction.
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
