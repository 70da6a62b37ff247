"""One process tree: a producer and a pool of workers, started, watched, restarted and stopped together."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from redis import Redis
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import broker, clock, embedded, host, keeper, metrics, runner, telemetry, worker
from nih_sched.access import Access
from nih_sched.dialects import address
from nih_sched.dialects.base import reason
from nih_sched.dialects.connect import identity, parse, sqlite_path
from nih_sched.errors import NihError, UsageError
from nih_sched.keeper import Slot
from nih_sched.producer import Producer
from nih_sched.reconciler import Reconciler
from nih_sched.reconciler.pruner import Pruner
from nih_sched.settings import Settings, fields, kept_seconds, option_name
from nih_sched.store import Desk, Looks, open_desk
from nih_sched.store.desk import register
from nih_sched.wake import Doorbell, Wake

LOOK = 0.05  # seconds between looks at a view, or at children that are to be started again
CALM = 1.0  # seconds between looks else: a child's end is told of
KILL_SLACK = 6.0  # seconds beyond the grace after which a child that didn't stop is killed
KEEPER_SLACK = 5.0  # seconds for which the keeper may go on writing down deaths after everyone else has ended
BURIAL = 5.0  # seconds for which a worker's successor waits until the keeper has buried it
MIN_LIFE = 5.0  # seconds that a child should live; one that dies younger is started again only after a pause
FINISHED = (0, 1, 2)  # exit codes with which a producer means to end


@dataclass
class Child:
    """A process of the tree."""

    role: str
    pid: int
    born: float
    slot: Slot | None = None
    not_before: float = 0.0


class View(Protocol):
    """What shows a run while it goes on."""

    @property
    def sink(self) -> int:
        """The file descriptor that children write their output to."""

    def look(self) -> None:
        """Called some twenty times a second."""

    def close(self) -> None:
        """Called once at the end."""


class Supervisor:
    """Forks children from a process that has imported everything and has no thread and no open connection."""

    def __init__(
        self, settings: Settings, redis_url: str, counting: metrics.Counting, view: View | None = None
    ) -> None:
        self._settings = settings
        self._redis_url = redis_url
        self._counting = counting
        self._view = view
        self._children: list[Child] = []
        self._slots = keeper.Slots(settings.max_concurrent_jobs)
        self._stops = 0  # whether to stop, for whatever reason
        self._asked = 0  # how often a signal asked us to
        self._heeded = 0
        self._code = 0
        self._nudge = clock.Nudge()

    def run(self) -> int:
        """Keep the tree up until it is told to stop or its producer has finished; return the exit code."""
        before = {number: signal.signal(number, self._on_stop) for number in (signal.SIGINT, *worker.WARM)}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda signum, frame: self._nudge.give())
        try:
            self._start("keeper")
            self._start("producer")
            for slot in self._slots.slots:
                self._start("worker", slot)
            while True:
                self._reap(restart=True)
                self._look()
                if self._stops:
                    break
                waits = self._view or not all(child.pid for child in self._children)
                self._nudge.wait(LOOK if waits else CALM)
        finally:
            self._stop_all()
            if self._view:
                self._view.close()
            for number, handler in before.items():
                signal.signal(number, handler)  # nih_sched.run() is called from other programs too
            self._nudge.close()
        return self._code

    def _on_stop(self, signum: int, frame: Any) -> None:
        if signum in worker.WARM and self._asked:
            return  # a container sends it to everyone, and we forward it: once is enough
        self._asked += 1
        self._stops += 1
        self._nudge.give()

    def _heed(self) -> None:
        """Do what a signal asked for; not in its handler, which may have interrupted a write."""
        if self._asked > self._heeded:
            self._heeded = self._asked
            if self._asked == 1:
                telemetry.emit("stopping", grace=self._settings.grace)
            else:
                telemetry.emit("stopping_now")
                self._signal(worker.STOP_NOW)

    def _start(self, role: str, slot: Slot | None = None) -> None:
        _flush()
        if role == "keeper":
            pid = keeper.start(self._slots, self._settings, patrol=True)
            self._children.append(Child(role, pid, clock.monotonic()))
            return
        parent = os.getpid()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *worker.WARM, worker.STOP_NOW})
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                host.forked()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                for number in (*worker.WARM, worker.STOP_NOW):
                    signal.signal(number, lambda signum, frame: os._exit(0))  # told to stop before it has begun
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                if self._view:
                    if os.isatty(1):
                        os.dup2(self._view.sink, 1)  # what handlers print stands above the view, not in it
                    os.dup2(self._view.sink, 2)
                code = self._be(role, parent, slot)
            except NihError as error:
                sys.stderr.write(f"Error: {error}\n")
                code = error.exit_code
            except SQLAlchemyError as error:
                sys.stderr.write(f"Error: The database answered: {reason(error)}\n")
                # What passes is tried again by a new child; a missing right or table doesn't pass.
                code = 70 if parse(self._settings.database_url)[1].is_transient(error) else 2
            except BaseException:  # the child's outermost frame: nothing may unwind into the parent's code
                traceback.print_exc()
            finally:
                _flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._children.append(Child(role, pid, clock.monotonic(), slot))

    def _be(self, role: str, parent: int, slot: Slot | None) -> int:
        if role == "worker":
            return worker.work(self._settings, self._redis_url, parent=parent, slot=slot)
        return produce(self._settings, self._redis_url, parent=parent, counting=self._counting)

    def _reap(self, *, restart: bool) -> None:
        for child in list(self._children):
            if child.pid == 0:
                waited = clock.monotonic() - child.not_before
                # The keeper first buries the worker before: the slot says what that one left running.
                if restart and waited >= (BURIAL if child.slot and child.slot.worker else 0.0):
                    self._children.remove(child)
                    self._start(child.role, child.slot)
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            code = os.waitstatus_to_exitcode(status)
            if child.role == "producer" and code in FINISHED:
                self._code = code
                self._stops = self._stops or 1
            elif code == 2:
                self._code, self._stops = code, self._stops or 1
            elif restart:
                telemetry.emit(f"{child.role}_died", name=str(pid), status=_words(code))
                lived = clock.monotonic() - child.born
                child.not_before = clock.monotonic() + (0.0 if lived >= MIN_LIFE else 1.0)
                child.pid = 0
                continue
            self._children.remove(child)

    def _look(self) -> None:
        if self._view:
            self._view.look()

    def _signal(self, number: int, *roles: str) -> None:
        for child in self._children:
            if child.pid and (not roles or child.role in roles):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    def _stop_all(self) -> None:
        self._children = [child for child in self._children if child.pid]
        self._signal(signal.SIGTERM)
        deadline = clock.monotonic() + self._settings.grace + KILL_SLACK
        keeper_until = 0.0
        while self._children:
            self._heed()
            self._reap(restart=False)
            self._look()
            if clock.monotonic() > deadline:
                self._signal(signal.SIGKILL, "producer", "worker")
            if all(child.role == "keeper" for child in self._children):
                self._slots.close()
                keeper_until = keeper_until or clock.monotonic() + KEEPER_SLACK
                if clock.monotonic() > keeper_until:
                    self._signal(signal.SIGKILL)
            time.sleep(0.02)


def run(settings: Settings, make_view: Callable[[Desk], View] | None = None) -> int:
    """Run the main job: producer and workers, until told to stop or until --burst or --max-rows has its end.

    Args:
        settings: what to do.
        make_view: makes what shows the run on a terminal, from the source's desk.

    Returns:
        0 done, 1 a row failed under --burst or --max-rows, 2 a configuration that can't work.

    Raises:
        NihError: whatever stands in the way, before a row is claimed.
    """
    metrics.check(settings)
    with redis_for(settings) as redis_url:
        site = runner.prepare(settings)
        broker.connect(redis_url).close()
        telemetry.emit("run_started", summary=summary(settings, site.desk, site.handler.name, redis_url))
        view = make_view(site.desk) if make_view else None
        counting = metrics.count_here()
        register(site.desk)
        site.learn(site.desk.source.name)  # once for all workers
        site.close()
        gc.collect()
        try:
            code = Supervisor(settings, redis_url, counting, view).run()
        finally:
            runner.clear()
            with metrics.adding_up(counting, site.desk):
                pass  # what workers have counted after their producer had ended
            counting.close()
            site.close()
        telemetry.emit("stopped")
        return code


def produce(
    settings: Settings, redis_url: str, *, parent: int | None = None, counting: metrics.Counting | None = None
) -> int:
    """Be a producer until told to stop; the exit code as of run().

    Args:
        settings: what to do.
        redis_url: the Redis to send to.
        parent: the supervisor's pid, whose death ends this producer too.
        counting: what the whole tree counts into; without it, this process counts for itself.
    """
    metrics.check(settings)
    host.name_process("sched-producer")
    stop = clock.Bell()
    for number in (*worker.WARM, worker.STOP_NOW):
        signal.signal(number, lambda signum, frame: stop.ring())
    if parent is None:
        signal.signal(signal.SIGINT, lambda signum, frame: stop.ring())
    else:
        worker.watch_parent(parent)
    insist = parent is not None
    desk = worker.reach(lambda: open_desk(settings), stop, insist=insist)
    connection = worker.reach(lambda: broker.connect(redis_url), stop, insist=insist)
    if desk is None or connection is None:
        return 0
    if parent is None:
        telemetry.emit("run_started", summary=summary(settings, desk, "of the workers", redis_url))
    producer = Producer(settings, desk, connection)
    pruner = Pruner(desk, *kept_seconds(settings.keep_history))
    reconciler = Reconciler(desk, connection, producer.name, pruner)
    wake = Wake(stop, desk.watch(), Doorbell(connection, desk.source.name))
    try:
        own, theirs = counting or metrics.count_here(), partial(broker.take_counts, connection, desk.source.name)
        with metrics.adding_up(own, desk, theirs), _told(settings, desk, connection, redis_url):
            ended = producer.loop(wake, reconciler)
    finally:
        wake.close()
        reconciler.close()
        producer.stop()
        desk.close()
    if ended is None:
        return 0
    done = ended.pop("done", 0)
    rest = "".join(f", {count} {outcome}" for outcome, count in sorted(ended.items()))
    telemetry.emit("finished", summary=f"{done} done{rest}")
    return 1 if any(ended.get(outcome) for outcome in ("failed", "timed out", "crashed", "lost")) else 0


@contextlib.contextmanager
def _told(settings: Settings, desk: Desk, connection: Redis, redis_url: str) -> Iterator[None]:
    """Answer on --metrics-port meanwhile."""
    if settings.metrics_port is None:
        yield
        return
    from nih_sched.metrics.endpoint import Endpoint, serve_beside  # noqa: PLC0415 - a web server for those who want one

    access = Access(settings.dashboard_password, settings.dashboard_token)
    app = Endpoint(desk, connection, redis_url, settings.created_column, access)
    close = serve_beside(app, settings.metrics_host, settings.metrics_port)
    try:
        yield
    finally:
        close()


@contextlib.contextmanager
def redis_for(settings: Settings) -> Iterator[str]:
    """The address of the Redis to use; an embedded one lives at least as long as this context.

    Raises:
        UsageError: on Heroku, where machines share neither disk nor sockets.
    """
    if settings.dyno:
        if settings.redis_url is None:
            raise UsageError(reason="Dynos share no disk, so the embedded Redis can't serve them. Set REDIS_URL.")
        if sqlite_path(settings.database_url):
            raise UsageError(reason="Dynos share no disk, so SQLite can't serve them. Set DATABASE_URL.")
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    server = embedded.start(identity(settings.database_url))
    try:
        yield server.url
    finally:
        server.close()


def summary(settings: Settings, desk: Desk, handler: str, redis_url: str) -> str:
    """The one line that says what a run will do, and where each setting came from."""
    redis = broker.address(redis_url) if settings.redis_url else "embedded"
    origins: dict[str, list[str]] = {}
    for name in fields():
        if settings.origin(name) != "default":
            origins.setdefault(settings.origin(name), []).append(option_name(name))
    told = "; ".join(f"{' '.join(names)} by {origin}" for origin, names in origins.items())
    return " · ".join(
        [
            f"database {address(settings.database_url)}",
            f"table {desk.rows.name}",
            f"{Looks(desk).ready()} ready",
            f"handler {handler}",
            f"{settings.max_concurrent_jobs} workers",
            f"Redis {redis}",
            f"set: {told}; all else by default" if told else "all by default",
        ]
    )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()


def _words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
