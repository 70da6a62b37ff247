"""A horse serves many rows; when it is replaced, and what its death between two rows means: nothing."""

from __future__ import annotations

import psutil
import pytest
from conftest import Work
from servers import Spawned, eventually, scheduler, spawn_scheduler

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


def horses(process: Spawned) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "sched-horse"]


def test_rows_of_many_jobs_run_in_one_horse(app: Work) -> None:
    app.insert(*range(1, 9))
    assert scheduler("--job", "warm:who", "--burst", *LINE, env=app.env, cwd=app.folder).returncode == 0
    assert list(app.ran().values()) == [8]
    ((jobs,),) = app.sql("SELECT count(DISTINCT rq_id) FROM nih_sched_attempts")
    assert jobs == 8


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


def test_it_ends_with_its_worker(app: Work) -> None:
    app.insert(1)
    with spawn_scheduler("--job", "warm:who", *LINE, env=app.env, cwd=app.folder) as process:
        eventually(lambda: app.states() == {"Done": 1})
        (horse,) = horses(process)
        process.terminate()
        assert process.wait(20) == 0
        assert not horse.is_running()
