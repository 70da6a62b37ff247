"""Being a worker: reach what is needed, run RQ's loop with our worker class, begin again after an outage."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from redis import Redis
from rq import Queue
from rq.exceptions import StopRequested
from rq.job import Job
from rq.timeouts import BaseDeathPenalty
from rq.worker import SimpleWorker

from nih_sched import broker, clock, host, metrics, runner, telemetry
from nih_sched.dialects import connect
from nih_sched.errors import UnreachableDatabase, UnreachableRedis
from nih_sched.keeper import Slot
from nih_sched.runner import Site
from nih_sched.settings import Settings
from nih_sched.worker.rq_worker import Worker
from nih_sched.worker.stopping import STOP_NOW, WARM

__all__ = ["STOP_NOW", "WARM", "Worker", "reach", "watch_parent", "work", "work_off"]

T = TypeVar("T")

SOUND = 5.0  # seconds for which a worker must have worked before another loss of Redis is news


def work(settings: Settings, redis_url: str, *, parent: int | None = None, slot: Slot | None = None) -> int:
    """Be a worker until told to stop.

    Args:
        settings: which source, with which handler.
        redis_url: the Redis to serve.
        parent: the pid of the supervisor, whose death ends this worker too.
        slot: where the supervisor's keeper finds this worker; without one, it has a keeper of its own.

    Returns:
        the process's exit code.
    """
    for name in ("rq.worker", "rq.job"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our own events say what RQ would
    host.name_process("sched-worker")
    stop = clock.Bell()
    for number in (signal.SIGINT, *WARM, STOP_NOW):
        signal.signal(number, lambda signum, frame: stop.ring())
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watch_parent(parent)
    site = reach(lambda: runner.made() or runner.prepare(settings), stop, insist=parent is not None)
    connection = reach(lambda: broker.connect(redis_url), stop, insist=parent is not None)
    with _counted(settings, site if parent is None else None):
        _go(site, connection, stop, redis_url, slot, ctrl_c=parent is None)
    return 0


@contextlib.contextmanager
def _counted(settings: Settings, site: Site | None) -> Iterator[None]:
    """Add up meanwhile what a worker counts that no supervisor has started."""
    if site is None:
        yield
        return
    # A connection of its own: horses are forked, and find none of ours open.
    desk = replace(site.desk, engine=connect(settings.database_url))
    counting = metrics.count_here()
    try:
        with metrics.adding_up(counting, desk):
            yield
    finally:
        counting.close()
        desk.close()


def _go(
    site: Site | None, connection: Redis | None, stop: clock.Bell, redis_url: str, slot: Slot | None, *, ctrl_c: bool
) -> None:
    worker: Worker | None = None
    said = False  # that Redis is away
    while site is not None and connection is not None and not stop.rung:
        # RQ's worker gives up when Redis is away for long; ours begins again.
        worker = _one(site, connection, stop, ctrl_c=ctrl_c, before=worker)
        if not said:
            telemetry.emit("worker_started", name=worker.name, pid=os.getpid())
        worker.slot = worker.slot or slot
        said = _serve(worker, stop, said)
        if worker.told_to_stop:
            break
        for number in (*WARM, STOP_NOW):
            signal.signal(number, lambda signum, frame: stop.ring())
        connection = reach(lambda: broker.connect(redis_url), stop, insist=True)
    if worker is not None:
        worker.leave()


def _serve(worker: Worker, stop: clock.Bell, said: bool) -> bool:
    """Run RQ's loop until it is told to stop, or Redis is away; return whether that has been said by now."""
    began = clock.monotonic()
    try:
        worker.work(logging_level="CRITICAL")
    except StopRequested:
        return said
    except broker.OUTAGES as error:  # also a Redis that answers, but is full
        if not said or clock.monotonic() - began > SOUND:
            telemetry.emit("redis_lost", reason=str(error))
        stop.wait(1.0)
        return True
    return said


def _one(site: Site, connection: Redis, stop: clock.Bell, *, ctrl_c: bool, before: Worker | None) -> Worker:
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    worker = Worker([broker.queue_of(connection, site.desk.source.name)], name=name, connection=connection)
    worker.keep_as(before)
    worker.heeds_ctrl_c = ctrl_c
    worker.stop = stop
    site.worker = name
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
    broke: BaseException | None = None

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """RQ's; what ends this process, Ctrl-C say, is no job's failure, though it came between two rows."""
        if isinstance(exc_info[1], Exception):
            super().handle_exception(job, *exc_info)
        else:
            self.broke = exc_info[1]
            raise StopRequested

    def _install_signal_handlers(self) -> None:
        pass

    def subscribe(self) -> None:
        """RQ's: nobody sends commands to it, and the thread that would hear them may live on for a minute."""


def work_off(queue: Queue) -> None:
    """Run the queue's jobs in this process until it is empty, as nih_sched.testing does."""
    worker = _QuietWorker([queue], connection=queue.connection, serializer=broker.SERIALIZER)
    worker.work(burst=True, logging_level="CRITICAL")
    if worker.broke is not None:
        raise worker.broke


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
    if host.die_with(parent, signal.SIGTERM):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
