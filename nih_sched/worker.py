"""The RQ worker class: runs our one function and nothing else, and knows how to stop without losing a row."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis import Redis
from rq import Queue
from rq.exceptions import DeserializationError, StopRequested
from rq.job import Job
from rq.timeouts import BaseDeathPenalty
from rq.worker import SimpleWorker
from rq.worker import Worker as RQWorker

from nih_sched import broker, clock, runner, telemetry
from nih_sched.broker import FUNCTION
from nih_sched.errors import UnreachableDatabase, UnreachableRedis
from nih_sched.runner import Site
from nih_sched.runner.command import signal_name
from nih_sched.settings import Settings

T = TypeVar("T")

KILL_AFTER = 3.0  # seconds from asking a horse to stop to killing it; it stops its command's children in that time
STOP_NOW = signal.SIGQUIT


class Worker(RQWorker):
    """Usable by itself, as `rq worker -S json -w nih_sched.worker.Worker QUEUE`."""

    max_connection_wait_time = 2.0  # seconds between tries while Redis is away; RQ's 60 would leave rows waiting

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("serializer", broker.SERIALIZER)
        super().__init__(*args, **kwargs)
        self._site: Site | None = None
        self._horse_asked_to_stop = False
        self._first_stop: float | None = None
        self.heeds_ctrl_c = True

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
        self._horse_asked_to_stop = False
        self.site.learn(job.args[0])
        try:
            super().execute_job(job, queue)
        finally:
            if self._horse_asked_to_stop:
                broker.withdraw(queue, [job.id])  # its claims are given back: RQ must not schedule it again

    def setup_work_horse_signals(self) -> None:
        """In the horse: SIGTERM and Ctrl-C meant for all are the worker's business, and a dead parent is noticed."""
        runner.install_interrupts()

    def handle_work_horse_killed(self, job: Job, retpid: int, ret_val: int, rusage: Any) -> None:
        """The horse is dead: what it had in hand is ended in its stead, before RQ's own view is put right."""
        source, claim_ids = job.args
        runner.crashed(self.site, source, claim_ids, asked=self._horse_asked_to_stop, how=_how_it_died(ret_val, rusage))
        self.site.close()

    # Stopping: SIGTERM (again and again, a container sends it to everyone) and the first Ctrl-C are a warm stop with
    # `grace` seconds; SIGQUIT and a second Ctrl-C stop at once. RQ's own cold stop would kill the horse unheard.

    def _install_signal_handlers(self) -> None:
        # Under a supervisor that one gets the Ctrl-C, and tells us.
        signal.signal(signal.SIGINT, self.request_stop if self.heeds_ctrl_c else signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(STOP_NOW, self.request_stop)

    def request_stop(self, signum: int, frame: Any) -> None:
        """Take no further job; let the running one end within the grace."""
        again = self._first_stop is not None
        if again and signum == signal.SIGTERM:
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
    def dequeue_timeout(self) -> int:
        """Seconds of waiting for a job, after which we look whether we were told to stop."""
        return 1

    @property
    def told_to_stop(self) -> bool:
        """Whether this worker ended because it was asked to."""
        return self._first_stop is not None

    def _end_horse_after(self, seconds: float) -> None:
        def end() -> None:
            for pause, sent in ((seconds, runner.INTERRUPT), (KILL_AFTER, signal.SIGKILL)):
                time.sleep(pause)
                pid = self._horse_pid
                if pid:
                    self._horse_asked_to_stop = True
                    with contextlib.suppress(ProcessLookupError):
                        # The group on the last call only: its command's children are the horse's to end.
                        os.kill(pid, sent) if sent == runner.INTERRUPT else os.killpg(pid, sent)

        threading.Thread(target=end, daemon=True).start()


def work(settings: Settings, redis_url: str, *, parent: int | None = None) -> int:
    """Be a worker until told to stop.

    Args:
        settings: which source, with which handler.
        redis_url: the Redis to serve.
        parent: the pid of the supervisor, whose death ends this worker too.

    Returns:
        the process's exit code.
    """
    for name in ("rq.worker", "rq.job"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our own events say what RQ would
    stop = clock.Bell()
    for number in (signal.SIGINT, signal.SIGTERM, STOP_NOW):
        signal.signal(number, lambda signum, frame: stop.ring())
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watch_parent(parent)
    site = reach(lambda: runner.made() or runner.prepare(settings), stop, insist=parent is not None)
    connection = reach(lambda: broker.connect(redis_url), stop, insist=parent is not None)
    while site is not None and connection is not None and not stop.rung:
        # RQ's worker gives up when Redis is away for long; ours begins again.
        worker = _one(site, connection, ctrl_c=parent is None)
        with contextlib.suppress(StopRequested, *broker.OUTAGES):
            worker.work(logging_level="CRITICAL")
        if worker.told_to_stop:
            break
        for number in (signal.SIGTERM, STOP_NOW):
            signal.signal(number, lambda signum, frame: stop.ring())
        connection = reach(lambda: broker.connect(redis_url), stop, insist=True)
    if site is not None:
        site.close()
    return 0


def _one(site: Site, connection: Redis, *, ctrl_c: bool) -> Worker:
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    worker = Worker([broker.queue_of(connection, site.desk.source.name)], name=name, connection=connection)
    worker.heeds_ctrl_c = ctrl_c
    site.worker = name
    telemetry.emit("worker_started", name=name, pid=os.getpid())
    return worker


class _NoPenalty(BaseDeathPenalty):
    """RQ's needs the main thread, and resets an alarm clock that is somebody else's; rows have our own timeout."""

    def setup_death_penalty(self) -> None:
        pass

    def cancel_death_penalty(self) -> None:
        pass


class _QuietWorker(SimpleWorker):
    """RQ's in-process worker, in a process whose signals are somebody else's."""

    death_penalty_class = _NoPenalty

    def _install_signal_handlers(self) -> None:
        pass


def work_off(queue: Queue) -> None:
    """Run the queue's jobs in this process until it is empty, as nih_sched.testing does."""
    _QuietWorker([queue], connection=queue.connection, serializer=broker.SERIALIZER).work(
        burst=True, logging_level="CRITICAL"
    )


def reach(open_it: Callable[[], T], stop: clock.Bell, *, insist: bool) -> T | None:
    """Open what needs a server, again and again while that can't be reached; None when told to stop meanwhile.

    Args:
        open_it: what to call.
        stop: ends the trying.
        insist: False lets the first failure through, as a user who has just typed a wrong address expects.
    """
    lost: str | None = None
    while not stop.rung:
        try:
            opened = open_it()
        except (UnreachableRedis, UnreachableDatabase) as error:
            if not insist:
                raise
            if lost is None:
                lost = "redis" if isinstance(error, UnreachableRedis) else "database"
                telemetry.emit(f"{lost}_lost", reason=str(error))
            stop.wait(1.0)
        else:
            if lost:
                telemetry.emit(f"{lost}_back")
            return opened
    return None


def watch_parent(parent: int) -> None:
    """Stop this process as SIGTERM would once its parent is gone: killed by kill -9, that one can't tell."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


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


def _how_it_died(status: int, rusage: Any) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        how = f"its process was killed by signal {number} ({signal_name(number)})"
    else:
        how = f"its process ended with exit code {os.waitstatus_to_exitcode(status)}"
    if rusage is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, kilobytes here
        how += f", peak memory {rusage.ru_maxrss * unit / 2**20:.0f} MB"
    return how
