"""Surgery on the table while its rows are queued, started, or wait for a retry."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import Work
from servers import Spawned, eventually, plain_engine, scheduler, spawn_scheduler

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

MODULE = """
import os, time
from handlers import note

def job(id, kind, attempt):
    note("begin", id)
    if kind == "fails" and attempt == 1:
        raise RuntimeError("once")
    while kind == "gate" and not os.path.exists("open"):
        time.sleep(0.02)
    note("end", id)
"""
LINE = ("--job", "surgery:job", "--max-concurrent-jobs", "1", "--grace", "1")


def on(**statements: list[str]) -> Any:
    """Run a test with these statements, by database."""
    marks = {"postgresql": [pytest.mark.postgresql], "mariadb": [pytest.mark.mariadb]}
    return pytest.mark.parametrize(
        ("database", "statement"),
        [pytest.param(kind, one, marks=marks.get(kind, [])) for kind, many in statements.items() for one in many],
        indirect=["database"],
    )


@pytest.fixture(autouse=True)
def _module(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir(exist_ok=True)
    (tmp_path / "app" / "surgery.py").write_text(MODULE)


def noted(work: Work, word: str) -> dict[int, int]:
    """How often each row began, or ended."""
    return {int(line.split()[1]): times for line, times in work.ran().items() if line.startswith(word)}


def rows(work: Work) -> dict[int, str]:
    """The table."""
    return dict(map(tuple, work.sql("SELECT id, state FROM work")))


def open_claims(work: Work) -> list[str]:
    """The keys of claims that haven't ended."""
    return [key for (key,) in work.sql("SELECT row_key FROM nih_sched_attempts WHERE open_key IS NOT NULL")]


def check_quiet(process: Spawned) -> None:
    """Nothing crashed, and nothing was said over and over."""
    assert "Traceback" not in process.output
    assert "ended unexpectedly" not in process.output
    assert len(process.output.splitlines()) < 40


@contextmanager
def in_all_states(work: Work, *more: str) -> Iterator[Spawned]:
    """A scheduler: row 1 waits for its retry, row 2 runs until open() is called, rows 3 and 4 are queued."""
    for number, kind in enumerate(["fails", "gate", "plain", "plain"], 1):
        work.insert(number, kind=kind)
    with spawn_scheduler(*LINE, "--delay", "1", *more, env=work.env, cwd=work.folder) as process:
        eventually(lambda: noted(work, "begin").get(2) == 1 and work.attempts(1)[-1].attempt == 2)
        assert rows(work) == {1: "Queued", 2: "Started", 3: "Queued", 4: "Queued"}
        yield process


def open_gate(work: Work) -> None:
    """Row 2 may end."""
    (work.folder / "open").touch()


def finish(work: Work, process: Spawned) -> None:
    """Everything has come to its end, and it stops as it should."""
    eventually(lambda: open_claims(work) == [])
    process.terminate()
    assert process.wait(20) == 0
    check_quiet(process)


# Rows


@on(
    sqlite=["DELETE FROM work"], postgresql=["DELETE FROM work", "TRUNCATE TABLE work"], mariadb=["TRUNCATE TABLE work"]
)
def test_rows_deleted_stay_dead(work: Work, statement: str) -> None:
    with in_all_states(work) as process:
        work.sql(statement)
        open_gate(work)
        work.insert(9, kind="plain")
        eventually(lambda: rows(work) == {9: "Done"})
        finish(work, process)
    assert rows(work) == {9: "Done"}
    assert noted(work, "begin") == {1: 1, 2: 1, 9: 1}
    assert work.attempts(2)[-1].outcome == "done"
    for row in (1, 3, 4):
        assert work.attempts(row)[-1].outcome == "cancelled"
        assert work.attempts(row)[-1].reason == "its owner changed or deleted the row before it began"


