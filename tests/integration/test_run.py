"""The main job through the real command line: rows go from ready to final, once, on every database."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Work
from servers import eventually, scheduler, spawn_scheduler
from sqlalchemy import inspect

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

USERS_LINE = (
    "--status-key state --ready-val Pending --max-concurrent-jobs 5 --tries 3 --delay 2.0 --backoff 2.0".split()
)


def test_the_users_line_works_and_stops_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    made = scheduler("init", "--sample", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with spawn_scheduler(*USERS_LINE, cwd=tmp_path) as process:
        eventually(lambda: "row 20 failed for good" in process.output and "row 19 done" in process.output, timeout=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.output
    shown = scheduler("status", cwd=tmp_path, env={"COLUMNS": "150"}).stdout
    assert "Done" in shown
    assert "this sample row can't be done" in shown


def test_help_shows_the_six_options_first_with_meanings_and_defaults() -> None:
    text = " ".join(scheduler("--help").stdout.split())
    six = ["--max-concurrent-jobs", "--status-key", "--ready-val", "--tries", "--delay", "--backoff"]
    places = [text.index(option) for option in six]
    assert places == sorted(places)
    assert places[-1] < text.index("Commands:")
    for default in ("state", "Pending", "3", "2", "the cores"):
        assert f"default: {default}" in text
    assert "a row runs at most 1 + N times" in text


def test_four_instances_run_each_row_once_while_others_insert(work: Work) -> None:
    total = 800 if work.database.name == "sqlite" else 400  # for time; by hand it was 2,000 everywhere
    work.insert(*range(total * 3 // 4))
    scheduler("init", env=work.env, cwd=work.folder)

    def insert_meanwhile() -> None:
        for first in range(total * 3 // 4, total, 10):
            work.insert(*range(first, first + 10))

    line = ("--job", "handlers:count", "--max-concurrent-jobs", "4", "--quiet")
    with (
        spawn_scheduler(*line, env=work.env, cwd=work.folder, grace=20) as one,
        spawn_scheduler(*line, env=work.env, cwd=work.folder, grace=20) as two,
        spawn_scheduler(*line, env=work.env, cwd=work.folder, grace=20) as three,
        spawn_scheduler(*line, env=work.env, cwd=work.folder, grace=20) as four,
    ):
        inserter = threading.Thread(target=insert_meanwhile)
        inserter.start()
        eventually(lambda: work.states() == {"Done": total}, timeout=240, every=0.5)
        inserter.join()
        for process in (one, two, three, four):
            process.terminate()
        assert [process.wait(40) for process in (one, two, three, four)] == [0, 0, 0, 0]
    assert len(work.ran()) == total
    assert set(work.ran().values()) == {1}


def test_retries_start_at_the_right_time_and_leave_four_tracebacks(lite: Work) -> None:
    lite.insert(1)
    done = scheduler(
        *"--job handlers:timed --burst --max-concurrent-jobs 2 --tries 3 --delay 0.5 --backoff 2".split(),
        env=lite.env,
        cwd=lite.folder,
    )
    assert done.returncode == 1, done.stderr
    starts = [float(line.split()[1]) for line in lite.ran()]
    assert len(starts) == 4
    for expected, gap in zip((0.5, 1.0, 2.0), (b - a for a, b in pairwise(starts)), strict=True):
        assert gap >= expected
    history = lite.attempts()
    assert [a.attempt for a in history] == [1, 2, 3, 4]
    assert all(f"attempt {n} of 1" in a.traceback for n, a in enumerate(history, 1))
    assert lite.states() == {"Failed": 1}


def test_burst_tells_by_its_exit_code_and_max_rows_is_a_canary(lite: Work) -> None:
    lite.insert(*range(30))
    canary = scheduler("--job", "handlers:count", "--max-rows", "10", env=lite.env, cwd=lite.folder)
    assert canary.returncode == 0, canary.stderr
    assert lite.states() == {"Done": 10, "Pending": 20}
    assert scheduler("--job", "handlers:count", "--burst", env=lite.env, cwd=lite.folder).returncode == 0
    assert lite.states() == {"Done": 30}
    lite.insert(99)
    assert scheduler("--job", "handlers:final", "--burst", env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.attempts(99)[0].reason == "Fail: never"
    assert len(lite.attempts(99)) == 1


def test_dry_run_changes_nothing(work: Work) -> None:
    work.insert(*range(1, 31))
    shown = scheduler("--job", "handlers:count", "--dry-run", env=work.env, cwd=work.folder)
    assert shown.returncode == 0, shown.stderr
    for part in ("SELECT", "ready rows: 30", "first keys: 1 2 3 4 5 6 7 8 9 10\n", "CREATE INDEX", "handlers:count"):
        assert part in shown.stdout
    assert work.states() == {"Pending": 30}
    assert inspect(work.engine).get_table_names() == ["work"]


def test_start_line_names_everything_and_no_password(lite: Work) -> None:
    lite.insert(1)
    (lite.folder / "nih-sched.toml").write_text('job = "handlers:count"\ntries = 2\n')
    shown = scheduler("--burst", "--delay", "0", env=lite.env, cwd=lite.folder).stderr.splitlines()[1]
    for part in ("database sqlite:///", "table main.work", "1 ready", "handler handlers:count", "Redis unix://"):
        assert part in shown
    for part in ("--delay --burst by option", "environment DATABASE_URL", "file nih-sched.toml"):
        assert part in shown


def test_events_as_json_lines(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:count", "--burst", "--log-format", "json")
    logged = [json.loads(text) for text in scheduler(*line, env=lite.env, cwd=lite.folder).stderr.splitlines()]
    assert {"run_started", "claimed", "started", "done", "finished"} <= {event["event"] for event in logged}
    assert next(event for event in logged if event["event"] == "done")["key"] == "1"


def test_an_owner_resets_a_running_row_and_it_runs_again_afterwards(lite: Work) -> None:
    lite.insert(1)
    with spawn_scheduler("--job", "handlers:brief", "--max-concurrent-jobs", "2", env=lite.env, cwd=lite.folder):
        eventually(lambda: lite.ran()["begin 1"] == 1)
        lite.sql("UPDATE work SET state = 'Pending' WHERE id = 1")
        eventually(lambda: lite.ran()["end 1"] == 2 and lite.states() == {"Done": 1})
    lines = (lite.folder / "ran.log").read_text().split()
    assert lines == ["begin", "1", "end", "1"] * 2, "the second run began before the first had ended"


def test_an_owners_cancel_is_kept(lite: Work) -> None:
    lite.insert(1)
    with spawn_scheduler("--job", "handlers:brief", "--max-concurrent-jobs", "1", env=lite.env, cwd=lite.folder):
        eventually(lambda: lite.ran()["begin 1"] == 1)
        lite.insert(2, 3)
        eventually(lambda: lite.states().get("Queued") == 2)
        lite.sql("UPDATE work SET state = 'Cancelled' WHERE id IN (1, 2)")
        eventually(lambda: lite.ran()["end 3"] == 1)
        eventually(lambda: lite.states() == {"Cancelled": 2, "Done": 1})
    assert lite.ran()["begin 2"] == lite.ran()["end 1"] == 0
    assert lite.attempts(1)[0].outcome == "cancelled"
    assert lite.attempts(2)[0].outcome == "cancelled"


def test_two_schedulers_on_one_table_and_redis_keep_to_their_rows(lite: Work) -> None:
    lite.insert(*range(20), state="Pending")
    lite.insert(*range(20, 40), state="fresh")
    lite.insert(*range(40, 50), state="pending")
    base = ("--burst", "--max-concurrent-jobs", "2")
    with (
        spawn_scheduler(*base, "--job", "handlers:count", env=lite.env, cwd=lite.folder) as one,
        spawn_scheduler(*base, "--ready-val", "fresh", "--job", "handlers:other", env=lite.env, cwd=lite.folder) as two,
    ):
        assert one.wait(60) == 0
        assert two.wait(60) == 0
    assert lite.ran() == {str(i): 1 for i in range(20)} | {f"other {i}": 1 for i in range(20, 40)}
    assert lite.states() == {"Done": 40, "pending": 10}


def test_where_splits_a_table_between_two_handlers(lite: Work) -> None:
    lite.insert(*range(10), kind="a")
    lite.insert(*range(10, 20), kind="b%")
    base = ("--burst", "--max-concurrent-jobs", "1")
    a, b = ("--where", "kind = 'a' -- mine"), ("--where", "kind LIKE 'b%'")
    with (
        spawn_scheduler(*base, *a, "--job", "handlers:count", env=lite.env, cwd=lite.folder) as one,
        spawn_scheduler(*base, *b, "--job", "handlers:other", env=lite.env, cwd=lite.folder) as two,
    ):
        assert [one.wait(60), two.wait(60)] == [0, 0]
    assert lite.ran() == {str(i): 1 for i in range(10)} | {f"other {i}": 1 for i in range(10, 20)}


@pytest.mark.parametrize("tries", ["0", "2"])
def test_a_row_that_kills_its_process_ends_in_failed(lite: Work, tries: str) -> None:
    lite.insert(1, 2)
    lite.sql("UPDATE work SET state = 'x' WHERE id = 2")
    line = ("--job", "handlers:die", "--burst", "--tries", tries, "--delay", "0.1", "--max-concurrent-jobs", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.ran() == {"1": 1 + int(tries)}
    assert {a.outcome for a in lite.attempts()} == {"crashed"}
    assert "exit code 3" in lite.attempts()[0].reason
    assert lite.states() == {"Failed": 1, "x": 1}


def test_producer_and_workers_apart(lite: Work) -> None:
    lite.insert(*range(10))
    line = ("--job", "handlers:count")
    with (
        spawn_scheduler("worker", *line, env=lite.env, cwd=lite.folder) as one,
        spawn_scheduler("worker", *line, env=lite.env, cwd=lite.folder) as two,
        spawn_scheduler("producer", env=lite.env, cwd=lite.folder) as producer,
    ):
        eventually(lambda: lite.states() == {"Done": 10})
        for process in (producer, one, two):
            process.terminate()
        assert [process.wait(20) for process in (producer, one, two)] == [0, 0, 0]
    assert lite.ran() == {str(i): 1 for i in range(10)}


def left_of(process: Any) -> list[psutil.Process]:
    """What lives of a scheduler, its commands included; but for the embedded Redis, which others may use."""
    left = []
    for one in process.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            left += [one] if "valkey" not in one.name() else []
    return left


def stop(process: Any, how: str) -> None:
    if how == "term":
        process.terminate()
    elif how == "ctrl-c":
        process.send_signal(signal.SIGINT)
    elif how == "ctrl-c twice":
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    elif how == "container":  # SIGTERM to every process at once
        for one in process.processes():
            one.send_signal(signal.SIGTERM)
    else:
        process.kill()  # the supervisor alone: its children notice


@pytest.mark.parametrize("how", ["term", "ctrl-c", "ctrl-c twice", "container", "kill -9 of the supervisor"])
@pytest.mark.parametrize("handler", ["--job=handlers:slow", "--command=sh -c 'sleep 61 & sleep 62; wait'"])
def test_stopping_gives_back_what_ran_and_what_waited(lite: Work, how: str, handler: str) -> None:
    lite.insert(*range(20))
    grace = "20" if how == "ctrl-c twice" else "1"
    line = (handler, "--max-concurrent-jobs", "2", "--grace", grace)
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder, grace=15) as process:
        eventually(lambda: lite.states().get("Started") == 2 and lite.states().get("Queued", 0) > 0)
        before = time.monotonic()
        stop(process, how)
        code = process.wait(20)
        assert code == (0 if how != "kill -9 of the supervisor" else -signal.SIGKILL)
        eventually(lambda: lite.states() == {"Pending": 20}, timeout=15)
        assert time.monotonic() - before < 15
        eventually(lambda: not left_of(process), timeout=10)
    history = lite.sql("SELECT outcome, reason FROM nih_sched_attempts")
    assert [a.outcome for a in history] == ["interrupted"] * 2
    assert all("told to stop" in a.reason for a in history)


def test_a_spent_try_survives_a_stop(lite: Work) -> None:
    lite.insert(1)
    line = ("--job", "handlers:timed", "--max-concurrent-jobs", "1", "--tries", "2", "--delay", "3", "--backoff", "1")
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: lite.ran() and len(lite.attempts()) == 2)
        process.terminate()
        assert process.wait(20) == 0
    assert lite.states() == {"Queued": 1}
    assert scheduler(*line, "--burst", env=lite.env, cwd=lite.folder).returncode == 1
    assert sum(lite.ran().values()) == 3
