"""Everything that touches RQ's queue: sending, what became of a job, due retries. Redis only carries."""

from __future__ import annotations

import contextlib
import random
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from typing import Any, TypeVar

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, Retry, get_current_job
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.registry import ScheduledJobRegistry
from rq.serializers import JSONSerializer
from rq.worker_registration import get_keys

from nih_sched.counts import NAMES
from nih_sched.model import Claim, Source
from nih_sched.redis_client import OUTAGES, address, client, connect, server_facts, why

# For those who may not import rq, and all of redis_client that is needed beside it; and all that stands below.
__all__ = ["OUTAGES", "Queue", "address", "client", "connect", "server_facts", "why"]

T = TypeVar("T")

SERIALIZER = JSONSerializer
FUNCTION = "nih_sched.runner.run"
RESULT_TTL = 500  # seconds for which rq-dashboard shows a finished job
FAILURE_TTL = 30 * 86400  # seconds for which it shows a failed one; the ledger keeps the truth longer
COUNTS = "nih_sched:counts:"  # and a source's name: what stock workers have counted
COUNTS_TTL = 86400  # seconds for which they wait for a producer
MOST_SECONDS = 2**31 - 1  # that RQ's alarm may be set to: an int of C. docs.python.org/3/library/signal.html
RQ_SLACK = 3600  # seconds by which RQ's timeout comes after ours: an outcome may have to wait for the database


@dataclass(frozen=True)
class Send:
    """One RQ job to be sent: claims of one source, and the waits of the tries that are left."""

    rq_id: str
    claim_ids: tuple[int, ...]
    intervals: tuple[float, ...]
    timeout: float


def job_for(source: Source, claims: Sequence[Claim], rq_id: str) -> Send:
    """The job that carries these claims.

    A job of one claim has the waits of the tries that it has left. One of several has none: a row that fails in it goes
    on as a job of its own.
    """
    waits: Sequence[float] = ()
    if len(claims) == 1:
        waits = source.backoff.intervals(claims[0].tries, random.random, spent=claims[0].failures)
    return Send(rq_id, tuple(claim.id for claim in claims), tuple(waits), source.timeout)


def jobs_for(source: Source, claims: Iterable[Claim]) -> list[Send]:
    """The jobs that carry these claims: one for each RQ id that they name."""
    batches: dict[str, list[Claim]] = {}
    for claim in claims:
        batches.setdefault(claim.rq_id, []).append(claim)
    return [job_for(source, batch, rq_id) for rq_id, batch in batches.items()]


def new_rq_id() -> str:
    """A fresh token for one send, so that a leftover job is never in the way."""
    return secrets.token_hex(10)


def queue_of(connection: Redis, source: str) -> Queue:
    """The RQ queue of a source; it has the source's name."""
    return Queue(source, connection=connection, serializer=SERIALIZER)


def send(queue: Queue, sends: Sequence[Send]) -> None:
    """Enqueue jobs, each with Retry(max=tries, interval=[…]) of exactly the tries that are left."""
    if sends:
        queue.enqueue_many([Queue.prepare_data(FUNCTION, **_facts(queue, one)) for one in sends])


def send_later(queue: Queue, sends: Sequence[tuple[Send, float]]) -> None:
    """Put jobs into RQ's scheduled registry, where rq-dashboard shows them; the producer moves what is due.

    Args:
        queue: the source's.
        sends: each job, and in how many seconds it is due.
    """
    with queue.connection.pipeline() as pipeline:
        for one, seconds in sends:
            job = queue.create_job(FUNCTION, **_facts(queue, one))
            queue.schedule_job(job, datetime.now(UTC) + timedelta(seconds=seconds), pipeline=pipeline)
        pipeline.execute()


def _facts(queue: Queue, one: Send) -> dict[str, Any]:
    intervals: list[Any] = list(one.intervals)  # RQ says int and takes fractions too
    return {
        "args": (queue.name, list(one.claim_ids)),
        "timeout": min(int(one.timeout * len(one.claim_ids)) + RQ_SLACK, MOST_SECONDS),
        "result_ttl": RESULT_TTL,
        "failure_ttl": FAILURE_TTL,
        # Ids only: rq-dashboard shows this text without escaping it.
        "description": f"{queue.name} {_named(one.claim_ids)}",
        "job_id": one.rq_id,
        "retry": Retry(max=len(intervals), interval=intervals) if intervals else None,
    }


def _named(claim_ids: Sequence[int]) -> str:
    if len(claim_ids) == 1:
        return f"claim {claim_ids[0]}"
    return f"{len(claim_ids)} claims, {min(claim_ids)} to {max(claim_ids)}"


def _scheduled(queue: Queue) -> ScheduledJobRegistry:
    return ScheduledJobRegistry(queue=queue)  # type: ignore[no-untyped-call]


