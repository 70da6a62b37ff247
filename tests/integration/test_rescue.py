"""Death in every place: rows move again, nothing of the dead goes on, and nothing runs twice at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Work, stock_worker
from redis import Redis
from servers import eventually, scheduler, spawn, spawn_scheduler
from sqlalchemy import make_url

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

LINE = ("--max-concurrent-jobs", "1", "--tries", "2", "--delay", "0.1", "--backoff", "1")


def role(process: Any, name: str) -> list[psutil.Process]:
    """The living processes of a tree with this name."""
    found = []
    for one in process.processes():
        try:
            if one.name() == f"sched-{name}" and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.NoSuchProcess:
            continue
    return found


def lives(process: psutil.Process) -> bool:
    """Whether it still does anything: who was orphaned may stay a zombie for a while."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def begun(work: Work, times: int = 1) -> Callable[[], bool]:
    """Whether rows have begun so often."""
    return lambda: sum(line.startswith("begin") for line in work.ran().elements()) >= times


def outcomes(work: Work, row: int = 1) -> list[str | None]:
    """How the row's attempts ended, oldest first."""
    found = work.sql("SELECT outcome FROM nih_sched_attempts WHERE row_key = :k ORDER BY started_at", k=f"[{row}]")
    return [record.outcome for record in found]


def freeze(processes: list[psutil.Process], work: Work) -> None:
    """Stop these, but not in the middle of a write to SQLite: nobody could write until they thaw."""

    def frozen() -> bool:
        for one in processes:
            one.suspend()
        if work.database.name != "sqlite":
            return True
        try:
            with contextlib.closing(sqlite3.connect(make_url(work.database.url).database or "", timeout=1)) as file:
                file.execute("BEGIN IMMEDIATE")
                return True
        except sqlite3.OperationalError:
            for one in processes:
                one.resume()
            return False

    eventually(frozen)


def test_a_killed_workers_rows_move_and_its_horse_is_ended(lite: Work) -> None:
    lite.insert(1)
    with spawn_scheduler("--job", "handlers:forever", *LINE, env=lite.env, cwd=lite.folder) as process:
        eventually(begun(lite))
        (horse,) = role(process, "horse")
        role(process, "worker")[0].kill()
        eventually(lambda: lite.states() == {"Done": 1})
        assert not lives(horse)
        process.terminate()
        assert process.wait(20) == 0
    assert outcomes(lite) == ["interrupted", "done"]
    assert "its worker died" in lite.attempts()[0].reason
    assert not lite.sql("SELECT * FROM nih_sched_leases")


def test_a_killed_workers_command_is_ended_before_the_row_runs_again(lite: Work) -> None:
    (lite.folder / "run.sh").write_text("echo begin >> ran.log; [ $(wc -l < ran.log) -gt 1 ] || sleep 631; true\n")
    lite.insert(1)
    with spawn_scheduler("--command", "sh run.sh", *LINE, env=lite.env, cwd=lite.folder) as process:
        eventually(begun(lite))
        sleeping = eventually(lambda: [p for p in process.processes() if p.name() == "sleep"])
        role(process, "worker")[0].kill()
        eventually(lambda: lite.states() == {"Done": 1})
        assert not any(map(lives, sleeping))
        process.terminate()
        assert process.wait(20) == 0


def test_a_killed_keeper_is_replaced_and_rows_run_on(lite: Work) -> None:
    lite.insert(1)
    with spawn_scheduler("--job", "handlers:long", "--lease", "4", *LINE, env=lite.env, cwd=lite.folder) as process:
        eventually(begun(lite))
        role(process, "keeper")[0].kill()
        eventually(lambda: lite.states() == {"Done": 1})
        assert process.output.count("keeper ended unexpectedly") == 1
        process.terminate()
        assert process.wait(20) == 0
    assert outcomes(lite) == ["done"]


def test_a_worker_alone_replaces_its_killed_keeper(lite: Work) -> None:
    lite.insert(1)
    with (
        spawn_scheduler("producer", env=lite.env, cwd=lite.folder),
        spawn_scheduler("worker", "--job", "handlers:long", "--lease", "4", env=lite.env, cwd=lite.folder) as process,
    ):
        eventually(begun(lite))
        role(process, "keeper")[0].kill()
        eventually(lambda: lite.states() == {"Done": 1})
    assert outcomes(lite) == ["done"]


