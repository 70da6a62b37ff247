"""Handlers through the real command line, and the mistakes that are refused before any row is claimed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Work, stock_worker
from servers import eventually, run, scheduler, spawn_scheduler

from nih_sched import broker, runner, telemetry
from nih_sched.cli import main

BURST = ("--burst", "--max-concurrent-jobs", "2", "--delay", "0.1")


def test_async_handler_that_asks_for_later_spends_no_try(lite: Work) -> None:
    lite.insert(1)
    done = scheduler("--job", "handlers:later", *BURST, "--tries", "0", env=lite.env, cwd=lite.folder)
    assert done.returncode == 0, done.stderr
    history = lite.attempts()
    assert [(a.attempt, a.outcome, a.failures) for a in history] == [(1, "postponed", 0), (2, "done", 0)]


def test_several_handlers_by_a_column_and_an_unknown_kind_fails_alone(lite: Work) -> None:
    (lite.folder / "nih-sched.toml").write_text(
        'job-column = "kind"\n[handlers]\na = "handlers:count"\nb = "handlers:other"\n'
    )
    lite.insert(1, kind="a")
    lite.insert(2, kind="b")
    lite.insert(3, kind="os:system")
    assert scheduler(*BURST, env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.ran() == {"1": 1, "other 2": 1}
    assert lite.states() == {"Done": 2, "Failed": 1}
    assert "kind is 'os:system', but [handlers] has only: a, b" in lite.attempts(3)[0].reason


def test_command_is_filled_in_without_a_shell(lite: Work) -> None:
    lite.insert(1, kind="$(touch hacked); `id` 'q' \"q\"")
    lite.insert(2, kind="two words")
    command = 'sh -c \'printf "%s|%s\\n" "$1" "$2" >> ran.log\' sh {kind} {id}'
    assert scheduler("--command", command, *BURST, env=lite.env, cwd=lite.folder).returncode == 0
    assert lite.ran() == {"$(touch hacked); `id` 'q' \"q\"|1": 1, "two words|2": 1}
    assert not (lite.folder / "hacked").exists()


def test_a_failing_commands_last_words_are_kept(lite: Work) -> None:
    lite.insert(1)
    command = "sh -c 'echo first >&2; echo disk full >&2; exit 7'"
    line = ("--command", command, *BURST, "--tries", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert [a.reason for a in lite.attempts()] == ["CommandFailed: exit code 7: first\ndisk full"] * 2


def test_timeouts_end_functions_and_commands(lite: Work) -> None:
    lite.insert(1)
    line = (*BURST, "--tries", "0", "--timeout", "0.5")
    assert scheduler("--job", "handlers:slow", *line, env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.attempts()[0].outcome == "timed out"
    lite.sql("UPDATE work SET state = 'Pending'")
    assert scheduler("--command", "sleep 63", *line, env=lite.env, cwd=lite.folder).returncode == 1
    assert [a.outcome for a in lite.attempts()] == ["timed out"] * 2


def test_preload_and_a_hook_at_each_horses_start(lite: Work) -> None:
    lite.insert(1, 2)
    (lite.folder / "app.py").write_text("import handlers\ndef setup():\n    handlers.note('setup')\n")
    line = ("--job", "handlers:count", "--preload", "app:setup", "--on-horse-start", "handlers:mark", *BURST)
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 0
    notes = [line.split()[0] for line in lite.ran().elements()]
    assert notes.count("horse") == 2
    assert notes.count("setup") == 1
    assert notes.count("1") == notes.count("2") == 1


def test_what_a_handler_prints_gets_out(lite: Work) -> None:
    lite.insert(1)
    (lite.folder / "talk.py").write_text("def say(id):\n    print('heard', id)\n    return {'id': id}\n")
    done = scheduler("--job", "talk:say", *BURST, env=lite.env, cwd=lite.folder)
    assert "heard 1" in done.stdout
    assert json.loads(lite.attempts()[0].result) == {"id": 1}


def test_a_value_that_cant_be_read_fails_its_row_alone(lite: Work) -> None:
    lite.sql("ALTER TABLE work ADD COLUMN at DATETIME")
    lite.insert(1, 2)
    lite.sql("UPDATE work SET at = 'no date' WHERE id = 1")
    (lite.folder / "dated.py").write_text("def job(id, at):\n    return id\n")
    assert scheduler("--job", "dated:job", *BURST, env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.states() == {"Done": 1, "Failed": 1}
    assert "can't be read" in lite.attempts(1)[0].reason


def test_a_worker_gives_back_what_it_doesnt_serve(lite: Work) -> None:
    lite.insert(1)
    with spawn_scheduler("producer", "--job", "handlers:count", env=lite.env, cwd=lite.folder) as producer:
        eventually(lambda: lite.states() == {"Queued": 1})
        source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
        env = lite.env | {"NIH_SCHED_WHERE": "id > 5", "NIH_SCHED_JOB": "handlers:count"}
        producer.kill()  # it must not claim the row again at once (frozen, it may hold SQLite's only write lock)
        producer.wait()
        run(stock_worker(source, "--burst"), env=env, cwd=lite.folder)
        assert lite.states() == {"Pending": 1}
    assert lite.ran() == {}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--tries -1", "--tries is '-1' (option), expected 0 to 1000"),
        ("--tries many", "expected a whole number"),
        ("--max-concurrent-jobs 0", "expected 1 to 1024"),
        ("--delay nan", "expected 0 to"),
        ("--backoff 0", "expected 0.001 to 1000"),
        ("--timeout -5", "--timeout is '-5'"),
        ("--table nope", "There is no table nope"),
        ("--table seen", "seen is a view"),
        ("--table bare", "has no primary key"),
        ("--status-key nope", "has no column 'nope'"),
        ("--primary-key id,nope", "has no column 'nope'"),
        ("--ready-val Done", "must differ from the ready word"),
        ("--queued-val " + "x" * 21, "longer than 20 characters"),
        ("--where nope=1", "--where 'nope=1' can't be used"),
        ("--job handlers", "expected module:function"),
        ("--job nope:f", "No module named 'nope'"),
        ("--job handlers:nope", "handlers has no 'nope'"),
        ("--job handlers:os", "os is not callable"),
        ("--job wants:job", "it needs 'colour', which is no column"),
        ("--job broken:job", "importing broken raised ZeroDivisionError"),
        ("--command 'x", "No closing quotation"),
        ("--command {nope}", "{nope} is no column"),
        ("--job handlers:count --command x", "set only one of"),
        ("--job-column kind", "the config file has no [handlers]"),
        ("--preload nope", "No module named 'nope'"),
        ("--redis-url http://x", "--redis-url"),
        ("--redis-url redis://:secret@127.0.0.1:1", "Redis redis://127.0.0.1:1 can't be reached"),
        ("--database-url postgres://u:secret@127.0.0.1:1/x", "Database postgres://u@127.0.0.1:1/x can't be reached"),
        ("--database-url oracle://x", "expected postgres, postgresql"),
        ("--database-url sqlite:///nope/x.db", "there is no folder"),
        ("--database-url sqlite:///nope.db", "there is no file"),
        ("--config nope.toml", "no such file"),
        ("--states ready=a,foo=b", "state=word pairs"),
        ("--log-format xml", "'text' or 'json'"),
        ("--nope", "No such option"),
        ("", "No handler is set for table work"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    lite: Work, line: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lite.sql("CREATE VIEW seen AS SELECT * FROM work")
    lite.sql("CREATE TABLE bare (state VARCHAR(20))")
    (lite.folder / "wants.py").write_text("def job(colour): ...\n")
    (lite.folder / "broken.py").write_text("1 / 0\n")
    given = line.split() if "'" not in line and "{" not in line else line.split(" ", 1)
    if given and "--job" not in given and "--command" not in given and "--job-column" not in given:
        given += ["--job", "handlers:count"]
    # In this process: nothing is started when a mistake is refused, and there are many to try.
    monkeypatch.setattr(sys, "argv", ["scheduler", *given])
    monkeypatch.setattr(sys, "path", [str(lite.folder), *sys.path])
    monkeypatch.chdir(lite.folder)
    for name, value in lite.env.items():
        monkeypatch.setenv(name, value)
    for name in ("handlers", "wants", "broken"):
        sys.modules.pop(name, None)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        telemetry.unsubscribe_all()
        runner.clear()
    told = capsys.readouterr()
    assert ended.value.code == 2, told.err
    assert expected in told.err.strip().splitlines()[-1]
    assert "Traceback" not in told.err
    assert "secret" not in told.err + told.out


def test_unknown_keys_in_the_config_file(lite: Work) -> None:
    (lite.folder / "nih-sched.toml").write_text("triez = 3\n")
    done = scheduler("--job", "handlers:count", env=lite.env, cwd=lite.folder)
    assert done.returncode == 2
    assert "unknown keys: triez" in done.stderr


def test_a_missing_driver_names_its_extra(lite: Work, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    (hidden / "psycopg").mkdir(parents=True)
    (hidden / "psycopg" / "__init__.py").write_text("raise ModuleNotFoundError('hidden', name='psycopg')\n")
    env = lite.env | {"DATABASE_URL": "postgres://127.0.0.1/x", "PYTHONPATH": str(hidden)}
    done = scheduler("--job", "handlers:count", env=env, cwd=lite.folder)
    assert done.returncode == 2
    assert "pip install 'nih-sched[postgresql]'" in done.stderr


def test_a_check_that_refuses_the_claim_is_said_at_once(work: Work) -> None:
    work.sql("CREATE TABLE strict (id INTEGER PRIMARY KEY, state VARCHAR(20) CHECK (state IN ('Pending', 'Done')))")
    work.sql("INSERT INTO strict VALUES (1, 'Pending')")
    done = scheduler("--table", "strict", "--job", "handlers:count", env=work.env, cwd=work.folder)
    assert done.returncode == 2, done.stderr
    assert "The database refused to set state of" in done.stderr
    assert "Traceback" not in done.stderr
    assert work.sql("SELECT state FROM strict") == [("Pending",)]


def test_heroku_needs_servers_of_its_own(lite: Work) -> None:
    for env, name in (({"DYNO": "web.1", "REDIS_URL": None}, "REDIS_URL"), ({"DYNO": "web.1"}, "DATABASE_URL")):
        done = scheduler("--job", "handlers:count", env=lite.env | env, cwd=lite.folder)
        assert done.returncode == 2
        assert f"Set {name}" in done.stderr


def test_only_our_function_runs_whatever_stands_in_redis(lite: Work, redis_url: str) -> None:
    lite.insert(1)
    scheduler("init", env=lite.env, cwd=lite.folder)
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    queue = broker.queue_of(broker.connect(redis_url), source)
    evil = queue.enqueue("os.system", f"touch {lite.folder}/hacked")
    callback = queue.enqueue(broker.FUNCTION, source, [1])
    callback.connection.hset(callback.key, "success_callback_name", "os.getcwd")
    line = ("--job", "handlers:count", *BURST[1:])
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: evil.get_status(refresh=True) == "failed" and callback.get_status(refresh=True) == "failed")
        eventually(lambda: lite.states() == {"Done": 1})
        assert "refused RQ job" in process.output
    assert not (lite.folder / "hacked").exists()


def test_a_horse_that_gets_a_job_unlooked_at_runs_only_our_function(lite: Work, redis_url: str) -> None:
    lite.insert(1)
    (lite.folder / "process.py").write_text("import os\n\n\ndef number(id):\n    return os.getpid()\n")
    line = ("--job", "process:number", "--max-concurrent-jobs", "1")
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: lite.states() == {"Done": 1})  # its horse waits for the next job now
        source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
        queue = broker.queue_of(broker.connect(redis_url), source)
        evil = [queue.enqueue("os.system", f"touch {lite.folder}/hacked") for _ in range(3)]
        eventually(lambda: all(job.get_status(refresh=True) == "failed" for job in evil))
        assert process.output.count("refused RQ job") == 3
        lite.insert(2)
        eventually(lambda: lite.states() == {"Done": 2})
    assert not (lite.folder / "hacked").exists()
    first, second = [attempt.result for key in (1, 2) for attempt in lite.attempts(key)]
    assert first == second  # one horse, which has refused as its worker has


def test_a_hook_that_raises_fails_its_rows_and_says_why(lite: Work) -> None:
    lite.insert(1)
    (lite.folder / "hook.py").write_text("def hook():\n    raise OSError('no licence')\n")
    line = ("--job", "handlers:count", "--on-horse-start", "hook:hook", *BURST, "--tries", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert [a.reason for a in lite.attempts()] == ["OSError: no licence"] * 2
    assert lite.states() == {"Failed": 1}


def test_a_row_that_the_database_wont_have_started_fails_alone(lite: Work) -> None:
    lite.insert(1, 2)
    lite.sql(
        "CREATE TRIGGER no BEFORE UPDATE ON work WHEN NEW.id = 1 AND NEW.state = 'Started'"
        " BEGIN SELECT RAISE(ABORT, 'not today'); END"
    )
    line = ("--job", "handlers:count", *BURST, "--tries", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    assert lite.states() == {"Done": 1, "Failed": 1}
    assert [a.reason for a in lite.attempts(1)] == ["the database refused to start the row: not today"] * 2
    assert lite.ran() == {"2": 1}


def test_a_final_word_that_the_database_refuses_keeps_its_outcome_in_the_ledger(lite: Work) -> None:
    lite.insert(1, 2)
    lite.sql(
        "CREATE TRIGGER no BEFORE UPDATE ON work WHEN NEW.id = 1 AND NEW.state = 'Done'"
        " BEGIN SELECT RAISE(ABORT, 'not today'); END"
    )
    done = scheduler("--job", "handlers:count", *BURST, env=lite.env, cwd=lite.folder)
    assert done.returncode == 0, done.stderr
    assert "row 1 stays as it is, the database refused its new state: not today" in done.stderr
    assert lite.states() == {"Done": 1, "Started": 1}
    assert [a.outcome for a in lite.attempts(1)] == ["done"]
