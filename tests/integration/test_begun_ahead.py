"""Short rows in large batches, of which a worker begins the most for its horse: each runs once all the same."""

from __future__ import annotations

import signal

import psutil
import pytest
from conftest import Work
from servers import eventually, scheduler, spawn_scheduler

pytestmark = pytest.mark.many

# The second job knows from the first one how long its rows take.
LINE = ("--batch-size", "600", "--max-concurrent-jobs", "1", "--delay", "0.3", "--timeout", "20", "--grace", "0.3")
ROWS = range(1, 1301)
AT = (660, 1000)  # rows of the second job: while one runs its worker begins the rest, by the other it has
ONCE = {str(n): 1 for n in ROWS}
HANDLERS = """
import os, time
from handlers import note

def short(id):
    time.sleep(0.001)
    note(id)

def one_dies_once(id, attempt):
    short(id)
    if id == AT and attempt == 1:
        os._exit(3)

def one_stays_once(id):
    short(id)
    if id == AT and open("ran.log").read().split().count(str(AT)) == 1:
        time.sleep(60)

def slower(id):
    time.sleep(0.004)
    note(id)
"""


def fill(work: Work, at: int = 0) -> None:
    """Ready rows, and handlers to whom one of them is special."""
    work.insert(*ROWS)
    (work.folder / "begun_ahead.py").write_text(f"AT = {at}\n{HANDLERS}")


def burst(work: Work, handler: str, *more: str) -> list[str]:
    """Run all that is ready, which must succeed; what the scheduler said."""
    line = ("--job", f"begun_ahead:{handler}", "--burst", *LINE, *more)
    done = scheduler(*line, env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_a_worker_begins_the_rest(work: Work) -> None:
    fill(work)
    said = burst(work, "short")
    assert work.ran() == ONCE
    assert work.states() == {"Done": len(ROWS)}
    begun = [int(line.split()[-3]) for line in said if line.endswith("rows started")]
    first, lead, rest, last = begun
    assert (first, lead + rest, last) == (600, 600, 100)
    assert 10 < lead < 200
    ((runs,),) = work.sql("SELECT count(DISTINCT run) FROM nih_sched_attempts")
    assert runs == 3


@pytest.mark.parametrize("at", AT)
def test_one_that_kills_its_horse_is_the_only_one_that_runs_again(lite: Work, at: int) -> None:
    fill(lite, at)
    burst(lite, "one_dies_once", "--tries", "2")
    assert lite.states() == {"Done": len(ROWS)}
    assert lite.ran() == ONCE | {str(at): 2}
    assert [a.outcome for a in lite.attempts(at)] == ["crashed", "done"]


@pytest.mark.parametrize("at", AT)
def test_a_stop_gives_back_what_was_begun_ahead(lite: Work, at: int) -> None:
    fill(lite, at)
    with spawn_scheduler("--job", "begun_ahead:one_stays_once", *LINE, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: lite.ran()[str(at)] == 1, timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert set(lite.states()) == {"Done", "Pending"}
    assert [a.outcome for a in lite.attempts(at)] == ["interrupted"]
    burst(lite, "one_stays_once")
    assert lite.ran() == ONCE | {str(at): 2}


@pytest.mark.parametrize("at", AT)
def test_so_does_a_row_that_turns_out_to_be_long(lite: Work, at: int) -> None:
    fill(lite, at)
    burst(lite, "one_stays_once", "--tries", "1", "--timeout", "3", "--max-concurrent-jobs", "2")
    assert lite.ran() == ONCE | {str(at): 2}
    assert [a.outcome for a in lite.attempts(at)] == ["timed out", "done"]


@pytest.mark.parametrize("at", AT)
def test_a_killed_worker_leaves_one_row_to_run_again(work: Work, at: int) -> None:
    fill(work, at)
    with spawn_scheduler("--job", "begun_ahead:one_stays_once", *LINE, env=work.env, cwd=work.folder) as process:
        eventually(lambda: work.ran()[str(at)] == 1, timeout=30)
        # Those before it are written soon, and those behind it given back.
        eventually(lambda: work.states().get("Done") == work.ran().total() - 1, timeout=30)
        (worker,) = (p for p in psutil.Process(process.pid).children() if p.name() == "sched-worker")
        worker.kill()
        eventually(lambda: work.states() == {"Done": len(ROWS)}, timeout=30)
    assert work.ran() == ONCE | {str(at): 2}


def test_rows_that_their_owner_cancels_or_deletes_meanwhile_are_not_run(work: Work) -> None:
    fill(work)
    with spawn_scheduler("--job", "begun_ahead:slower", *LINE, env=work.env, cwd=work.folder):
        eventually(lambda: work.ran()["700"] == 1, timeout=30)
        work.sql("UPDATE work SET state = 'Cancelled' WHERE id >= 1050 AND id < 1060")
        work.sql("DELETE FROM work WHERE id = 1150")
        eventually(lambda: work.states() == {"Cancelled": 10, "Done": len(ROWS) - 11}, timeout=30)
    assert work.ran() == {n: 1 for n in ONCE if not (1050 <= int(n) < 1060 or n == "1150")}
    whys = work.sql("SELECT reason FROM nih_sched_attempts WHERE outcome = 'cancelled'")
    assert whys == [("its owner cancelled or deleted the row before its turn in its batch",)] * 11
