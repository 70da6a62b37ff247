"""A horse serves many rows; when it is replaced, and what its death between two rows means: nothing."""

from __future__ import annotations

import time

import psutil
import pytest
import servers
from conftest import Work
from redis import Redis
from servers import Spawned, eventually, scheduler, spawn_scheduler

from nih_sched.worker.rq_worker import REST
from nih_sched.worker.thin import WAIT

LINE = ("--max-concurrent-jobs", "1", "--batch-size", "1", "--delay", "0.2", "--timeout", "20")
HANDLERS = """
import os, time
from handlers import note

KEPT = []

def who(id):
    note(os.getpid())

def second_dies(id, attempt):
    note(os.getpid())
    if id == 2 and attempt == 1:
        os.kill(os.getpid(), 9)

def frozen(id):
    import gc
    note(gc.get_freeze_count() > 10_000)

def leaks_files(id):
    note(os.getpid())
    KEPT.extend(open(os.devnull) for _ in range(60))

def leaks_memory(id):
    note(os.getpid())
    KEPT.append(bytearray(os.urandom(1)) * (150 << 20))
"""


@pytest.fixture
def app(lite: Work) -> Work:
    (lite.folder / "warm.py").write_text(HANDLERS)
    return lite


def named(name: str, process: Spawned) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == name]


def horses(process: Spawned) -> list[psutil.Process]:
    return named("sched-horse", process)


def test_rows_of_many_jobs_run_in_one_horse(app: Work, redis_url: str) -> None:
    app.insert(*range(1, 9))
    assert scheduler("--job", "warm:who", "--burst", *LINE, env=app.env, cwd=app.folder).returncode == 0
    assert list(app.ran().values()) == [8]
    jobs = [rq_id for (rq_id,) in app.sql("SELECT DISTINCT rq_id FROM nih_sched_attempts")]
    assert len(jobs) == 8
    with Redis.from_url(redis_url) as redis:
        for rq_id in jobs:
            assert [key.decode() for key in redis.keys(f"rq:execution*:{rq_id}*")] == []
            assert redis.hget(f"rq:job:{rq_id}", "status") == b"finished"
            (_, told), *_ = redis.xrevrange(f"rq:results:{rq_id}")
            assert told[b"execution_id"]
        source = redis.hget(f"rq:job:{jobs[0]}", "origin").decode()
        assert redis.zcard(f"rq:wip:{source}") == redis.llen(f"rq:queue:{source}:intermediate") == 0


def test_a_job_takes_half_the_commands_that_rq_sends(app: Work) -> None:
    server = servers.Redis().start()
    try:
        app.insert(*range(100))
        env = app.env | {"REDIS_URL": server.url}
        assert scheduler("--job", "warm:who", "--burst", *LINE, env=env, cwd=app.folder).returncode == 0
        with Redis.from_url(server.url) as redis:
            sent = sum(one["calls"] for one in redis.info("commandstats").values())
    finally:
        server.kill()
    assert sent / 100 < 40  # 57 as RQ does it, and the producer's


def test_redis_away_while_a_row_runs_is_no_matter(app: Work) -> None:
    server = servers.Redis().start()
    try:
        env = app.env | {"REDIS_URL": server.url}
        with spawn_scheduler("--job", "handlers:brief", *LINE, env=env, cwd=app.folder):
            app.insert(1)
            eventually(lambda: app.ran()["begin 1"])
            server.stop()
            eventually(lambda: app.states() == {"Done": 1})
            server.revive()
            app.insert(2)
            eventually(lambda: app.states() == {"Done": 2})
    finally:
        server.kill()
    assert app.ran() == {f"{word} {row}": 1 for word in ("begin", "end") for row in (1, 2)}


def test_one_that_died_between_two_rows_costs_nobody_a_try(app: Work) -> None:
    with spawn_scheduler("--job", "warm:who", *LINE, env=app.env, cwd=app.folder) as process:
        app.insert(1)
        eventually(lambda: app.states() == {"Done": 1})
        (horse,) = horses(process)
        horse.kill()
        app.insert(2)
        eventually(lambda: app.states() == {"Done": 2})
        assert [one.pid for one in horses(process)] != [horse.pid]
    assert [(one.attempt, one.outcome) for one in app.attempts(2)] == [(1, "done")]


def test_one_that_dies_with_a_row_is_replaced(app: Work) -> None:
    app.insert(1, 2, 3)
    assert scheduler("--job", "warm:second_dies", "--burst", *LINE, env=app.env, cwd=app.folder).returncode == 0
    assert sorted(app.ran().values()) == [2, 2]  # the second row's two attempts are in two horses
    assert [one.outcome for one in app.attempts(2)] == ["crashed", "done"]


@pytest.mark.parametrize("leaks", ["leaks_files", "leaks_memory"])
def test_one_that_has_grown_is_replaced(app: Work, leaks: str) -> None:
    app.insert(*range(1, 6))
    assert scheduler("--job", f"warm:{leaks}", "--burst", *LINE, env=app.env, cwd=app.folder).returncode == 0
    assert sorted(app.ran().values()) == [1, 2, 2]


def test_one_without_a_job_for_ten_seconds_ends_and_the_next_row_has_another(app: Work) -> None:
    with spawn_scheduler("--job", "warm:who", *LINE, env=app.env, cwd=app.folder) as process:
        eventually(lambda: named("sched-worker", process))
        time.sleep(1)
        assert not app.sql("SELECT * FROM nih_sched_leases")  # there is nothing to vouch for
        app.insert(1)
        eventually(lambda: app.states() == {"Done": 1})
        (worker,) = named("sched-worker", process)
        assert [one.pid for one in app.sql("SELECT pid FROM nih_sched_leases")] == [worker.pid]
        assert horses(process)
        time.sleep(REST / 2)
        assert horses(process)
        eventually(lambda: not horses(process), timeout=REST + WAIT)
        # It has neither asked the database nor had its memory gone through: what it has from its parent is shared.
        assert worker.memory_full_info().uss < 15 << 20
        app.insert(2)
        eventually(lambda: app.states() == {"Done": 2})
        assert [one.pid for one in app.sql("SELECT pid FROM nih_sched_leases")] == [worker.pid]
    assert list(app.ran().values()) == [1, 1]


def test_what_was_there_before_the_fork_is_no_garbage_collectors_business(app: Work) -> None:
    app.insert(1)
    assert scheduler("--job", "warm:frozen", "--burst", *LINE, env=app.env, cwd=app.folder).returncode == 0
    assert app.ran() == {"True": 1}


def test_it_ends_with_its_worker(app: Work) -> None:
    app.insert(1)
    with spawn_scheduler("--job", "warm:who", *LINE, env=app.env, cwd=app.folder) as process:
        eventually(lambda: app.states() == {"Done": 1})
        (horse,) = horses(process)
        process.terminate()
        assert process.wait(20) == 0
        assert not horse.is_running()


def test_one_with_a_start_of_the_users_stays(app: Work) -> None:
    line = ("--job", "warm:who", "--on-horse-start", "handlers:mark", *LINE)
    with spawn_scheduler(*line, env=app.env, cwd=app.folder) as process:
        app.insert(1)
        eventually(lambda: app.states() == {"Done": 1})
        before = horses(process)
        time.sleep(REST + 3)
        assert horses(process) == before != []
