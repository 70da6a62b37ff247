"""Several rows in one RQ job: each has its own start, timeout, outcome and retries."""

from __future__ import annotations

import contextlib
import re
import signal
from collections import Counter

import psutil
import pytest
from conftest import Work, stock_worker
from servers import eventually, scheduler, spawn, spawn_scheduler

from nih_sched import broker

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

TEN = ("--batch-size", "10", "--max-concurrent-jobs", "1", "--delay", "0.3", "--timeout", "20")
HANDLERS = """
import os, time
from handlers import note

def sevenths_fail(id, attempt):
    note(id, attempt)
    if id % 7 == 0:
        raise ValueError(id)

def fifth_dies_once(id, attempt):
    note(id, os.getpid())
    if id == 5 and attempt == 1:
        os._exit(3)

def third_is_long(id):
    note(id)
    if id == 3:
        time.sleep(4)
    note("end", id)

def each_takes_a_while(id):
    note(id)
    time.sleep(0.7)

def third_sleeps_once(id):
    note(id)
    if id == 3 and open("ran.log").read().split().count("3") == 1:
        time.sleep(60)

def third_leaves_traces(id):
    import signal, subprocess, threading
    clean = (os.path.exists("ran.log") or id == 1) and "LEFT" not in os.environ and threading.active_count() == 1
    clean = clean and signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    clean = clean and not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    note(id, "clean" if clean else "unclean")
    if id == 3:
        os.environ["LEFT"] = "1"
    if id == 4:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
    if id == 5:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if id == 6:
        os.chdir("/")
    if id == 7:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    if id == 8:
        subprocess.Popen(["sleep", "1"])

def each_leaves_traces(id):
    note(id)
    os.environ["LEFT"] = str(id)

def in_parts(id):
    note("begin", id)
    time.sleep(0.8)
    note("end", id)

def one_error():
    from nih_sched.runner.parent import Steward
    look = Steward.look
    def breaks_once(self, horse):
        begun = open("ran.log").read() if os.path.exists("ran.log") else ""
        if not os.path.exists("broke") and begun.count("begin") > 2:
            open("broke", "x").close()
            raise RuntimeError("of no kind that is expected here")
        return look(self, horse)
    Steward.look = breaks_once

def hooked():
    import threading
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

def third_times_out(id):
    note(id)
    if id == 3:
        time.sleep(60)
"""


@pytest.fixture
def batch(work: Work) -> Work:
    """Ten ready rows, and handlers that see them by number."""
    work.insert(*range(1, 11))
    (work.folder / "batched.py").write_text(HANDLERS)
    return work


@pytest.fixture
def lite_batch(lite: Work) -> Work:
    """The same on SQLite."""
    lite.insert(*range(1, 11))
    (lite.folder / "batched.py").write_text(HANDLERS)
    return lite


def test_a_row_that_fails_goes_on_alone(batch: Work) -> None:
    done = scheduler("--job", "batched:sevenths_fail", "--burst", "--tries", "2", *TEN, env=batch.env, cwd=batch.folder)
    assert done.returncode == 1, done.stderr
    assert batch.states() == {"Done": 9, "Failed": 1}
    once = {f"{n} 1": 1 for n in range(1, 11)}
    assert batch.ran() == once | {"7 2": 1, "7 3": 1}
    assert [a.outcome for a in batch.attempts(7)] == ["failed"] * 3
    rq_ids = [row[0] for row in batch.sql("SELECT DISTINCT rq_id FROM nih_sched_attempts WHERE row_key <> '[7]'")]
    assert len(rq_ids) == 1
    assert batch.attempts(7)[0].rq_id == rq_ids[0]
    assert len({a.rq_id for a in batch.attempts(7)}) == 2  # RQ's Retry carries it from the second attempt on


def test_what_waits_for_its_retry_stands_in_rqs_scheduled_registry(lite_batch: Work, redis_url: str) -> None:
    line = ("--job", "batched:sevenths_fail", "--tries", "1", *TEN, "--delay", "30")
    with spawn_scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder):
        eventually(lambda: lite_batch.states() == {"Done": 9, "Queued": 1})
        source = scheduler("source", env=lite_batch.env, cwd=lite_batch.folder).stdout.strip()
        queue = broker.queue_of(broker.connect(redis_url), source)
        (waiting,) = eventually(queue.scheduled_job_registry.get_job_ids)
        job = queue.fetch_job(waiting)
        assert (job.description, job.retries_left or 0) == (f"{source} claim 7", 0)
        (whole,) = eventually(queue.finished_job_registry.get_job_ids)
        assert queue.fetch_job(whole).description == f"{source} 10 claims, 1 to 10"


