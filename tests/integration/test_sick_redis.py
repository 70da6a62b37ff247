"""Redis full, evicting, back with yesterday's data: it only carries, so every row runs once all the same."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from conftest import Work, make_work
from redis import Redis
from servers import Database, eventually, spawn_scheduler

from nih_sched import broker
from nih_sched.worker import Worker

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

LINE = ("--job", "handlers:count", "--max-concurrent-jobs", "2", "--delay", "0.1")


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Redis]:
    """A Redis of this test's own."""
    server = servers.Redis().start()
    monkeypatch.setenv("REDIS_URL", server.url)
    yield server
    server.kill()


@pytest.fixture
def app(sqlite_db: Database, tmp_path: Path) -> Iterator[Work]:
    """A Work on SQLite, which has nothing to do with this."""
    made = make_work(sqlite_db, tmp_path / "app")
    yield made
    made.engine.dispose()


def once_each(work: Work, count: int) -> None:
    eventually(lambda: work.states() == {"Done": count}, timeout=60)
    assert work.ran() == {str(i): 1 for i in range(count)}


def test_out_of_memory(app: Work, sick: servers.Redis) -> None:
    with spawn_scheduler(*LINE, env=app.env, cwd=app.folder) as process, Redis.from_url(sick.url) as redis:
        app.insert(*range(10))
        eventually(lambda: app.states().get("Done", 0) >= 2)
        redis.config_set("maxmemory", "500kb")
        app.insert(*range(10, 20))
        eventually(lambda: "Redis unreachable" in process.output)
        redis.config_set("maxmemory", "0")
        once_each(app, 20)
        process.terminate()
        assert process.wait(40) == 0
        assert "Traceback" not in process.output


def test_evicting_keys(app: Work, sick: servers.Redis) -> None:
    over = threading.Event()

    def evict() -> None:
        with Redis.from_url(sick.url) as redis:
            while not over.wait(0.2):
                for key in redis.keys("rq:*"):
                    if random.random() < 0.3:
                        redis.delete(key)

    with spawn_scheduler(*LINE, env=app.env, cwd=app.folder) as process:
        thread = threading.Thread(target=evict)
        thread.start()
        try:
            app.insert(*range(20))
            eventually(lambda: app.states().get("Done", 0) >= 8, timeout=60)
        finally:
            over.set()
            thread.join()
        once_each(app, 20)
        process.terminate()
        assert process.wait(40) == 0


def test_back_with_the_data_of_an_hour_ago(app: Work, sick: servers.Redis) -> None:
    with spawn_scheduler(*LINE, env=app.env, cwd=app.folder) as process, Redis.from_url(sick.url) as redis:
        app.insert(*range(30))
        eventually(lambda: app.states().get("Done", 0) >= 2)
        redis.save()  # jobs that wait, and ones that run, are in it
        eventually(lambda: app.states() == {"Done": 30}, timeout=60)
        sick.stop()
        sick.revive()
        app.insert(*range(30, 40))
        once_each(app, 40)
        process.terminate()
        assert process.wait(40) == 0


def test_the_thread_that_hears_rqs_commands_outlives_its_connection(redis_url: str) -> None:
    worker = Worker(["any"], connection=broker.connect(redis_url))
    worker.subscribe()
    thread, pubsub = worker.pubsub_thread, worker.pubsub
    assert pubsub is not None
    with contextlib.suppress(OSError):
        pubsub.connection._sock.shutdown(socket.SHUT_RDWR)  # else it reads on, for a minute
    pubsub.close()  # under its hands: pytest fails for a thread that ends with an error
    thread.join(1)
    assert thread.is_alive()
    thread.stop()  # when it next looks: in a minute, perhaps