def test_a_frozen_keeper_ends_no_lease_that_a_horse_still_runs_under(lite: Work) -> None:
    lite.insert(1)
    with spawn_scheduler("--job", "handlers:forever", "--lease", "3", *LINE, env=lite.env, cwd=lite.folder) as process:
        eventually(begun(lite))
        (horse,) = role(process, "horse")
        (keeper,) = role(process, "keeper")
        freeze([keeper], lite)
        eventually(lambda: not lives(horse))  # its worker stops what nobody vouches for
        keeper.resume()
        eventually(lambda: lite.states() == {"Done": 1})
        process.terminate()
        assert process.wait(20) == 0
    assert outcomes(lite) == ["interrupted", "done"]
    assert "lease" in lite.attempts()[0].reason


def test_a_killed_tree_is_rescued_by_the_next_one_on_its_host(work: Work) -> None:
    work.insert(1)
    line = ("--job", "handlers:forever", *LINE)
    with spawn_scheduler(*line, env=work.env, cwd=work.folder) as process:
        eventually(begun(work))
        process.kill_all()
    with spawn_scheduler(*line, env=work.env, cwd=work.folder) as process:
        eventually(lambda: work.states() == {"Done": 1})
        process.terminate()
        assert process.wait(40) == 0
    assert outcomes(work)[:2] == ["interrupted", "done"]


def test_a_frozen_tree_loses_its_rows_and_is_refused_when_it_thaws(work: Work) -> None:
    work.insert(1)
    line = ("--job", "handlers:forever", "--lease", "3", *LINE)
    with spawn_scheduler(*line, env=work.env, cwd=work.folder) as frozen:
        eventually(begun(work))
        (horse,) = role(frozen, "horse")
        tree = frozen.processes()
        freeze(tree, work)
        with spawn_scheduler(*line, env=work.env, cwd=work.folder) as process:
            eventually(lambda: work.states() == {"Done": 1}, timeout=40)
            for one in tree:
                with contextlib.suppress(psutil.NoSuchProcess):  # who thaws first ends the horse
                    one.resume()
            eventually(lambda: not lives(horse))
            process.terminate()
            assert process.wait(40) == 0
        frozen.terminate()
        assert frozen.wait(40) == 0
    assert outcomes(work)[:2] == ["interrupted", "done"]
    assert "its lease ran out" in work.attempts()[0].reason
    assert work.sql("SELECT state FROM work WHERE id = 1") == [("Done",)]


def test_a_flushed_redis_loses_no_row(lite: Work, redis_client: Redis) -> None:
    lite.insert(*range(1, 9))
    with spawn_scheduler("--job", "handlers:brief", *LINE, env=lite.env, cwd=lite.folder) as process:
        eventually(begun(lite))
        redis_client.flushall()
        eventually(lambda: lite.states() == {"Done": 8}, timeout=60)
        process.terminate()
        assert process.wait(20) == 0
        assert "claimed rows again" in process.output
    assert all(outcomes(lite, row) == ["done"] for row in range(1, 9))


def test_a_job_that_a_killed_worker_had_fetched_is_sent_again(lite: Work, redis_client: Redis) -> None:
    lite.insert(1)
    with spawn_scheduler("producer", env=lite.env, cwd=lite.folder) as producer:
        (key,) = eventually(lambda: redis_client.keys("rq:queue:*"))
        redis_client.lmove(key, key + b":intermediate")  # what RQ's worker does first of all
        with spawn_scheduler("worker", "--job", "handlers:count", env=lite.env, cwd=lite.folder):
            eventually(lambda: lite.states() == {"Done": 1})
        producer.terminate()
        assert producer.wait(20) == 0
    assert lite.ran() == {"1": 1}


def test_a_job_that_stands_in_the_queue_twice_runs_its_row_once(lite: Work, redis_client: Redis) -> None:
    lite.insert(1, 2)
    with spawn_scheduler("producer", env=lite.env, cwd=lite.folder):
        (key,) = eventually(lambda: redis_client.keys("rq:queue:*"))
        eventually(lambda: redis_client.llen(key) == 2)
        for rq_id in redis_client.lrange(key, 0, -1) * 3:
            redis_client.rpush(key, rq_id)
        with (
            spawn_scheduler("worker", "--job", "handlers:brief", env=lite.env, cwd=lite.folder),
            spawn_scheduler("worker", "--job", "handlers:brief", env=lite.env, cwd=lite.folder),
        ):
            eventually(lambda: lite.states() == {"Done": 2} and redis_client.llen(key) == 0)
    assert lite.ran() == {"begin 1": 1, "end 1": 1, "begin 2": 1, "end 2": 1}


