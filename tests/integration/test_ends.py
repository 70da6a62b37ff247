"""Odd ends of rows and of processes: each was a defect once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import servers
from conftest import Work, make_work
from servers import Database, commands, eventually, run, scheduler, spawn_scheduler

from nih_sched import Fail, broker
from nih_sched.settings import Settings

ONE = ("--burst", "--max-concurrent-jobs", "1", "--delay", "0.1")


def test_a_horse_that_leaves_without_a_word_has_crashed(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:vanish", *ONE, "--tries", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert [a.outcome for a in lite.attempts()] == ["crashed"] * 2
    assert lite.ran() == {"1": 2}


def test_a_crashed_row_waits_for_its_retry_too(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:die_timed", *ONE[:-1], "1.5", "--tries", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    first, second = (float(noted.split()[1]) for noted in lite.ran())
    assert second - first >= 1.5


def test_a_horse_deaf_to_its_timeout_is_killed(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:deaf", *ONE, "--tries", "0", "--timeout", "0.5")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert [(a.outcome, a.reason) for a in lite.attempts()] == [
        ("timed out", "ran on past its timeout, and was killed")
    ]


def test_nothing_of_a_row_outlives_its_timeout(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:child", *ONE, "--tries", "0", "--timeout", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.attempts()[0].outcome == "timed out"
    eventually(lambda: not commands("sleep", "77"))


def test_a_handler_can_end_its_own_children(lite: Work) -> None:
    lite.insert(1)
    done = scheduler("--job", "handlers:children", *ONE, "--tries", "0", env=lite.env, cwd=lite.folder)
    assert done.returncode == 0, lite.attempts()[0].traceback


def test_a_worker_told_to_stop_at_once_begins_no_row(lite: Work) -> None:
    scheduler("init", env=lite.env, cwd=lite.folder)
    with (
        spawn_scheduler("producer", env=lite.env, cwd=lite.folder),
        spawn_scheduler("worker", "--command", "sleep 64", env=lite.env, cwd=lite.folder) as worker,
    ):
        eventually(lambda: "started, pid" in worker.output)
        eventually(lambda: lite.sql("SELECT count(*) FROM nih_sched_sources") == [(1,)])
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGINT)
        lite.insert(1)
        assert worker.wait(20) == 0
        assert not commands("sleep", "64")
        assert lite.states() in ({"Pending": 1}, {"Queued": 1})


def test_a_fail_leaves_its_job_in_the_failed_registry(lite: Work, redis_url: str) -> None:
    lite.insert(1)
    assert scheduler("--job", "handlers:final", *ONE, env=lite.env, cwd=lite.folder).returncode == 1
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    queue = broker.queue_of(broker.connect(redis_url), source)
    assert queue.failed_job_registry.count == 1
    assert queue.scheduled_job_registry.count == 0


def test_a_reset_row_leaves_no_job_behind_in_redis(lite: Work, redis_url: str) -> None:
    lite.insert(1)
    line = ("--job", "handlers:timed", "--max-concurrent-jobs", "1", "--tries", "1", "--delay", "60")
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    scheduled = broker.queue_of(broker.connect(redis_url), source).scheduled_job_registry
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder):
        (first,) = eventually(scheduled.get_job_ids)
        lite.sql("UPDATE work SET state = 'Pending'")
        eventually(lambda: sum(lite.ran().values()) == 2)
        eventually(lambda: len(ids := scheduled.get_job_ids()) == 1 and ids != [first])
        eventually(lambda: "Queued" in lite.states())
        assert len(scheduled.get_job_ids()) == 1


def test_nobody_reading_the_output_harms_no_row(lite: Work, redis_url: str) -> None:
    lite.insert(*range(5))
    (lite.folder / "talk.py").write_text("def say(id):\n    print('x' * 100000)\n")
    line = " ".join([*servers.SCHEDULER, "--job", "talk:say", *ONE, "--quiet"])
    run(["sh", "-c", f"{line} | true"], env=lite.env, cwd=lite.folder)
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    assert broker.queue_of(broker.connect(redis_url), source).scheduled_job_registry.count == 0
    assert sum(lite.states().get(word, 0) for word in ("Done", "Failed")) == 5


@pytest.mark.postgresql
def test_short_losses_of_the_database_strand_no_row(
    postgresql_server: servers.PostgreSQL, redis_url: str, tmp_path: Path
) -> None:
    with postgresql_server.fresh() as database:
        work = make_work(database, tmp_path / "app")
        work.insert(*range(60))
        name = work.engine.url.database
        work.engine.dispose()
        env = work.env | {"REDIS_URL": redis_url}
        line = ("--job", "handlers:count", "--burst", "--max-concurrent-jobs", "2")
        with spawn_scheduler(*line, env=env, cwd=work.folder) as process:
            eventually(lambda: "row 1 done" in process.output)
            for _ in range(5):
                postgresql_server.sql(
                    f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
                    f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
                )
                time.sleep(0.4)
                postgresql_server.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
                time.sleep(0.4)
            assert process.wait(90) == 0
        assert work.states() == {"Done": 60}
        work.engine.dispose()


def test_redis_away_for_long_leaves_no_running_row_alone(
    sqlite_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = servers.Redis().start()
    try:
        monkeypatch.setenv("REDIS_URL", redis.url)
        work = make_work(sqlite_db, tmp_path / "app")
        work.insert(1)
        with spawn_scheduler("--job", "handlers:slow", "--max-concurrent-jobs", "1", "--grace", "1",
                             env=work.env, cwd=work.folder) as process:  # fmt: skip
            eventually(lambda: work.states() == {"Started": 1})
            redis.stop()
            process.terminate()
            assert process.wait(30) == 0
            assert work.states() == {"Pending": 1}
            assert "Traceback" not in process.output
    finally:
        redis.kill()


def test_settings_made_in_python_are_filled_in_and_checked() -> None:
    made = Settings(states="ready=new,done=ok", failed_val="bad")
    assert (made.ready_val, made.done_val, made.failed_val) == ("new", "ok", "bad")
    assert made.max_concurrent_jobs >= 1
    with pytest.raises(Exception, match="expected 0 to 1000"):
        Settings(tries=-1)
    assert Fail("x").args == ("x",)
