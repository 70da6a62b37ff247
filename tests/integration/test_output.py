"""What a row writes and uses stands in its history; much of it neither slows others nor fills the ledger."""

from __future__ import annotations

from conftest import Work
from servers import scheduler

from nih_sched.runner.meter import LONG

LINE = ("--burst", "--max-concurrent-jobs", "1", "--tries", "0", "--delay", "0.1", "--timeout", "20")
HANDLERS = """
import logging, os, subprocess, sys, time

log = logging.getLogger("mine")

def writes(id, attempt):
    if id % 2:
        return
    print("out", id, attempt)
    print("err", id, file=sys.stderr)
    log.warning("logged %d", id)

def fails_first(id, attempt):
    print("attempt", attempt)
    if attempt == 1:
        raise ValueError("no")

def dies(id):
    print("last words")
    os._exit(3)

def works(id):
    x = bytearray(b"x") * (150 << 20)
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass

def loud(id):
    if id > 1:
        with open("over", "ab") as file:
            file.write(b".")
        return
    number = 0
    # While others wait for this one, it runs into its timeout.
    while number < 10_400 or not os.path.exists("over") or os.path.getsize("over") < 99:
        for _ in range(200):
            number += 1
            print("line", number, "x" * 60)
        time.sleep(0.01)
    time.sleep(1)  # what has run has yet to return
    print("wrote", number)
"""


def app(work: Work) -> Work:
    (work.folder / "loud.py").write_text(HANDLERS)
    return work


def outputs(work: Work) -> list[str | None]:
    return [row[0] for row in work.sql("SELECT output FROM nih_sched_attempts ORDER BY row_key, attempt")]


def test_each_attempt_keeps_what_it_wrote_in_batches_too(work: Work) -> None:
    app(work).insert(*range(1, 5))
    done = scheduler("--job", "loud:writes", "--batch-size", "4", *LINE, env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    assert outputs(work) == [None, "out 2 1\nerr 2\nlogged 2\n", None, "out 4 1\nerr 4\nlogged 4\n"]
    assert "out 2 1\n" in done.stdout
    assert "err 2\nlogged 2\n" in done.stderr
    # A stalled machine makes a long row of a short one.
    short = f"cpu_seconds IS NOT NULL AND seconds < {LONG}"
    assert work.sql(f"SELECT count(*) FROM nih_sched_attempts WHERE {short}") == [(0,)]


def test_a_retry_keeps_its_own_and_so_does_a_row_that_died(lite: Work) -> None:
    app(lite).insert(1)
    line = ("--job", "loud:fails_first", *LINE, "--tries", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 0
    assert outputs(lite) == ["attempt 1\n", "attempt 2\n"]
    lite.insert(2)
    assert scheduler("--job", "loud:dies", *LINE, env=lite.env, cwd=lite.folder).returncode == 1
    assert outputs(lite)[-1] == "last words\n"


def test_a_commands_streams_are_kept_and_its_output_passed_on(lite: Work) -> None:
    lite.insert(1)
    command = "sh -c 'echo to out; echo to err >&2; exit 3'"
    done = scheduler("--command", command, *LINE, env=lite.env, cwd=lite.folder)
    assert done.returncode == 1
    assert sorted(str(outputs(lite)[0]).splitlines()) == ["to err", "to out"]
    assert "to out\n" in done.stdout
    assert lite.attempts()[0].reason == "CommandFailed: exit code 3: to err"


def test_a_row_that_works_is_measured(lite: Work) -> None:
    app(lite).insert(1)
    assert scheduler("--job", "loud:works", *LINE, env=lite.env, cwd=lite.folder).returncode == 0
    (attempt,) = lite.attempts()
    assert 0.3 <= attempt.cpu_seconds < 3
    assert attempt.peak_memory > 150 << 20


def test_many_lines_neither_slow_others_nor_fill_the_ledger(lite: Work) -> None:
    app(lite).insert(*range(1, 101))
    line = ("--job", "loud:loud", *LINE, "--max-concurrent-jobs", "2", "--quiet")
    done = scheduler(*line, env=lite.env, cwd=lite.folder)
    assert done.returncode == 0
    (attempt,) = lite.attempts()
    *_, last = attempt.output.splitlines()
    written = int(last.removeprefix("wrote "))
    assert written > 10_000
    assert len(done.stdout.splitlines()) == written + 1
    assert attempt.output.startswith("[… ")
    assert len(attempt.output.encode()) < 16_500
    assert len(attempt.output.splitlines()) == 201
    # The other rows were over before that one.
    late = "SELECT count(*) FROM nih_sched_attempts WHERE finished_at >= :at AND row_key <> '[1]'"
    assert lite.sql(late, at=str(attempt.finished_at)) == [(0,)]
