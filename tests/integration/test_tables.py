"""init, add, status, uninstall: what they make, insert, show and leave behind."""

from __future__ import annotations

import csv
import io
import json

from conftest import Work
from servers import eventually, scheduler, spawn_scheduler
from sqlalchemy import inspect, text

from nih_sched.dialects import connect


def test_init_makes_our_tables_and_touches_no_table_of_the_users(work: Work) -> None:
    work.insert(1)
    first = scheduler("init", env=work.env, cwd=work.folder)
    assert "Made our tables nih_sched_*" in first.stdout
    assert "CREATE INDEX nih_sched_work_ready" in first.stdout
    assert inspect(work.engine).get_indexes("work") == []
    again = scheduler("init", "--sample", env=work.env, cwd=work.folder)
    assert "Found our tables" in again.stdout
    assert "Table work is there already; it was not touched." in again.stdout
    assert scheduler("init", "--create-index", env=work.env, cwd=work.folder).returncode == 0
    assert [index["name"] for index in inspect(work.engine).get_indexes("work")] == ["nih_sched_work_ready"]
    twice = scheduler("init", "--create-index", env=work.env, cwd=work.folder)
    assert twice.returncode == 2
    assert "Traceback" not in twice.stderr


def test_the_printed_sql_makes_the_same_tables(work: Work) -> None:
    printed = scheduler("init", "--print-sql", env=work.env, cwd=work.folder).stdout
    assert inspect(work.engine).get_table_names() == ["work"]
    with work.engine.begin() as connection:
        for statement in printed.split(";\n"):
            if statement.strip():
                connection.execute(text(statement.strip().rstrip(";").replace(":", "\\:")))
    work.insert(1)
    line = ("--job", "handlers:count", "--burst", "--max-concurrent-jobs", "1")
    done = scheduler(*line, env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    assert "created our tables" not in done.stderr
    assert work.states() == {"Done": 1}


def test_the_sample_runs_without_a_handler_and_no_other_table_does(work: Work) -> None:
    env = work.env | {"NIH_SCHED_TABLE": "jobs"}
    assert "Made table jobs with 20 sample rows" in scheduler("init", "--sample", env=env, cwd=work.folder).stdout
    done = scheduler("--burst", "--delay", "0.2", env=env, cwd=work.folder)
    assert done.returncode == 1
    assert "19 done, 1 failed" in done.stderr
    work.sql("DROP TABLE jobs")
    work.sql("CREATE TABLE jobs (id INTEGER PRIMARY KEY, state VARCHAR(20), name VARCHAR(20))")
    refused = scheduler("--burst", env=env, cwd=work.folder)
    assert refused.returncode == 2
    assert "No handler is set for table jobs" in refused.stderr


def test_add_by_options_csv_and_json_lines(work: Work) -> None:
    base = ("add", "--set", "kind=k")
    assert "Added 1 rows to work." in scheduler(*base, "--set", "id=1", env=work.env, cwd=work.folder).stdout
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "kind"])
    writer.writerows([[n, 'a "q", nä\ntwo lines'] for n in range(2, 1502)])
    (work.folder / "rows.csv").write_text(out.getvalue())
    assert "Added 1500 rows" in scheduler("add", "rows.csv", env=work.env, cwd=work.folder).stdout
    lines = "".join(json.dumps({"id": n, "state": "Done"}) + "\n\n" for n in (2000, 2001))
    assert "Added 2 rows" in scheduler(*base, "-", env=work.env, cwd=work.folder, input=lines).stdout
    assert work.states() == {"Pending": 1501, "Done": 2}
    assert work.sql("SELECT kind FROM work WHERE id = 7") == [('a "q", nä\ntwo lines',)]


def test_add_inserts_all_rows_or_none(work: Work) -> None:
    for given, expected in (
        ('{"id": 1, "kind": "k"}\n{"id": 1, "kind": "k"}\n', "refused the rows; none was added"),
        ('{"id": 1, "kind": "k"}\n{"id": 2, "nope": 1}\n', "line 2: "),
        ('{"id": 1, "kind": "k"}\nnot json\n', "line 2 isn't JSON"),
        ('{"id": 1, "kind": "k"}\n{"id": "x", "kind": "k"}\n', "line 2: column id"),
    ):
        done = scheduler("add", "-", env=work.env, cwd=work.folder, input=given)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    assert work.states() == {}
    short = scheduler("add", "--format", "csv", "-", env=work.env, cwd=work.folder, input="id,kind\n1\n")
    assert "expected 2 values" in short.stderr


def test_status_counts_every_word(lite: Work) -> None:
    lite.insert(1, 2)
    lite.insert(3, state="Odd")
    early = scheduler("status", env=lite.env, cwd=lite.folder)
    assert (early.returncode, "Type: scheduler init" in early.stderr) == (2, True)
    assert inspect(lite.engine).get_table_names() == ["work"]
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    told = json.loads(scheduler("status", "--json", env=lite.env, cwd=lite.folder).stdout)
    counts = {one["word"]: one["rows"] for one in told["states"]}
    assert counts == {"Pending": 2, "Queued": 0, "Started": 0, "Done": 0, "Failed": 0, "Cancelled": 0, "Odd": 1}


def test_uninstall_leaves_the_table_as_if_we_had_never_been(lite: Work) -> None:
    lite.insert(*range(5))
    with spawn_scheduler("producer", env=lite.env, cwd=lite.folder) as producer:
        eventually(lambda: lite.states() == {"Queued": 5})
        producer.kill()
        producer.wait()
    refused = scheduler("uninstall", env=lite.env, cwd=lite.folder)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    done = scheduler("uninstall", "--yes", env=lite.env, cwd=lite.folder)
    assert "Gave 5 rows back and dropped our tables" in done.stdout, done.stderr
    assert lite.states() == {"Pending": 5}
    assert inspect(lite.engine).get_table_names() == ["work"]
    assert scheduler("uninstall", "--yes", env=lite.env, cwd=lite.folder).returncode == 2


def test_our_tables_in_a_schema_of_their_own(postgresql_db, redis_url, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("REDIS_URL", redis_url)
    engine = connect(postgresql_db.url)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA ours"))
        connection.execute(text("CREATE SCHEMA theirs"))
    env = {"DATABASE_URL": postgresql_db.url, "NIH_SCHED_TABLE": "theirs.jobs", "NIH_SCHED_LEDGER_SCHEMA": "ours"}
    assert scheduler("init", "--sample", env=env, cwd=tmp_path).returncode == 0
    done = scheduler("--burst", "--delay", "0.1", env=env, cwd=tmp_path)
    assert "19 done, 1 failed" in done.stderr
    inspector = inspect(engine)
    assert inspector.get_table_names() == []
    assert inspector.get_table_names(schema="theirs") == ["jobs"]
    assert set(inspector.get_table_names(schema="ours")) == {
        "nih_sched_meta",
        "nih_sched_sources",
        "nih_sched_attempts",
        "nih_sched_counts",
        "nih_sched_leases",
    }
    engine.dispose()
