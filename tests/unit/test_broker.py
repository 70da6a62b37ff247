"""What becomes of a job, asked while it vanishes: Redis is wiped, or a worker withdraws it. Counts on their way."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest
import redis
from rq.job import Job

from nih_sched import broker
from nih_sched.broker import Queue, Send, Standing


@pytest.fixture
def queue() -> Queue:
    made = broker.queue_of(fakeredis.FakeStrictRedis(), "jobs")
    broker.send(made, [Send("one", (1,), (), 60.0)])
    return made


@pytest.fixture
def vanishing(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Redis is wiped after each job that is fetched from it."""
    fetch = Job.fetch

    def fetch_and_wipe(*args: Any, **kwargs: Any) -> Job:
        job = fetch(*args, **kwargs)
        queue.connection.flushall()
        return job

    monkeypatch.setattr(Job, "fetch", fetch_and_wipe)
    return queue


def test_a_job_that_vanishes_while_it_is_looked_at_stands_as_it_was(vanishing: Queue) -> None:
    assert broker.standing(vanishing, "one") is Standing.QUEUED
    assert broker.standing(vanishing, "one") is Standing.GONE


def test_nor_is_its_holder_an_error(vanishing: Queue) -> None:
    assert broker.holder(vanishing, "one") is None
    assert broker.holder(vanishing, "one") is None


def test_nor_is_its_removal(vanishing: Queue) -> None:
    broker.retire(vanishing, "one")
    broker.retire(vanishing, "one")
    assert broker.waiting(vanishing) == 0


def test_counts_arrive_once_and_what_is_nonsense_ends_nobody(queue: Queue) -> None:
    for _ in range(2):
        broker.tell_counts(queue, {"done": 1.5})
    assert broker.take_counts(queue.connection, "jobs") == {"done": 3.0}
    assert broker.take_counts(queue.connection, "jobs") == {}
    for field, value in ((b"\xff", "1"), (b"done", "many")):
        queue.connection.hset(broker.COUNTS + "jobs", field, value)
        assert broker.take_counts(queue.connection, "jobs") == {}
    queue.connection.set(broker.COUNTS + "jobs", "no hash")
    broker.tell_counts(queue, {"done": 1.0})
    assert broker.take_counts(queue.connection, "jobs") == {}


def test_who_may_touch_keys_of_rq_alone_goes_without_counts(redis_client: redis.Redis, redis_url: str) -> None:
    redis_client.acl_setuser("lesser", enabled=True, passwords=["+x"], keys=["rq:*"], commands=["+@all"])
    with redis.Redis.from_url(redis_url, username="lesser", password="x") as lesser:
        broker.tell_counts(broker.queue_of(lesser, "jobs"), {"done": 1.0})
        assert broker.take_counts(lesser, "jobs") == {}
    redis_client.acl_deluser("lesser")
