"""`scheduler why` and its like, in front of real producers, workers and servers."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import servers
from conftest import Work, make_work, stock_worker
from servers import Database, eventually, scheduler, spawn, spawn_scheduler

SLOW = ("--job", "handlers:slow", "--max-concurrent-jobs", "1", "--batch-size", "1", "--lease", "30")


def why(work: Work, key: int, *options: str) -> str:
    done = scheduler("why", str(key), *options, env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    return str(done.stdout).partition("\n")[0]


def matches(work: Work, key: int, pattern: str, timeout: float = 20) -> str:
    """The sentence, once it is this one."""
    said = ""

    def look() -> bool:
        nonlocal said
        said = why(work, key)
        return re.fullmatch(f"Row {key}: {pattern}", said) is not None

    try:
        eventually(look, timeout=timeout, every=0.2)
    except BaseException:
        print("said at last:", said)
        raise
    return said


def test_a_rows_way_through_producer_and_worker(lite: Work) -> None:
    lite.insert(*range(1, 21))
    scheduler("init", env=lite.env, cwd=lite.folder)
    matches(lite, 1, r"ready, but no producer and no worker of its source is up\. Type: scheduler run\.")
    with spawn_scheduler("producer", *SLOW, env=lite.env, cwd=lite.folder):
        matches(lite, 1, r"claimed [\d.]+ m?s ago by \S+, and no worker of its source is up\.")
        matches(lite, 20, r"ready, but no worker of its source is up\. Type: scheduler run\.")
        with spawn_scheduler("worker", "--job", "handlers:slow", "--grace", "0.1", env=lite.env, cwd=lite.folder):
            matches(lite, 1, r"running for [\d.]+ m?s on \S+, attempt 1 of 4\.")
            matches(lite, 2, r"claimed [\d.]+ m?s ago by \S+ and first in the queue\.")
            matches(lite, 3, r"claimed [\d.]+ m?s ago by \S+ and queued behind 1\.")
            matches(lite, 20, r"ready and 1\dth in line\.")
            said = scheduler("pause", "--reason", "a deploy", env=lite.env, cwd=lite.folder)
            assert said.returncode == 0, said.stderr
            matches(lite, 20, r"waiting, because source \S+ is paused by \S+ since [\d:]+ UTC: a deploy\.")
            facts = json.loads(scheduler("status", "--json", env=lite.env, cwd=lite.folder).stdout)
            assert facts["pauses"][0]["reason"] == "a deploy"
            (running,) = [run for worker in facts["workers"] for run in worker["runs"]]
            assert running["key"] == "1"
            assert facts["redis"]["producers"] == 1


def test_a_worker_that_does_not_serve_the_source_is_named_as_the_reason(lite: Work) -> None:
    lite.insert(1)
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    lite.sql("CREATE TABLE other (id INTEGER NOT NULL PRIMARY KEY, state VARCHAR(20) NOT NULL)")
    env = lite.env | {"NIH_SCHED_TABLE": "other", "NIH_SCHED_JOB": "handlers:other"}
    with (
        spawn_scheduler("producer", *SLOW, env=lite.env, cwd=lite.folder),
        spawn(stock_worker(source), env=env, cwd=lite.folder),
    ):
        matches(lite, 1, r"(claimed|ready), and released because no worker serves its source \S+: start one .*\.", 30)


def test_since_when_redis_is_away(sqlite_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = servers.Redis().start()
    try:
        monkeypatch.setenv("REDIS_URL", redis.url)
        work = make_work(sqlite_db, tmp_path / "app")
        scheduler("init", env=work.env, cwd=work.folder)
        with spawn_scheduler("producer", *SLOW, env=work.env, cwd=work.folder) as process:
            eventually(lambda: work.sql("SELECT count(*) FROM nih_sched_sources")[0][0] == 1)
            redis.stop()
            work.insert(1)
            matches(work, 1, r"ready, but Redis is unreachable since [\d:]+ UTC \(.*\)\.")
            assert "unreachable" in scheduler("status", env=work.env, cwd=work.folder).stdout
            redis.revive()
            matches(work, 1, r"claimed .* and no worker of its source is up\.", 40)
            assert work.sql("SELECT redis_lost_at FROM nih_sched_sources") == [(None,)]
            process.terminate()
    finally:
        redis.kill()


def test_a_failure_has_its_place_and_is_shown_listed_and_found(lite: Work) -> None:
    lite.insert(1, 2)
    options = ("--job", "handlers:timed", "--tries", "0", "--burst", "--quiet")
    assert scheduler(*options, env=lite.env, cwd=lite.folder).returncode == 1
    ((error,), *_) = lite.sql("SELECT error FROM nih_sched_attempts")
    assert re.fullmatch(r"ValueError at handlers\.py:\d+ in timed", error)
    assert f"where            {error}" in scheduler("why", "1", env=lite.env, cwd=lite.folder).stdout
    shown = scheduler("show", "1", env=lite.env, cwd=lite.folder).stdout
    assert "ValueError: attempt 1 of 1" in shown
    assert 'File "' in shown
    found = scheduler("list", "--state", "failed", "--where", "error LIKE '%of 2%'", "--since", "1h", "--json",
                      env=lite.env, cwd=lite.folder)  # fmt: skip
    (row,) = json.loads(found.stdout)["rows"]
    assert (row["key"], row["place"]) == ("2", error)
    listed = scheduler("list", "--csv", "--error", error, env=lite.env, cwd=lite.folder).stdout.splitlines()
    assert [line.partition(",")[0] for line in listed] == ["id", "1", "2"]
    table = scheduler("list", "--limit", "1", env=lite.env, cwd=lite.folder).stdout
    assert "More follow after key 1." in table


MISTAKES = {
    ("why", "9"): "has no row with the key 9",
    ("why", "x"): "is no key of",
    ("show", "1,2"): "is no key of",
    ("list", "--where", "no such"): "can't be used",
    ("list", "--since", "soon"): "is no length of time",
    ("list", "--json", "--csv"): "can't be had together",
    ("status", "--created-column", "nope"): "has no column 'nope'",
}


def test_a_mistake_is_one_sentence(lite: Work) -> None:
    scheduler("init", env=lite.env, cwd=lite.folder)
    for words, said in MISTAKES.items():
        done = scheduler(*words, env=lite.env, cwd=lite.folder)
        assert done.returncode == 2, words
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_watch_looks_again_until_it_is_told_to_stop(lite: Work) -> None:
    scheduler("init", env=lite.env, cwd=lite.folder)
    lite.insert(1)
    command = [sys.executable, "-m", "nih_sched", "status", "--watch", "--json"]
    with spawn(command, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.output.count('"ready": {"rows": 1') >= 1)
        lite.insert(2)
        eventually(lambda: '"ready": {"rows": 2' in process.output)
        time.sleep(0.1)
        process.send_signal(2)
        assert process.wait(10) == 130
        assert "Traceback" not in process.output
