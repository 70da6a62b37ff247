"""A row that is cancelled while it runs is stopped with all its processes; a pause holds whatever is restarted."""

from __future__ import annotations

import time

import pytest
from conftest import Work, stock_worker
from servers import Spawned, Within, commands, eventually, scheduler, spawn, spawn_scheduler

LINE = ("--max-concurrent-jobs", "1", "--delay", "0.2")
HANDLERS = """
import subprocess, time
from handlers import note

def first_long(id):
    note("begin", id)
    if id == 1:
        subprocess.Popen(["sleep", "78"])
        try:
            time.sleep(60)
        finally:
            note("left", id)

def stubborn(id):
    note("begin", id)
    subprocess.Popen(["sleep", "78"], start_new_session=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            note("heard", id)
"""


@pytest.fixture
def app(work: Work) -> Work:
    (work.folder / "steered.py").write_text(HANDLERS)
    return work


@pytest.fixture
def small(lite: Work) -> Work:
    (lite.folder / "steered.py").write_text(HANDLERS)
    return lite


def cancelled_within(work: Work, seconds: float) -> None:
    """Cancel row 1, which runs, as its owner does, and see it end."""
    eventually(lambda: work.ran()["begin 1"] and commands("sleep", "78"), timeout=40)
    time.sleep(0.5)
    with Within(seconds):
        work.sql("UPDATE work SET state = 'Cancelled' WHERE id = 1")
        eventually(
            lambda: [a.outcome for a in work.attempts()] == ["cancelled"] and not commands("sleep", "78"), timeout=30
        )
    assert work.sql("SELECT state FROM work WHERE id = 1") == [("Cancelled",)]


def test_a_running_row_whose_owner_cancels_it_is_stopped_and_its_batch_goes_on(app: Work) -> None:
    app.insert(1, 2, 3)
    line = ("run", "--job", "steered:first_long", "--batch-size", "3", *LINE)
    with spawn_scheduler(*line, env=app.env, cwd=app.folder):
        cancelled_within(app, 5)
        eventually(lambda: app.states() == {"Cancelled": 1, "Done": 2}, timeout=30)
    assert app.ran() == {"begin 1": 1, "left 1": 1, "begin 2": 1, "begin 3": 1}
    (attempt,) = app.attempts()
    assert (attempt.reason, attempt.open_key) == ("cancelled while it ran", None)


def test_one_that_will_not_leave_is_killed(small: Work) -> None:
    small.insert(1)
    with spawn_scheduler("run", "--job", "steered:stubborn", *LINE, env=small.env, cwd=small.folder) as process:
        cancelled_within(small, 5)
        assert small.attempts()[0].reason == "cancelled while it ran; it had to be killed"
        _goes_on(small, process)


def _goes_on(work: Work, process: Spawned) -> None:
    work.insert(2)
    eventually(lambda: work.ran()["begin 2"] == 1, timeout=30)
    assert work.ran()["begin 1"] == 1
    assert process.poll() is None


def test_a_command_is_stopped_with_all_that_it_has_started(small: Work) -> None:
    small.insert(1)
    command = "sh -c 'trap \"\" TERM; echo begin {id} >> ran.log; sleep 78 & wait; sleep 78'"
    with spawn_scheduler("run", "--command", command, *LINE, env=small.env, cwd=small.folder):
        cancelled_within(small, 5)


@pytest.mark.parametrize("job", ["first_long", "stubborn"])
def test_a_stock_workers_row_is_stopped_too(small: Work, job: str) -> None:
    small.insert(1)
    source = scheduler("source", env=small.env, cwd=small.folder).stdout.strip()
    env = small.env | {"NIH_SCHED_JOB": f"steered:{job}"}
    with (
        spawn(stock_worker(source), env=env, cwd=small.folder),
        spawn_scheduler("producer", "--job", f"steered:{job}", *LINE, env=small.env, cwd=small.folder),
    ):
        cancelled_within(small, 5)
        small.insert(2)
        eventually(lambda: small.ran()["begin 2"] == 1, timeout=30)
    assert len(small.attempts()) == 1


