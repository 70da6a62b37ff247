"""RQ's worker with fewer words to Redis: the same keys, written together, and no oftener than anybody needs them."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Queue
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.utils import now
from rq.worker import Worker as RQWorker
from rq.worker.base import WorkerStatus

from nih_sched import broker, clock

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

HEARTBEAT = 5.0  # seconds between a worker's heartbeats; what they prolong lives for 90 s and more
WAIT = 5.0  # seconds for which an idle worker waits in Redis at a time
SHORTLY = 0.3  # the same, for one that can't be called back from there
SUSPENSION = 1.0  # seconds between looks whether workers are suspended
WITH_LMOVE = (6, 2, 0)  # the first Redis that has it

Raw = dict[bytes, bytes]  # a job as Redis holds it


class ThinWorker(RQWorker):
    """One that serves a single queue; several are served as RQ does it."""

    max_connection_wait_time = 2.0  # seconds between tries while Redis is away; RQ's 60 would leave rows waiting

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("serializer", broker.SERIALIZER)
        super().__init__(*args, **kwargs)
        self._next_heartbeat = 0.0
        self._next_look = 0.0  # whether workers are suspended
        self._fetched: tuple[str, Raw] = ("", {})  # the job that we fetched last

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ's, in one round trip, and no oftener than is of use."""
        if clock.monotonic() < self._next_heartbeat:
            return
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)
        else:
            with self.connection.pipeline(transaction=False) as own:
                super().heartbeat(timeout, own)
                own.execute()
        self._next_heartbeat = clock.monotonic() + HEARTBEAT

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """RQ's, which looks at what its heartbeat was answered: so there must be one."""
        self._next_heartbeat = 0.0
        super().maintain_heartbeats(job, execution)

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """RQ's, unless Redis knows it."""
        if pipeline is not None or state != self._state:
            super().set_state(state, pipeline)

    def check_for_suspension(self, burst: bool) -> None:
        """RQ's, each second, not before each job."""
        if burst or clock.monotonic() >= self._next_look:
            super().check_for_suspension(burst)
            self._next_look = clock.monotonic() + SUSPENSION

    @property
    def _redis_version(self) -> tuple[int, int, int]:
        version: tuple[int, int, int] = self.get_redis_server_version()  # type: ignore[no-untyped-call]
        return version

    # Fetching

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """RQ's; asks for a job before it says that it is idle, and keeps what it got for the horse."""
        if len(self.queues) != 1 or self._redis_version < WITH_LMOVE:
            shortly: Any = None if timeout is None else min(timeout, SHORTLY)
            return super().dequeue_job_and_maintain_ttl(shortly, max_idle_time)
        (queue,) = self.queues
        began, pause = clock.monotonic(), 1.0
        while True:
            try:
                self.heartbeat()
                if self.should_run_maintenance_tasks:
                    self.run_maintenance_tasks()  # type: ignore[no-untyped-call]
                rq_id = self._take(queue, timeout)
                if rq_id is not None:
                    if job := self._fetch(rq_id):
                        self.log.info("Worker %s: %s: %s (%s)", self.name, queue.name, job.description, job.id)
                        return job, queue
                elif timeout is None or (max_idle_time is not None and clock.monotonic() - began >= max_idle_time):
                    return None
            except (RedisConnectionError, RedisTimeoutError):
                time.sleep(pause)
                pause = min(pause * self.exponential_backoff_factor, self.max_connection_wait_time)

    def _take(self, queue: Queue, timeout: float | None) -> str | None:
        """The next job's id; None when there was none within so many seconds."""
        fetched = queue.intermediate_queue.key
        rq_id: Any = self.connection.lmove(queue.key, fetched)
        if rq_id is None and timeout is not None:
            self.set_state(WorkerStatus.IDLE)
            rq_id = self._wait(self.connection, queue.key, fetched, timeout)
        return None if rq_id is None else rq_id.decode()

    def _wait(self, connection: Redis, queued: str, fetched: str, timeout: float) -> Any:
        fractions: Any = timeout  # redis-py says int where Redis takes them
        return connection.blmove(queued, fetched, fractions)

    @property
    def dequeue_timeout(self) -> float:  # type: ignore[override]  # RQ says int, and hands it to BLMOVE as it is
        """Seconds of waiting for a job, after which RQ's loop goes round."""
        return WAIT

    @property
    def connection_timeout(self) -> float:  # type: ignore[override]
        """Seconds after which a Redis that doesn't answer is frozen."""
        return 2 * WAIT

    def _fetch(self, rq_id: str) -> Job | None:
        raw: Any = self.connection.hgetall(self.job_class.key_for(rq_id))
        if not raw:
            return None  # it was deleted while it waited
        self._fetched = rq_id, raw
        self.fetched(rq_id, raw)
        return self.restored(rq_id, raw)

    def fetched(self, rq_id: str, raw: Raw) -> None:
        """Called when a job has come, before it is looked at, with what Redis holds of it."""

    def raw_of(self, job: Job) -> Raw:
        """What Redis holds of a job that we or RQ have fetched."""
        rq_id, raw = self._fetched
        if rq_id == job.id:
            return raw
        as_sent: Any = self.connection.get_encoder().encode
        return {as_sent(name): as_sent(value) for name, value in job.to_dict().items()}

    def restored(self, rq_id: str, raw: Raw) -> Job:
        """A job from what Redis holds of it."""
        job = self.job_class(rq_id, connection=self.connection, serializer=self.serializer)
        job.restore(raw)
        job.redis_server_version = self._redis_version
        return job

    # A job's begin and end

    def prepare_execution(self, job: Job) -> Execution:
        """RQ's, with what RQ's horse would say before it runs a job; a row runs even if Redis can't be told."""
        ttl = self.get_heartbeat_ttl(job)
        key = self.queue_class.redis_queue_namespace_prefix + job.origin
        with self.connection.pipeline(transaction=False) as pipeline:
            execution = Execution.create(job, ttl, pipeline, worker_name=self.name)
            self.executions[execution.id] = execution
            self.set_state(WorkerStatus.BUSY, pipeline)
            job.prepare_for_execution(self.name, pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(IntermediateQueue.get_intermediate_queue_key(key), 1, job.id)
            with contextlib.suppress(RedisError):
                pipeline.execute()
        return execution

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """RQ's, in the horse; its worker tells Redis, while the horse begins."""
        job.worker_name = self.name
        job.started_at = job.last_heartbeat = now()
        job._status = JobStatus.STARTED

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """RQ's; the job's end is saved with the rest."""
        job.ended_at = job.last_heartbeat = now()

    def handle_job_success(
        self, job: Job, queue: Queue, started_job_registry: StartedJobRegistry, execution: Execution
    ) -> None:
        """RQ's, in one round trip: looks for jobs that wait for this one at the same time, for ours never have any."""
        ttl = job.get_result_ttl(self.default_result_ttl)
        if ttl <= 0 or job.repeats_left or job.has_rate_limit:
            super().handle_job_success(job, queue, started_job_registry, execution)
            return
        assert job.started_at is not None  # noqa: S101 - prepare_job_execution has set both
        assert job.ended_at is not None  # noqa: S101
        with self.connection.pipeline(transaction=False) as pipeline:
            job._handle_success(
                ttl,
                pipeline=pipeline,
                worker_name=self.name,
                execution_id=execution.id,
                execution_started_at=execution.created_at,
                execution_ended_at=job.ended_at,
            )
            pipeline.expire(job.key, ttl)
            self.cleanup_execution(job, pipeline=pipeline, execution=execution)
            self.increment_successful_job_count(pipeline)
            self.increment_total_working_time(job.ended_at - job.started_at, pipeline)
            pipeline.exists(job.dependents_key)
            *_, awaited = pipeline.execute()
        if awaited:
            queue.enqueue_dependents(job)
