"""The thin worker leaves in Redis what RQ's leaves there, with fewer words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from rq import Queue
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.suspension import suspend
from rq.worker import Worker as RQWorker

from nih_sched import broker, clock
from nih_sched.worker import thin
from nih_sched.worker.thin import ThinWorker

OURS = "tests.unit.nothing.run"  # named, never called


@pytest.fixture
def redis() -> Iterator[Any]:
    with fakeredis.FakeStrictRedis() as one:
        setattr(one, "__rq_redis_server_version", (7, 0, 0))  # RQ asks by INFO, which a fake hasn't
        yield one


def made(kind: type[Any], redis: Any) -> tuple[Any, Queue]:
    queue = broker.queue_of(redis, "work")
    worker = kind([queue], name="w", connection=redis, serializer=broker.SERIALIZER)
    worker.register_birth()
    return worker, queue


def enqueued(queue: Queue, **facts: Any) -> Job:
    return queue.enqueue(OURS, args=("work", [1]), **{"job_id": "j", "result_ttl": 500, **facts})


def through(kind: type[Any], redis: Any, *, fails: bool = False, **facts: Any) -> dict[str, Any]:
    """What a worker leaves in Redis of a job that it runs to its end, and what it showed while the job ran."""
    redis.flushall()
    worker, queue = made(kind, redis)
    enqueued(queue, **facts)
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    execution = worker.prepare_execution(job)
    worker.prepare_job_execution(job, True)
    job.started_at = job.started_at or execution.created_at
    shown = seen(redis, execution)
    try:
        if fails:
            raise ValueError("no")
        worker._finalize_success(job, queue, execution, {"done": 1})
    except ValueError as error:
        worker._finalize_failure(job, queue, execution, (ValueError, error, None))
    worker.set_state("idle")
    return {"while it ran": shown, "after": seen(redis, execution)}


def seen(redis: Any, execution: Execution) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in sorted(redis.keys("*")):
        name, kind = key.decode().replace(execution.id, "EXECUTION"), redis.type(key)
        read: dict[bytes, Callable[[], Any]] = {
            b"hash": lambda key=key: {n: v for n, v in redis.hgetall(key).items() if not is_time(n)},
            b"zset": lambda key=key: [one.replace(execution.id.encode(), b"E") for one in redis.zrange(key, 0, -1)],
            b"list": lambda key=key: redis.lrange(key, 0, -1),
            b"set": lambda key=key: {one.replace(execution.id.encode(), b"E") for one in redis.smembers(key)},
            b"stream": lambda key=key: [sorted(one) for _, one in redis.xrange(key)],
        }
        found[name] = redis.ttl(key) > 0, read[kind]() if kind in read else None
    return found


def is_time(name: bytes) -> bool:
    return name.endswith((b"_at", b"_heartbeat", b"_time")) or name in (b"id", b"birth")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"fails": True},
        {"fails": True, "retry": broker.Retry(max=1, interval=[9])},
        {"result_ttl": 0},
        {"result_ttl": -1},
        {"ttl": 60},
    ],
    ids=["done", "failed", "retried", "not kept", "kept for ever", "not for long in the queue"],
)
def test_a_job_leaves_what_it_leaves_with_rq(redis: Any, facts: dict[str, Any]) -> None:
    assert through(ThinWorker, redis, **facts) == through(RQWorker, redis, **facts)


def test_a_job_that_waits_for_one_of_ours_is_sent(redis: Any) -> None:
    worker, queue = made(ThinWorker, redis)
    first = enqueued(queue)
    queue.enqueue(OURS, job_id="second", depends_on=first)
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    execution = worker.prepare_execution(job)
    worker.prepare_job_execution(job)
    worker._finalize_success(job, queue, execution, None)
    assert queue.get_job_ids() == ["second"]


def test_a_row_runs_though_redis_cant_be_told_of_it(redis: Any) -> None:
    worker, queue = made(ThinWorker, redis)
    enqueued(queue)
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    redis.delete("rq:wip:work")
    redis.set("rq:wip:work", "of another kind")
    with pytest.raises(ResponseError):
        redis.zadd("rq:wip:work", {"a": 1})
    assert worker.prepare_execution(job).job_id == "j"


@contextmanager
def counted(redis: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The commands that are sent one by one."""
    sent: list[str] = []
    send = redis.execute_command

    def execute_command(*args: Any, **options: Any) -> Any:
        sent.append(str(args[0]))
        return send(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(redis, "execute_command", execute_command)
        yield sent


def test_a_job_is_fetched_by_two_commands(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, queue = made(ThinWorker, redis)
    worker.heartbeat()
    worker.last_cleaned_at = worker.birth_date
    enqueued(queue)
    with counted(redis, monkeypatch) as sent:
        worker.dequeue_job_and_maintain_ttl(5)
    assert sent == ["LMOVE", "HGETALL"]
    assert worker.get_state() != "idle"  # it never was


def test_a_job_that_was_deleted_while_it_waited_is_passed_over(redis: Any) -> None:
    worker, queue = made(ThinWorker, redis)
    enqueued(queue, job_id="gone")
    redis.delete("rq:job:gone")
    enqueued(queue)
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    assert job.id == "j"
    assert worker.dequeue_job_and_maintain_ttl(None) is None


def test_an_idle_one_says_so_once(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = made(ThinWorker, redis)
    monkeypatch.setattr(redis, "blmove", lambda *args: None)
    assert worker.dequeue_job_and_maintain_ttl(5, max_idle_time=0) is None
    assert redis.hget("rq:worker:w", "state") == b"idle"
    with counted(redis, monkeypatch) as sent:
        worker.dequeue_job_and_maintain_ttl(5, max_idle_time=0)
    assert "HSET" not in sent


def test_it_waits_while_redis_is_away(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, queue = made(ThinWorker, redis)
    enqueued(queue)
    pauses: list[float] = []
    monkeypatch.setattr(thin.time, "sleep", pauses.append)
    away = iter([True, True, True, False])
    take = worker._take

    def sometimes(*args: Any) -> Any:
        if next(away):
            raise RedisConnectionError
        return take(*args)

    monkeypatch.setattr(worker, "_take", sometimes)
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    assert job.id == "j"
    assert pauses == [1.0, 2.0, 2.0]


def test_heartbeats_come_each_five_seconds(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instant = time.monotonic()
    monkeypatch.setattr(clock, "monotonic", lambda: instant)
    worker, _ = made(ThinWorker, redis)

    def beats() -> bool:
        redis.hdel("rq:worker:w", "last_heartbeat")
        worker.heartbeat()
        return bool(redis.hexists("rq:worker:w", "last_heartbeat"))

    assert beats()
    assert redis.ttl("rq:worker:w") > 90
    assert not beats()
    instant += thin.HEARTBEAT
    assert beats()


def test_a_worker_that_redis_has_forgotten_is_written_down_while_its_job_runs(redis: Any) -> None:
    worker, queue = made(ThinWorker, redis)
    enqueued(queue)
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    execution = worker.prepare_execution(job)
    redis.delete("rq:worker:w")
    worker.maintain_heartbeats(job, execution)
    assert redis.hget("rq:worker:w", "queues") == b"work"
    assert redis.ttl("rq:worker:w") > 0


def test_suspension_is_looked_for_each_second(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instant = time.monotonic()
    monkeypatch.setattr(clock, "monotonic", lambda: instant)
    worker, _ = made(ThinWorker, redis)
    worker.check_for_suspension(False)
    suspend(redis)
    pauses: list[float] = []

    def resumed(seconds: float) -> None:
        pauses.append(seconds)
        assert worker.get_state() == "suspended"
        redis.delete("rq:suspended")

    monkeypatch.setattr("rq.worker.base.time.sleep", resumed)
    worker.check_for_suspension(False)
    assert pauses == []
    instant += thin.SUSPENSION
    worker.check_for_suspension(False)
    assert len(pauses) == 1
    assert worker.get_state() != "suspended"


def test_what_is_restored_is_the_job(redis: Any) -> None:
    worker, queue = made(ThinWorker, redis)
    enqueued(queue, description="one")
    job, _ = worker.dequeue_job_and_maintain_ttl(None)
    assert (job.func_name, job.args, job.description, job.get_status()) == (
        OURS,
        ["work", [1]],
        "one",
        JobStatus.QUEUED,
    )