def test_rows_whose_keys_change(work: Work) -> None:
    with in_all_states(work) as process:
        work.sql("UPDATE work SET id = id + 100")
        open_gate(work)
        work.insert(9, kind="plain")
        eventually(lambda: rows(work).get(9) == "Done")
        finish(work, process)
    assert noted(work, "begin") == {1: 1, 2: 1, 9: 1}
    # What was claimed under the old keys is over; what stands under the new ones was never claimed: its owner's affair.
    assert set(rows(work)) == {9, 101, 102, 103, 104}
    assert set(rows(work).values()) <= {"Done", "Queued", "Started"}
    work.sql("UPDATE work SET state = 'Pending' WHERE id > 100")
    done = scheduler(*LINE, "--burst", "--delay", "0.1", env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    assert set(rows(work).values()) == {"Done"}
    assert noted(work, "end") == {2: 1, 9: 1, 101: 1, 102: 1, 103: 1, 104: 1}


def test_rows_deleted_and_inserted_anew_under_the_same_keys(work: Work) -> None:
    with in_all_states(work) as process:
        with work.engine.begin() as connection:
            connection.execute(sqlalchemy.text("DELETE FROM work"))
            for number in (1, 2, 3):
                values = f"({number}, 'Pending', 'plain')"
                connection.execute(sqlalchemy.text(f"INSERT INTO work (id, state, kind) VALUES {values}"))
        eventually(lambda: rows(work)[3] == "Queued")
        assert noted(work, "begin") == {1: 1, 2: 1}  # and row 2 not twice at once
        open_gate(work)
        eventually(lambda: rows(work) == {1: "Done", 2: "Done", 3: "Done"})
        finish(work, process)
    assert noted(work, "begin") == {1: 2, 2: 2, 3: 1}
    assert noted(work, "end") == {1: 1, 2: 2, 3: 1}


# Columns and tables


def test_a_column_dropped_that_the_handler_needs(work: Work) -> None:
    with in_all_states(work, "--tries", "1") as process:
        work.sql("ALTER TABLE work DROP COLUMN kind")
        open_gate(work)
        eventually(lambda: rows(work) == {1: "Failed", 2: "Done", 3: "Failed", 4: "Failed"})
        for row in (1, 3, 4):
            assert "kind" in work.attempts(row)[-1].reason
        work.sql("ALTER TABLE work ADD COLUMN kind VARCHAR(20)")
        work.insert(9, kind="plain")
        eventually(lambda: rows(work)[9] == "Done")
        finish(work, process)
    assert noted(work, "begin") == {1: 1, 2: 1, 9: 1}


NO_STATUS, NO_TABLE = "ALTER TABLE work DROP COLUMN state", "DROP TABLE work"


@on(
    sqlite=[NO_STATUS, NO_TABLE, "DROP TABLE nih_sched_attempts", "DROP TABLE nih_sched_leases"],
    postgresql=[NO_STATUS, NO_TABLE],
    mariadb=[NO_STATUS, NO_TABLE],
)
def test_what_it_cant_do_without_is_dropped(work: Work, statement: str) -> None:
    with in_all_states(work) as process:
        before = len(process.output.splitlines())
        work.sql(statement)
        open_gate(work)
        eventually(lambda: process.poll() is not None)
        assert process.returncode == 2
        check_quiet(process)
        errors = [line for line in process.output.splitlines() if line.startswith("Error")]
        assert len(errors) == 1
        assert statement.rsplit(maxsplit=1)[-1] in errors[0]
        assert len(process.output.splitlines()) - before <= 12
    assert noted(work, "begin") == {1: 1, 2: 1}
    assert noted(work, "end") in ({2: 1}, {})


@pytest.mark.parametrize("part", ["producer", "worker"])
def test_a_part_alone_survives_the_tables_end_or_says_why(lite: Work, part: str) -> None:
    other = "worker" if part == "producer" else "producer"
    env = lite.env | {"NIH_SCHED_JOB": "surgery:job"}
    lite.insert(1, kind="gate")
    with (
        spawn_scheduler("producer", env=env, cwd=lite.folder) as producer,
        spawn_scheduler("worker", "--grace", "1", env=env, cwd=lite.folder) as worker,
    ):
        processes = {"producer": producer, "worker": worker}
        eventually(lambda: noted(lite, "begin") == {1: 1})
        processes[other].kill_all() if other == "producer" else None
        lite.sql("DROP TABLE work")
        open_gate(lite)
        process = processes[part]
        if part == "producer":
            eventually(lambda: process.poll() is not None)
            assert process.returncode == 2
            assert sum(line.startswith("Error") for line in process.output.splitlines()) == 1
        else:
            eventually(lambda: open_claims(lite) == [])
            process.terminate()
            assert process.wait(20) == 0
        check_quiet(process)


# Locks


@contextmanager
def locked(work: Work) -> Iterator[None]:
    """Nobody else gets at the table meanwhile."""
    if work.database.name == "sqlite":
        with closing(sqlite3.connect(str(work.engine.url.database), isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield
            connection.execute("ROLLBACK")
        return
    # Not by an engine of ours: its transactions may idle for some seconds only.
    owner = plain_engine(work.database.url)
    with closing(owner.connect()) as connection:
        mariadb = work.database.name == "mariadb"
        connection.exec_driver_sql("LOCK TABLES work WRITE" if mariadb else "LOCK TABLE work IN ACCESS EXCLUSIVE MODE")
        yield
        if mariadb:
            connection.exec_driver_sql("UNLOCK TABLES")
    owner.dispose()


def test_the_table_locked_for_longer_than_a_lease(work: Work) -> None:
    # SQLite locks the whole file, our leases too.
    lease, seconds = ("120", 2.0) if work.database.name == "sqlite" else ("4", 5.5)
    with in_all_states(work, "--lease", lease) as process:
        with locked(work):
            open_gate(work)
            time.sleep(seconds)
        eventually(lambda: set(rows(work).values()) == {"Done"}, timeout=40)
        finish(work, process)
    assert noted(work, "end") == {1: 1, 2: 1, 3: 1, 4: 1}
    assert noted(work, "begin") == {1: 2, 2: 1, 3: 1, 4: 1}
    assert work.sql("SELECT count(*) FROM nih_sched_attempts WHERE outcome = 'interrupted'") == [(0,)]