@pytest.mark.parametrize(("handler", "words"), [("segfault", "SIGSEGV"), ("die", "exit code 3")])
def test_a_poison_row_spends_its_tries_and_fails_alone(lite: Work, handler: str, words: str) -> None:
    lite.insert(1, kind="poison")
    lite.insert(2, kind="good")
    (lite.folder / "nih-sched.toml").write_text(
        f'job-column = "kind"\n[handlers]\npoison = "handlers:{handler}"\ngood = "handlers:other"\n'
    )
    done = scheduler(*LINE, "--burst", env=lite.env, cwd=lite.folder)
    assert done.returncode == 1
    assert lite.states() == {"Done": 1, "Failed": 1}
    assert lite.ran() == {"1": 3, "other 2": 1}
    assert outcomes(lite) == ["crashed"] * 3
    assert all(words in a.reason and "peak memory" in a.reason for a in lite.attempts())


def test_a_row_interrupted_too_often_fails_and_says_so(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:slow", "--max-interruptions", "2", "--grace", "0", *LINE)
    for times in (1, 2):
        with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process:
            eventually(begun(lite, times))
            process.terminate()
            assert process.wait(20) == 0
    assert lite.states() == {"Failed": 1}
    assert outcomes(lite) == ["interrupted", "failed"]
    assert "interrupted 2 times in a row" in lite.attempts()[-1].reason


def test_a_stock_workers_horse_is_kept_and_its_death_is_seen(lite: Work) -> None:
    lite.insert(1)
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    env = lite.env | {"NIH_SCHED_JOB": "handlers:forever", "NIH_SCHED_LEASE": "3"}
    with spawn_scheduler("producer", *LINE[2:], "--lease", "3", env=lite.env, cwd=lite.folder) as producer:
        with spawn(stock_worker(source), env=env, cwd=lite.folder) as stock:
            eventually(begun(lite))
            time.sleep(4)  # longer than the lease: its own keeper renews it
            assert lite.states() == {"Started": 1}
            assert len(role(stock, "keeper")) == 1
            horse = int(next(line for line in lite.ran() if line.startswith("begin")).split()[2])
            os.kill(stock.pid, signal.SIGKILL)
            os.kill(horse, signal.SIGKILL)
            eventually(lambda: lite.states() == {"Queued": 1})
            assert "its worker died" in producer.output
        with spawn(stock_worker(source), env=env, cwd=lite.folder):
            eventually(lambda: lite.states() == {"Done": 1})
    assert not lite.sql("SELECT * FROM nih_sched_leases")


@pytest.mark.parametrize("stock", [False, True])
def test_code_that_holds_the_interpreter_loses_no_lease(lite: Work, stock: bool) -> None:
    lite.insert(1)
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    env = lite.env | {"NIH_SCHED_JOB": "handlers:held", "NIH_SCHED_LEASE": "2"}
    ours = spawn_scheduler("worker", env=env, cwd=lite.folder)
    with (
        spawn_scheduler("producer", "--lease", "2", env=lite.env, cwd=lite.folder) as producer,
        spawn(stock_worker(source), env=env, cwd=lite.folder) if stock else ours,
    ):
        eventually(lambda: lite.states() == {"Done": 1}, timeout=90)
        assert "rescued" not in producer.output
    assert lite.ran() == {"begin 1": 1, "end 1": 1}
    assert outcomes(lite) == ["done"]


def test_rows_without_a_claim_are_told_and_put_right_by_the_doctor_alone(lite: Work, tmp_path: Path) -> None:
    assert scheduler("init", env=lite.env, cwd=tmp_path).returncode == 0
    lite.insert(1, 2, state="Started")
    lite.insert(3, state="Queued")
    lite.insert(4, state="Done")
    assert "3 rows are Queued or Started with no open claim behind them: 1, 2, 3" in (
        scheduler("status", env=lite.env, cwd=tmp_path).stdout
    )
    done = scheduler("--job", "handlers:count", "--burst", env=lite.env, cwd=lite.folder)
    assert done.returncode == 0
    assert lite.states() == {"Started": 2, "Queued": 1, "Done": 1}  # nobody but the doctor touches them
    looked = scheduler("doctor", env=lite.env, cwd=tmp_path)
    assert looked.returncode == 1
    assert "scheduler doctor --fix" in looked.stdout
    assert scheduler("doctor", "--fix", env=lite.env, cwd=tmp_path).returncode == 0
    assert lite.states() == {"Pending": 3, "Done": 1}
    assert scheduler("doctor", env=lite.env, cwd=tmp_path).stdout == "Nothing is wrong.\n"