def test_a_row_that_kills_its_horse_is_the_only_one_that_runs_again(lite_batch: Work) -> None:
    line = ("--job", "batched:fifth_dies_once", "--burst", "--tries", "2", *TEN)
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    assert lite_batch.states() == {"Done": 10}
    assert [a.outcome for a in lite_batch.attempts(5)] == ["crashed", "done"]
    ran = [line.split()[0] for line in lite_batch.ran().elements()]
    assert sorted(ran, key=int) == sorted([*map(str, range(1, 11)), "5"], key=int)


def test_a_horse_that_its_worker_cant_watch_any_more_ends_and_no_row_runs_beside_itself(lite_batch: Work) -> None:
    line = ("--job", "batched:in_parts", "--preload", "batched:one_error", "--burst", "--lease", "6", *TEN)
    done = scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder)
    assert done.returncode == 0, done.stderr
    assert (lite_batch.folder / "broke").exists()
    assert lite_batch.states() == {"Done": 10}
    ran = (lite_batch.folder / "ran.log").read_text().splitlines()
    assert sorted(line for line in ran if line.startswith("end")) == sorted(f"end {n}" for n in range(1, 11))
    (cut,) = lite_batch.sql("SELECT row_key, reason FROM nih_sched_attempts WHERE outcome = 'interrupted'")
    assert cut.reason == "its worker met an error, and stopped it"
    begun = Counter(line.split()[1] for line in ran if line.startswith("begin"))
    assert begun == {str(n): 1 + (f"[{n}]" == cut.row_key) for n in range(1, 11)}


def test_a_timeout_of_a_year_is_none_too_many_for_rq(lite_batch: Work) -> None:
    lite_batch.insert(*range(11, 101))
    line = ("--job", "handlers:count", "--burst", *TEN, "--batch-size", "100", "--timeout", str(365 * 86400))
    done = scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder)
    assert done.returncode == 0, done.stderr
    assert lite_batch.states() == {"Done": 100}
    assert " again" not in done.stderr  # its job isn't sent again and again


def test_rows_that_leave_something_behind_come_to_travel_alone(lite_batch: Work) -> None:
    # Each ends its horse, and has those behind it in its job given back.
    lite_batch.insert(*range(11, 301))
    line = ("--job", "batched:each_leaves_traces", "--burst", "--max-concurrent-jobs", "2", "--poll-interval", "0.1")
    done = scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder)
    assert done.returncode == 0, done.stderr
    assert lite_batch.states() == {"Done": 300}
    claimed = sum(int(number) for number in re.findall(r" claimed (\d+) rows?$", done.stderr, re.MULTILINE))
    assert 300 <= claimed < 300 * 20  # 18,000 to 19,000, when the size of jobs followed the run times alone


def test_a_long_row_gives_those_behind_it_back(lite_batch: Work) -> None:
    # The other worker takes them meanwhile.
    line = ("--job", "batched:third_is_long", "--burst", *TEN, "--max-concurrent-jobs", "2")
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    ran = (lite_batch.folder / "ran.log").read_text().splitlines()
    assert sorted(ran) == sorted([*map(str, range(1, 11)), *(f"end {n}" for n in range(1, 11))])
    assert ran[-1] == "end 3"


def test_a_job_that_takes_too_long_gives_back_what_it_has_not_come_to(lite_batch: Work) -> None:
    # None of its rows is long. Another worker could take them, if there was one.
    line = ("--job", "batched:each_takes_a_while", "--burst", *TEN)
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    assert lite_batch.ran() == {str(n): 1 for n in range(1, 11)}
    (first, *others) = lite_batch.sql("SELECT count(*) FROM nih_sched_attempts GROUP BY rq_id ORDER BY min(id)")
    assert 5 <= first[0] < 10
    assert len(others) == 1


@pytest.mark.parametrize("stock", [False, True])
def test_a_row_that_is_cancelled_or_deleted_before_its_turn_is_not_run(lite_batch: Work, *, stock: bool) -> None:
    line = ("--job", "batched:each_takes_a_while", *TEN)
    env = lite_batch.env | {"NIH_SCHED_JOB": "batched:each_takes_a_while"}
    scheduler("init", env=env, cwd=lite_batch.folder)
    source = scheduler("source", env=env, cwd=lite_batch.folder).stdout.strip()
    with contextlib.ExitStack() as stack:
        role = ("producer",) if stock else ()
        stack.enter_context(spawn_scheduler(*role, *line, env=lite_batch.env, cwd=lite_batch.folder))
        if stock:
            stack.enter_context(spawn(stock_worker(source), env=env, cwd=lite_batch.folder))
        eventually(lambda: lite_batch.ran()["1"] == 1, timeout=30)
        lite_batch.sql("UPDATE work SET state = 'Cancelled' WHERE id IN (3, 4)")
        lite_batch.sql("DELETE FROM work WHERE id = 5")
        eventually(lambda: lite_batch.states() == {"Cancelled": 2, "Done": 7}, timeout=30)
    assert lite_batch.ran() == {str(n): 1 for n in (1, 2, 6, 7, 8, 9, 10)}
    whys = lite_batch.sql("SELECT reason FROM nih_sched_attempts WHERE outcome = 'cancelled'")
    assert whys == [("its owner cancelled or deleted the row before its turn in its batch",)] * 3