def begun(work: Work) -> int:
    return sum(line.startswith("begin ") for line in work.ran().elements())


def test_a_paused_source_starts_nothing_until_it_is_resumed(small: Work) -> None:
    small.insert(*range(1, 9))
    line = ("run", "--job", "handlers:brief", *LINE)
    with spawn_scheduler(*line, env=small.env, cwd=small.folder) as process:
        eventually(lambda: begun(small) == 1, timeout=30)
        paused = scheduler("pause", "--reason", "vendor down", env=small.env, cwd=small.folder)
        assert paused.stdout.startswith("Paused work-Pending-"), paused.stdout + paused.stderr
        ran = begun(small)
        assert ran < 8
        eventually(lambda: small.states() == {"Done": ran, "Pending": 8 - ran}, timeout=30)
        eventually(lambda: "is paused by" in process.output, timeout=30)
        process.terminate()
        process.wait(20)
    with spawn_scheduler(*line, env=small.env, cwd=small.folder) as process:
        small.insert(9)
        eventually(lambda: "is paused by" in process.output, timeout=30)
        time.sleep(1)
        assert small.states() == {"Done": ran, "Pending": 9 - ran}
        assert begun(small) == ran
        assert scheduler("resume", env=small.env, cwd=small.folder).stdout.startswith("Resumed work-Pending-")
        eventually(lambda: begun(small) > ran, timeout=10)


def test_a_producer_with_nothing_to_do_says_that_its_source_is_paused(small: Work) -> None:
    with spawn_scheduler("run", "--job", "handlers:brief", *LINE, env=small.env, cwd=small.folder) as process:
        eventually(lambda: " started, pid" in process.output, timeout=30)
        steered(small, "pause", "--reason", "vendor down")
        eventually(lambda: "is paused by" in process.output, timeout=30)
        steered(small, "resume")
        eventually(lambda: "isn't paused any more" in process.output, timeout=30)


def steered(work: Work, *line: str, code: int = 0) -> str:
    """What a command says, on both streams."""
    done = scheduler(*line, env=work.env, cwd=work.folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_rows_are_requeued_and_cancelled_by_key_or_by_state(small: Work) -> None:
    small.insert(1, 2, state="Failed", kind="it's 4%")
    small.insert(3, state="Failed")
    small.insert(4, 5)
    assert "Requeue 2 rows of main.work? Add --yes" in steered(small, "requeue", "1", "4", code=2)
    said = steered(small, "requeue", "1", "4", "99", "--yes", code=1)
    first, logged, *rest = said.splitlines()
    assert first == "Requeued 1 row."
    assert logged.endswith("set 1 rows back to ready: 1")
    assert rest == ["Left 1 as they are: 4 is Pending.", "1 are not in the table: 99."]
    by_state = ("requeue", "--state", "failed", "--where", "kind LIKE '%4\\%' ESCAPE '\\' -- so", "--yes")
    assert "Requeued 1 row." in steered(small, *by_state)
    assert small.sql("SELECT id FROM work WHERE state = 'Failed'") == [(3,)]
    assert "Cancelled 2 rows." in steered(small, "cancel", "--state", "ready", "--limit", "2", "--yes")
    assert small.states() == {"Cancelled": 2, "Failed": 1, "Pending": 2}
    assert "There are no such rows." in steered(small, "requeue", "--state", "failed", "--since", "1h")
    for wrong, why in {
        ("cancel", "1", "--limit", "1"): "go with --state",
        ("cancel", "x"): "'x' is no key of main.work (id)",
        ("cancel", "--state", "ready", "--where", "nonesuch > 1", "--yes"): "--where 'nonesuch > 1' can't be used",
    }.items():
        assert why in steered(small, *wrong, code=2)
