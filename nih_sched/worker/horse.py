"""What of a worker runs in its horse: job after job is performed there, and ended at Redis."""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime
from typing import Any

from rq import Queue
from rq.executions import Execution
from rq.job import Job

from nih_sched import broker, host, runner
from nih_sched.keeper import Slot
from nih_sched.runner import Site
from nih_sched.worker.judge import not_ours
from nih_sched.worker.stopping import StoppingWorker
from nih_sched.worker.warm import FILES, JOBS, MEMORY, Hear, Order, Serve

UNTOLD = 78  # a horse's exit code when Redis is away at the end of a job


class HorseHalf(StoppingWorker):
    """A worker that a fork of it may be a horse of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slot: Slot | None = None  # where a keeper finds us; made by the worker when no supervisor gives one
        self._site: Site | None = None
        self._hear: Hear | None = None  # what the worker says next
        self._runs: Execution | None = None

    @property
    def site(self) -> Site:
        """This process's site, made before the first fork so that horses start with everything imported."""
        if self._site is None:
            self._site = runner.here()
            self._site.worker = self.name
        return self._site

    @property
    def _kept(self) -> Slot:
        assert self.slot is not None  # noqa: S101 - bootstrap has made it
        return self.slot

    def be_horse(self) -> Serve:
        """In the horse, before its first job."""
        random.seed()
        self.setup_work_horse_signals()
        self._is_horse = True
        os.environ["RQ_WORKER_ID"] = self.name
        growth, served = runner.Growth(), 0

        def serve(order: Order, hear: Hear) -> bool:
            nonlocal served
            served += 1
            os.environ["RQ_JOB_ID"] = order["job"]
            job = self.restored(order["job"], order["raw"])
            if not_ours(job):
                return True  # its worker says so
            queue = broker.queue_of(self.connection, order["queue"])
            assert self.pid is not None  # noqa: S101 - the worker's, since it was made
            if self._kept.worker != self.pid or self._kept.lost:
                # Here, not in the worker: one that never speaks to its database is 5 MB smaller.
                self.site.take_lease(self._kept, self.pid)
            self._hear, self._runs = hear, Execution("", job.id, self.connection, self.name)
            try:
                self.perform_job(job, queue, self._runs)
            except broker.OUTAGES:
                os._exit(UNTOLD)  # RQ wasn't told of the end; the ledger knows it
            self.site.flush()
            stays = served < JOBS and not self.site.tired and not runner.interrupt_asked()
            return stays and growth.is_within(MEMORY, FILES)

        return serve

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """RQ's; a horse hears here as what its worker has announced the job, and ends that."""
        super().handle_execution_ended(job, queue, heartbeat_ttl)
        if self._hear is not None and self._runs is not None:
            told = self._hear()
            self._runs.id, self._runs.created_at = told["execution"], datetime.fromtimestamp(told["created"], UTC)
            self._hear = None

    def setup_work_horse_signals(self) -> None:
        """In the horse: SIGTERM and Ctrl-C meant for all are the worker's business; its death is not."""
        host.name_process("sched-horse")
        host.die_with(self.pid or 0)
        host.wake_promptly()
        runner.install_interrupts()