def test_a_row_past_its_timeout_takes_no_other_with_it(lite_batch: Work) -> None:
    line = ("--job", "batched:third_times_out", "--burst", "--tries", "0", *TEN, "--timeout", "0.5")
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 1
    assert lite_batch.states() == {"Done": 9, "Failed": 1}
    assert lite_batch.attempts(3)[0].outcome == "timed out"
    assert lite_batch.ran() == {str(n): 1 for n in range(1, 11)}


def test_each_row_starts_clean(lite_batch: Work) -> None:
    line = ("--job", "batched:third_leaves_traces", "--burst", *TEN)
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    assert lite_batch.ran() == {f"{n} clean": 1 for n in range(1, 11)}
    ((jobs,),) = lite_batch.sql("SELECT count(DISTINCT rq_id) FROM nih_sched_attempts")
    assert jobs == 7  # a new horse after each that left something


def test_what_the_horses_hook_starts_is_no_trace(lite_batch: Work) -> None:
    line = ("--job", "handlers:count", "--on-horse-start", "batched:hooked", "--burst", *TEN)
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    ((jobs,),) = lite_batch.sql("SELECT count(DISTINCT rq_id) FROM nih_sched_attempts")
    assert jobs == 1


def test_a_stop_interrupts_the_row_in_hand_and_gives_the_rest_back(lite_batch: Work) -> None:
    line = ("--job", "batched:third_sleeps_once", *TEN, "--grace", "0.3")
    with spawn_scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder) as process:
        eventually(lambda: lite_batch.ran()["3"] == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert lite_batch.states() == {"Done": 2, "Pending": 8}
    assert [a.outcome for a in lite_batch.attempts(3)] == ["interrupted"]
    assert scheduler(*line, "--burst", env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    assert lite_batch.ran() == {str(n): 1 for n in range(1, 11)} | {"3": 2}


def test_a_killed_worker_runs_the_row_in_hand_again_and_no_other(lite_batch: Work) -> None:
    with spawn_scheduler(
        "--job", "batched:third_sleeps_once", *TEN, env=lite_batch.env, cwd=lite_batch.folder
    ) as process:
        eventually(lambda: lite_batch.ran()["3"] == 1)
        eventually(lambda: lite_batch.states().get("Done") == 2)  # those before it are written soon
        (worker,) = (p for p in psutil.Process(process.pid).children() if p.name() == "sched-worker")
        worker.kill()
        eventually(lambda: lite_batch.states() == {"Done": 10}, timeout=30)
    assert lite_batch.ran() == {str(n): 1 for n in range(1, 11)} | {"3": 2}


def test_a_stock_worker_runs_batches(lite_batch: Work) -> None:
    env = lite_batch.env | {"NIH_SCHED_JOB": "batched:sevenths_fail"}
    scheduler("init", env=env, cwd=lite_batch.folder)
    source = scheduler("source", env=env, cwd=lite_batch.folder).stdout.strip()
    with (
        spawn(stock_worker(source), env=env, cwd=lite_batch.folder),
        spawn_scheduler("producer", "--tries", "1", *TEN, env=env, cwd=lite_batch.folder),
    ):
        eventually(lambda: lite_batch.states() == {"Done": 9, "Failed": 1}, timeout=40)
    assert lite_batch.ran() == {f"{n} 1": 1 for n in range(1, 11)} | {"7 2": 1}


def test_short_rows_come_to_travel_together_by_themselves(lite_batch: Work) -> None:
    lite_batch.insert(*range(11, 401))
    line = ("--job", "handlers:count", "--burst", "--max-concurrent-jobs", "2")
    assert scheduler(*line, env=lite_batch.env, cwd=lite_batch.folder).returncode == 0
    assert lite_batch.ran() == {str(n): 1 for n in range(1, 401)}
    ((jobs,),) = lite_batch.sql("SELECT count(DISTINCT rq_id) FROM nih_sched_attempts")
    assert jobs < 200
