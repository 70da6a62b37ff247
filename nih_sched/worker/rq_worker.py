"""The RQ worker class: runs our one function and nothing else, and knows how to stop without losing a row."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from rq import Queue
from rq.exceptions import DeserializationError, StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.worker import Worker as RQWorker

from nih_sched import broker, clock, runner, telemetry
from nih_sched.broker import FUNCTION
from nih_sched.model import Outcome
from nih_sched.runner import Site

KILL_AFTER = 3.0  # seconds from asking a horse to stop to killing it; it stops its command's children in that time
LATE = 10.0  # seconds past a row's timeout after which a horse that didn't heed it, in C code say, is killed
STOP_NOW = signal.SIGQUIT
WARM = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


class Worker(RQWorker):
    """Usable by itself, as `rq worker -S json -w nih_sched.worker.Worker QUEUE`."""

    max_connection_wait_time = 2.0  # seconds between tries while Redis is away; RQ's 60 would leave rows waiting

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("serializer", broker.SERIALIZER)
        super().__init__(*args, **kwargs)
        self._site: Site | None = None
        self._first_stop: float | None = None
        self._horse_asked_to_stop = False
        self._horse_too_late = False
        self._horse_end: tuple[int | None, Any] = (None, None)
        self.heeds_ctrl_c = True
        self.stop: clock.Bell | None = None  # rung if we were told to stop before RQ's loop began

    @property
    def site(self) -> Site:
        """This process's site, made before the first fork so that horses start with everything imported."""
        if self._site is None:
            self._site = runner.here()
            self._site.worker = self.name
        return self._site

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """RQ's, after handler and database have shown that they work."""
        self.site.close()
        super().bootstrap(*args, **kwargs)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """RQ's, for our one function; whoever can write to Redis can't have anything else run here."""
        if reason := _not_ours(job):
            telemetry.emit("refused_job", rq_id=job.id, reason=reason)
            self.handle_job_failure(job, queue, exc_string=f"refused: {reason}")
            return
        source, claim_ids = job.args
        if self._stop_requested:
            runner.give_back(self.site, source, claim_ids)
            broker.withdraw(queue, [job.id])
            return
        self._horse_asked_to_stop = self._horse_too_late = False
        self._horse_end = (None, None)
        self.site.learn(source)
        hand = runner.share_hand()
        hand.empty()
        try:
            super().execute_job(job, queue)
        finally:
            self._after(job, queue, died_in_hand=hand.busy)

    def _after(self, job: Job, queue: Queue, *, died_in_hand: bool) -> None:
        """End what a horse that died had in hand, in its stead; RQ itself may be cut off from Redis at this moment."""
        status, rusage = self._horse_end
        if status == 0 and not died_in_hand:
            return
        outcome = Outcome.TIMED_OUT if self._horse_too_late else Outcome.CRASHED
        how = "ran on past its timeout, and was killed" if self._horse_too_late else _how_it_died(status, rusage)
        if self._horse_asked_to_stop:
            outcome, how = Outcome.INTERRUPTED, "its worker was told to stop"
        runner.crashed(self.site, *job.args, outcome=outcome, how=how)
        self.site.close()
        if self._horse_asked_to_stop or status == 0:
            # RQ must not schedule it again: the claims are given back, or RQ takes the job for running still.
            with contextlib.suppress(*broker.OUTAGES):
                broker.withdraw(queue, [job.id])

    def monitor_work_horse(self, job: Job, queue: Queue, execution: Execution) -> None:
        """RQ's; beyond it, a horse deaf to its timeout is killed, and nothing of a horse outlives it."""
        pid = self._horse_pid
        over = threading.Event()
        threading.Thread(target=self._kill_when_late, args=(pid, over), daemon=True).start()
        try:
            super().monitor_work_horse(job, queue, execution)
        finally:
            over.set()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _kill_when_late(self, pid: int, over: threading.Event) -> None:
        hand = runner.share_hand()
        while not over.wait(1.0):
            if hand.late(LATE):
                self._horse_too_late = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                return

    def wait_for_horse(self) -> tuple[int | None, int | None, Any]:
        """RQ's; how the horse ended is remembered."""
        pid, status, rusage = super().wait_for_horse()
        self._horse_end = (status, rusage)
        return pid, status, rusage

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """RQ's; Redis being away is no reason to leave a running horse alone."""
        with contextlib.suppress(*broker.OUTAGES):
            super().maintain_heartbeats(job, execution)

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        """RQ's; while Redis is away this is where its loop goes round, so this is where stopping is looked for."""
        try:
            super().heartbeat(*args, **kwargs)
        except broker.OUTAGES:
            if self._stop_requested and not self._horse_pid:
                raise StopRequested from None
            raise

    def setup_work_horse_signals(self) -> None:
        """In the horse: SIGTERM and Ctrl-C meant for all are the worker's business."""
        runner.install_interrupts()

    # Stopping: SIGTERM (again and again, a container sends it to everyone) and the first Ctrl-C are a warm stop with
    # `grace` seconds; SIGQUIT and a second Ctrl-C stop at once. RQ's own cold stop would kill the horse unheard.

    def _install_signal_handlers(self) -> None:
        # Under a supervisor that one gets the Ctrl-C, and tells us.
        signal.signal(signal.SIGINT, self.request_stop if self.heeds_ctrl_c else signal.SIG_IGN)
        for number in (*WARM, STOP_NOW):
            signal.signal(number, self.request_stop)
        if self.stop is not None and self.stop.rung:
            self.request_stop(signal.SIGTERM, None)

    def request_stop(self, signum: int, frame: Any) -> None:
        """Take no further job; let the running one end within the grace."""
        again = self._first_stop is not None
        if again and signum in WARM:
            return
        at_once = signum == STOP_NOW or again
        self._first_stop = self._first_stop or clock.monotonic()
        self._stop_requested = True
        self._end_horse_after(0.0 if at_once else self.site.settings.grace)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """RQ's, which it asks each time before it waits for a job: the one place where stopping drops no job.

        RQ itself stops from within the signal handler, and loses a job that was just fetched.
        """
        if self._stop_requested:
            raise StopRequested
        return bool(super().should_run_maintenance_tasks)

    @property
    def dequeue_timeout(self) -> float:  # type: ignore[override]  # RQ says int, and hands it to BLMOVE as it is
        """Seconds of waiting for a job, after which we look whether we were told to stop."""
        return 0.3

    @property
    def told_to_stop(self) -> bool:
        """Whether this worker ended because it was asked to."""
        return self._first_stop is not None

    def _end_horse_after(self, seconds: float) -> None:
        def end() -> None:
            time.sleep(seconds)
            while True:  # a horse may be forked after this moment, too
                if pid := self._horse_pid:
                    self._horse_asked_to_stop = True
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, runner.INTERRUPT)
                        deadline = clock.monotonic() + KILL_AFTER
                        while self._horse_pid == pid and clock.monotonic() < deadline:
                            time.sleep(0.02)
                        if self._horse_pid == pid:
                            os.killpg(pid, signal.SIGKILL)
                time.sleep(0.02)

        threading.Thread(target=end, daemon=True).start()


def _not_ours(job: Job) -> str | None:
    """Why this job may not run here, or None. Callbacks are code by name, too."""
    try:
        if job.func_name != FUNCTION or job.instance is not None or job.kwargs:
            return "it isn't a job of nih-sched's"
        source, claim_ids = job.args
    except (DeserializationError, ValueError, TypeError, AttributeError):
        return "it can't be read as a job of nih-sched's"
    if not isinstance(source, str) or not isinstance(claim_ids, list) or not all(type(c) is int for c in claim_ids):
        return "its arguments aren't a source and claim ids"
    if job._success_callback_name or job._failure_callback_name or job._stopped_callback_name:
        return "it names callbacks"
    return None


def _how_it_died(status: int | None, rusage: Any) -> str:
    if status is None:
        return "its process is gone"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        how = f"its process was killed by signal {number} ({runner.signal_name(number)})"
    else:
        how = f"its process ended with exit code {os.waitstatus_to_exitcode(status)}"
    if rusage is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, kilobytes here
        how += f", peak memory {rusage.ru_maxrss * unit / 2**20:.0f} MB"
    return how
