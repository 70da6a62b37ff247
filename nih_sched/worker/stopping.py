"""How a worker stops: it takes no further job, and lets its horse end in time, without losing a row.

SIGTERM (again and again, a container sends it to everyone) and the first Ctrl-C are a warm stop with `grace` seconds;
SIGQUIT and a second Ctrl-C stop at once. RQ's own cold stop would kill the horse unheard.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError
from rq.exceptions import StopRequested

from nih_sched import broker, clock, runner
from nih_sched.worker.thin import SHORTLY, ThinWorker

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

KILL_AFTER = 3.0  # seconds from asking a horse to stop to killing it; it stops its command's children in that time
STOP_NOW = signal.SIGQUIT
WARM = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


class StoppingWorker(ThinWorker):
    """A thin worker that is stopped by signals."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_stop: float | None = None
        self._horse_asked_to_stop = False
        self._waits_as = 0  # our connection's number at Redis, while we wait there
        self.heeds_ctrl_c = True
        self.stop: clock.Bell | None = None  # rung if we were told to stop before RQ's loop began

    @property
    def grace(self) -> float:
        """Seconds that a running row gets."""
        return runner.here().settings.grace

    @property
    def told_to_stop(self) -> bool:
        """Whether this worker ended because it was asked to."""
        return self._first_stop is not None

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
        if not again:
            self._end_wait()
        self._end_horse_after(0.0 if at_once else self.grace)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """RQ's, which it asks each time before it waits for a job: the one place where stopping drops no job.

        RQ itself stops from within the signal handler, and loses a job that was just fetched.
        """
        if self._stop_requested:
            raise StopRequested
        return bool(super().should_run_maintenance_tasks)

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ's; while Redis is away this is where its loop goes round, so this is where stopping is looked for."""
        try:
            super().heartbeat(timeout, pipeline)
        except broker.OUTAGES:
            if self._stop_requested and not self._horse_pid:
                raise StopRequested from None
            raise

    def _wait(self, connection: Redis, queued: str, fetched: str, timeout: float) -> Any:
        # Alone: what ends the wait takes a connection, too, and could get the one whose number we know. After a loss
        # redis-py waits on under another number: who is told to stop just then does so when the wait is over.
        with connection.client() as alone:  # type: ignore[no-untyped-call]
            try:
                self._waits_as = alone.client_id()
            except ResponseError:  # not everybody may ask that
                timeout = min(timeout, SHORTLY)
            try:
                # Asked now that others see that we wait: either we see the stop here, or they see us and end the wait.
                return None if self._stop_requested else super()._wait(alone, queued, fetched, timeout)
            finally:
                self._waits_as = 0

    def _end_wait(self) -> None:
        """Have Redis answer at once: that there is no job, or with the job that it was just handing out."""

        def unblock() -> None:
            while waits_as := self._waits_as:  # again and again: it may be just about to wait
                with contextlib.suppress(Exception):  # an ending worker closes the connection under our hands
                    self.connection.client_unblock(waits_as)
                time.sleep(0.05)

        threading.Thread(target=unblock, daemon=True).start()

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