def waiting(queue: Queue) -> int:
    """How many jobs wait in the queue."""
    return int(queue.count)


def queued_ids(queue: Queue) -> set[str]:
    """The ids of all jobs that wait in the queue."""
    return set(queue.get_job_ids())


def worker_count(queue: Queue) -> int:
    """How many RQ workers, ours or stock ones, serve the queue."""
    return len(get_keys(queue=queue))


def promote(queue: Queue, rq_id: str) -> bool:
    """Move a job whose retry is due from the scheduled registry into the queue; False when it isn't there."""
    if not queue.connection.zrem(_scheduled(queue).key, rq_id):
        return False
    try:
        job = Job.fetch(rq_id, connection=queue.connection, serializer=SERIALIZER)
    except NoSuchJobError:
        return False
    queue._enqueue_job(job)  # what RQ's own scheduler calls; Queue has no public way to send a stored job
    return True


class Standing(Enum):
    """Where a job stands, as far as the producer must know."""

    QUEUED = auto()
    BUSY = auto()  # a worker has it, or is about to put it into the scheduled registry
    SCHEDULED = auto()  # in the scheduled registry, as RQ sees it
    GONE = auto()


def standing(queue: Queue, rq_id: str) -> Standing:
    """Whether RQ still has work to do with a job."""
    try:
        job = Job.fetch(rq_id, connection=queue.connection, serializer=SERIALIZER)
    except NoSuchJobError:
        return Standing.GONE
    status = _status(job)
    if status == JobStatus.QUEUED:
        return Standing.QUEUED
    known = {JobStatus.STARTED: Standing.BUSY, JobStatus.SCHEDULED: Standing.SCHEDULED}
    return known.get(status, Standing.GONE)


def holder(queue: Queue, rq_id: str) -> str | None:
    """The worker that has begun a job, as RQ sees it; None if none has, or the job is gone."""
    try:
        job = Job.fetch(rq_id, connection=queue.connection, serializer=SERIALIZER)
    except NoSuchJobError:
        return None
    return job.worker_name if _status(job) == JobStatus.STARTED else None


def _status(job: Job) -> JobStatus:
    return job.get_status(refresh=False)  # as it was fetched: asked for anew, one that has gone since is an error


def withdraw(queue: Queue, rq_ids: Iterable[str]) -> None:
    """Take jobs whose claims are void out of the queue and out of Redis."""
    connection = queue.connection
    with connection.pipeline() as pipeline:
        for rq_id in rq_ids:
            pipeline.lrem(queue.key, 1, rq_id)
            pipeline.zrem(_scheduled(queue).key, rq_id)
            pipeline.delete(Job.key_for(rq_id))
        pipeline.execute()


def retire(queue: Queue, rq_id: str) -> None:
    """Remove a job that died with its worker from wherever RQ still shows it; RQ would find out in some minutes."""
    queue.intermediate_queue.remove(rq_id)
    with contextlib.suppress(NoSuchJobError, InvalidJobOperation):  # the latter: it has gone since it was fetched
        Job.fetch(rq_id, connection=queue.connection, serializer=SERIALIZER).delete()


def forget(queue: Queue) -> None:
    """Remove a source's queue with all its jobs and registries."""
    queue.delete(delete_jobs=True)


def current_queue() -> Queue | None:
    """Inside an RQ job: the queue it came from, on the worker's own connection."""
    job = get_current_job()
    return None if job is None else queue_of(job.connection, job.origin)


def tell_counts(queue: Queue, counts: Mapping[str, float]) -> None:
    """Have a producer of the source add these up: for who has nobody else to tell. What Redis won't take is lost."""
    key = COUNTS + queue.name
    with contextlib.suppress(RedisError), queue.connection.pipeline() as pipeline:  # away, or no right to this key
        for name, value in counts.items():
            pipeline.hincrbyfloat(key, name, value)
        pipeline.expire(key, COUNTS_TTL)
        pipeline.execute()


def take_counts(connection: Redis, source: str) -> dict[str, float]:
    """What was told of a source since it was last asked for; nothing while Redis won't say, or says nonsense."""
    with contextlib.suppress(RedisError, ValueError), connection.pipeline() as pipeline:
        pipeline.hgetall(COUNTS + source)
        pipeline.delete(COUNTS + source)
        found, _ = pipeline.execute()
        return {name.decode(): float(value) for name, value in found.items() if name.decode() in NAMES}
    return {}


def spend_retries() -> None:
    """Inside an RQ job: leave it no retries, so that its failure is final for RQ too."""
    job = get_current_job()
    if job is not None:
        job.retries_left = 0


def patiently(work: Callable[[], T], seconds: float = 5.0) -> T:
    """Run `work`, again while Redis is away, for some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except OUTAGES:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)
