"""An idle worker sleeps in Redis, and yet stops at once, without losing the job that it was just handed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from conftest import Work
from redis import Redis
from redis.exceptions import NoPermissionError
from servers import Within, eventually, spawn_scheduler

from nih_sched import broker, metrics
from nih_sched.settings import Settings
from nih_sched.supervisor import Child, Supervisor
from nih_sched.worker import Worker
from nih_sched.worker.thin import WAIT

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes


@pytest.fixture
def worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One whose stop by SIGTERM can be taken back."""
    monkeypatch.setattr(Worker, "_end_horse_after", lambda self, seconds: None)
    monkeypatch.setattr(Worker, "grace", 1.0)
    connection = broker.connect(redis_url)
    made = Worker([broker.queue_of(connection, f"idle-{os.getpid()}")], connection=connection)
    before = signal.signal(signal.SIGTERM, made.request_stop)
    yield made
    signal.signal(signal.SIGTERM, before)
    made.queues[0].delete()
    connection.close()


def again(worker: Any) -> None:
    worker._stop_requested, worker._first_stop = False, None


def test_it_stops_at_once_and_loses_no_job(worker: Any) -> None:
    (queue,) = worker.queues
    fetched = queue.intermediate_queue.key
    redis = queue.connection
    outcomes = set()
    for number in range(200):
        job, comes = f"job-{number}", number % 2 == 0
        push = threading.Timer(
            random.uniform(0, 0.005), lambda job=job, comes=comes: comes and redis.rpush(queue.key, job)
        )
        stop = threading.Timer(random.uniform(0, 0.005), os.kill, (os.getpid(), signal.SIGTERM))
        began = time.monotonic()
        push.start()
        stop.start()
        got = worker._take(queue, WAIT)
        assert time.monotonic() - began < WAIT / 2
        push.join()
        stop.join()
        waiting = [one.decode() for one in redis.lrange(queue.key, 0, -1)]
        taken = [one.decode() for one in redis.lrange(fetched, 0, -1)]
        assert (got, waiting, taken) in ((job, [], [job]), (None, [job] if comes else [], []))
        outcomes.add((got is None, comes))
        redis.delete(queue.key, fetched)
        again(worker)
    assert outcomes == {(True, True), (False, True), (True, False)}


@pytest.mark.parametrize("step", ["client_id", "blmove"])
def test_it_stops_at_once_though_it_is_slow_to_begin_its_wait(
    worker: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real = getattr(Redis, step)

    def slowly(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        return real(*args)

    monkeypatch.setattr(Redis, step, slowly)
    with Within(1.5 + WAIT / 2):
        assert worker._take(worker.queues[0], WAIT) is None


def test_it_waits_on_the_connection_whose_number_it_asked_for(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = Redis.client_id, []

    def asked_while_another_takes_a_connection(self: Any) -> Any:
        number = real(self)
        taken.append(worker.connection.connection_pool.get_connection())
        return number

    monkeypatch.setattr(Redis, "client_id", asked_while_another_takes_a_connection)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with Within(0.3 + WAIT / 2):
        assert worker._take(worker.queues[0], WAIT) is None
    for one in taken:
        worker.connection.connection_pool.release(one)


def test_where_it_cant_be_called_back_it_waits_shortly(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any) -> None:
        raise NoPermissionError

    monkeypatch.setattr(Redis, "client_id", refused)
    began = time.monotonic()
    assert worker._take(worker.queues[0], WAIT) is None
    assert time.monotonic() - began < WAIT / 2


def test_it_ends_though_the_thread_that_hears_commands_has_looked_just_now(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.subscribe()
    real = worker.pubsub.unsubscribe

    def slowly() -> None:
        real()
        time.sleep(0.3)  # in which the thread gets Redis's answer, and waits again, for a minute

    monkeypatch.setattr(worker.pubsub, "unsubscribe", slowly)
    with Within(0.3 + 0.6):  # RQ waits a second for it
        worker.teardown()
    assert not worker.pubsub_thread.is_alive()


def test_five_idle_ones_stop_at_once_and_sleep_until_then(lite: Work, redis_url: str) -> None:
    line = ("--max-concurrent-jobs", "5", "--job", "handlers:count", "--poll-interval", "5")
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process, Redis.from_url(redis_url) as redis:
        tree = psutil.Process(process.pid)
        eventually(lambda: process.output.count(" started, pid ") == 5)
        time.sleep(2)
        waits, began = redis.info("commandstats")["cmdstat_blmove"]["calls"], time.monotonic()
        woken = sum(one.num_ctx_switches().voluntary for one in tree.children())
        time.sleep(5)
        seconds = time.monotonic() - began
        waits = redis.info("commandstats")["cmdstat_blmove"]["calls"] - waits
        woken = sum(one.num_ctx_switches().voluntary for one in tree.children()) - woken
        assert waits / seconds < 2  # 17, when each looked three times a second whether it had been told to stop
        assert woken / seconds < 40  # 60 and more, with a keeper and parents that looked ten times a second
        with Within(WAIT / 2):
            process.terminate()
            assert process.wait(20) == 0


def test_a_supervisor_heeds_a_stop_at_once() -> None:
    counting = metrics.Counting()
    supervisor = Supervisor(Settings(), "", counting)
    supervisor._on_stop(signal.SIGTERM, None)
    began = time.monotonic()
    supervisor._nudge.wait(5)
    assert time.monotonic() - began < 2
    supervisor._nudge.close()
    counting.close()


def test_a_supervisor_ends_with_its_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = metrics.Counting()
    supervisor = Supervisor(Settings(), "", counting)
    wait, waits = supervisor._nudge.wait, []

    def start(role: str, slot: Any = None) -> None:
        process = subprocess.Popen(["sleep", "0.3" if role == "producer" else "60"])
        supervisor._children.append(Child(role, process.pid, time.monotonic()))

    def noted(seconds: float) -> None:
        waits.append(supervisor._stops)
        wait(seconds)

    monkeypatch.setattr(supervisor, "_start", start)
    monkeypatch.setattr(supervisor._nudge, "wait", noted)
    assert supervisor.run() == 0
    assert waits
    assert not any(waits)  # a second each
    counting.close()


def test_a_killed_supervisor_takes_its_tree_along(lite: Work) -> None:
    line = ("--max-concurrent-jobs", "2", "--job", "handlers:count")
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.output.count(" started, pid ") == 2)
        children = psutil.Process(process.pid).children(recursive=True)
        assert {one.name() for one in children} == {"sched-worker", "sched-producer", "sched-keeper"}
        process.kill()
        eventually(lambda: not any(one.is_running() for one in children), timeout=10)


def test_a_worker_that_dies_is_replaced_at_once(lite: Work) -> None:
    line = ("--max-concurrent-jobs", "1", "--job", "handlers:count")
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.output.count(" started, pid ") == 1)
        time.sleep(5.2)  # one that dies young is replaced after a pause
        (one,) = [one for one in psutil.Process(process.pid).children() if one.name() == "sched-worker"]
        with Within(0.8):
            one.kill()
            eventually(lambda: process.output.count(" started, pid ") == 2, every=0.02)
