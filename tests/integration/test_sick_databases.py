"""Sick databases under running rows: an outcome that was reached is kept, and written once that can be done."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import servers
import sqlalchemy
from conftest import Work, make_work
from servers import Database, Spawned, eventually, scheduler, spawn_scheduler

from nih_sched.dialects import connect, dialect_of

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

MODULE = """
import os, time
from handlers import note

def gated(id, kind, attempt):
    note("begin", id, os.getpid())
    if kind == "fails" and attempt == 1:
        raise RuntimeError("once")
    while kind.startswith("gate") and not os.path.exists(kind):
        time.sleep(0.02)
    note("end", id)

def stuck_once(id):
    note("begin", id, os.getpid())
    while not os.path.exists("second"):
        open("second", "w").close()
        time.sleep(300)
    note("end", id)

def big(id):
    note("end", id)
    open("full", "w").close()
    return "x" * 60000
"""
JOB = ("--job", "sick:gated")


@pytest.fixture(autouse=True)
def _module(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir(exist_ok=True)
    (tmp_path / "app" / "sick.py").write_text(MODULE)


def insert(work: Work, *kinds: str, first: int = 1) -> None:
    """Rows first, first + 1, … of these kinds."""
    with work.engine.begin() as connection:
        for number, kind in enumerate(kinds, first):
            connection.execute(
                sqlalchemy.text("INSERT INTO work (id, state, kind) VALUES (:i, 'Pending', :k)"),
                {"i": number, "k": kind},
            )


def begun(work: Work) -> dict[int, list[int]]:
    """The pids of the horses that began each row, in order."""
    found: dict[int, list[int]] = {}
    for line in (work.folder / "ran.log").read_text().splitlines() if (work.folder / "ran.log").exists() else []:
        words = line.split()
        if words[0] == "begin":
            found.setdefault(int(words[1]), []).append(int(words[2]))
    return found


def ended(work: Work) -> dict[int, int]:
    """How often each row's handler came to its end."""
    return {int(line.split()[1]): times for line, times in work.ran().items() if line.startswith("end")}


def outcomes(work: Work, row: int) -> list[str | None]:
    """Of a row's attempts, oldest first, over all its claims."""
    records = work.sql("SELECT id, outcome FROM nih_sched_attempts WHERE row_key = :k", k=f"[{row}]")
    claims = work.sql("SELECT id, coalesce(of_claim, id), attempt FROM nih_sched_attempts WHERE row_key = :k",
                      k=f"[{row}]")  # fmt: skip
    place = {number: (claim, attempt) for number, claim, attempt in claims}
    return [outcome for number, outcome in sorted(records, key=lambda record: place[record[0]])]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def open_gate(work: Work, name: str) -> None:
    """Let the rows that wait for it end."""
    (work.folder / name).touch()


def said_lost(process: Spawned) -> int:
    """How many processes have said that the database is away."""
    return process.output.count("database unreachable")


@contextmanager
def served(work: Work, *line: str, redis_url: str | None = None) -> Iterator[Spawned]:
    """A scheduler on the gated handler that must have behaved: no traceback, and it ends when told to."""
    env = work.env | ({"REDIS_URL": redis_url} if redis_url else {})
    with spawn_scheduler(*JOB, *line, env=env, cwd=work.folder, grace=20) as process:
        yield process
        process.terminate()
        assert process.wait(30) == 0
    assert "Traceback" not in process.output
    assert "ended unexpectedly" not in process.output


# Away


@pytest.mark.parametrize(("kind", "seconds"), [(servers.PostgreSQL, 10.0), (servers.MariaDB, 3.0)])
def test_an_outage_costs_no_outcome_even_if_the_horse_dies_in_it(
    kind: type[servers.DatabaseServer], seconds: float, redis_url: str, tmp_path: Path
) -> None:
    server = kind().start()
    try:
        with server.fresh() as database:
            work = make_work(database, tmp_path / "app")
            insert(work, "gate-1", "gate-2", "gate-2", "fails")
            with served(work, "--max-concurrent-jobs", "4", "--delay", "1.5", redis_url=redis_url) as process:
                eventually(lambda: len(begun(work)) == 4 and work.attempts(4)[-1].attempt == 2)
                work.engine.dispose()
                server.stop()
                down = time.monotonic()
                open_gate(work, "gate-2")
                # The producer, and the horses of rows 2 and 3, which have their outcomes and can't write them.
                eventually(lambda: said_lost(process) >= 3)
                os.kill(begun(work)[3][0], signal.SIGKILL)
                time.sleep(max(0.0, seconds - (time.monotonic() - down)))
                server.revive()
                eventually(lambda: work.states() == {"Done": 3, "Started": 1}, timeout=40)
                open_gate(work, "gate-1")
                eventually(lambda: work.states() == {"Done": 4})
            assert ended(work) == {1: 1, 2: 1, 3: 1, 4: 1}
            assert {row: len(pids) for row, pids in begun(work).items()} == {1: 1, 2: 1, 3: 1, 4: 2}
            assert [outcomes(work, row) for row in (1, 2, 3, 4)] == [["done"]] * 3 + [["failed", "done"]]
            work.engine.dispose()
    finally:
        server.kill()


def test_a_horse_whose_lease_runs_out_with_the_database_away_is_stopped_and_its_row_runs_again(
    redis_url: str, tmp_path: Path
) -> None:
    server = servers.PostgreSQL().start()
    try:
        with server.fresh() as database:
            work = make_work(database, tmp_path / "app")
            insert(work, "any")
            line = ("--job", "sick:stuck_once", "--max-concurrent-jobs", "1", "--lease", "3", "--tries", "0")
            with served(work, *line, redis_url=redis_url) as process:
                eventually((work.folder / "second").exists)
                (horse,) = begun(work)[1]
                work.engine.dispose()
                server.stop()
                eventually(lambda: is_gone(horse))
                server.revive()
                eventually(lambda: work.states() == {"Done": 1}, timeout=40)
                assert said_lost(process) >= 1
            assert outcomes(work, 1) == ["interrupted", "done"]
            assert "lease" in work.sql("SELECT reason FROM nih_sched_attempts WHERE outcome = 'interrupted'")[0][0]
            assert ended(work) == {1: 1}
            work.engine.dispose()
    finally:
        server.kill()


# Locked, and cut off


def test_sqlite_locked_when_rows_end(lite: Work) -> None:
    insert(lite, "gate-1", "gate-1")
    with served(lite, "--max-concurrent-jobs", "2"):
        eventually(lambda: len(begun(lite)) == 2)
        with closing(sqlite3.connect(str(lite.engine.url.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            open_gate(lite, "gate-1")
            eventually(lambda: len(ended(lite)) == 2)
            time.sleep(1.0)  # a few milliseconds do: the horse must have told its parent
            os.kill(begun(lite)[2][0], signal.SIGKILL)
            time.sleep(0.5)
            other.execute("ROLLBACK")
        eventually(lambda: lite.states() == {"Done": 2}, timeout=60)
    assert ended(lite) == {1: 1, 2: 1}
    assert [outcomes(lite, row) for row in (1, 2)] == [["done"]] * 2


def cut(server: servers.DatabaseServer, name: str) -> None:
    """Cut every connection to a database."""
    if isinstance(server, servers.PostgreSQL):
        server.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        return
    for (number,) in server.sql(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"):
        try:
            server.sql(f"KILL HARD {number}")
        except sqlalchemy.exc.DBAPIError:
            continue  # it has just gone


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_connections_cut_again_and_again(
    kind: str, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    with server.fresh() as database:
        work = make_work(database, tmp_path / "app")
        insert(work, *["plain"] * 25, "gate-1")
        name = str(work.engine.url.database)
        with served(work, "--max-concurrent-jobs", "2", redis_url=redis_url):
            eventually(lambda: ended(work))
            for _ in range(12):
                work.engine.dispose()
                cut(server, name)
                time.sleep(0.15)
            open_gate(work, "gate-1")
            eventually(lambda: work.states() == {"Done": 26}, timeout=60)
        assert ended(work) == dict.fromkeys(range(1, 27), 1)
        work.engine.dispose()


@pytest.mark.parametrize(("way", "last"), [("read", "do_commit"), ("write_at_once", "reset_isolation_level")])
def test_a_connection_cut_just_before_it_goes_back_takes_no_place_in_the_pool(
    mariadb_server: servers.MariaDB, monkeypatch: pytest.MonkeyPatch, way: str, last: str
) -> None:
    with mariadb_server.fresh() as database:
        engine = connect(database.url)
        plain = getattr(engine.dialect, last)
        cuts = []

        def cut_first(connection: Any) -> None:
            cut(mariadb_server, str(engine.url.database))
            cuts.append(connection)
            plain(connection)

        monkeypatch.setattr(engine.dialect, last, cut_first)
        for _ in range(4):  # one more than there are places
            with pytest.raises(sqlalchemy.exc.OperationalError):
                getattr(dialect_of(engine), way)(engine, lambda c: c.exec_driver_sql("SELECT 1").scalar())
        monkeypatch.undo()
        assert len(cuts) == 8  # each of them was tried twice
        assert dialect_of(engine).read(engine, lambda c: c.exec_driver_sql("SELECT 1").scalar()) == 1
        engine.dispose()


@contextmanager
def read_only(server: servers.DatabaseServer, work: Work, *, cut_after: bool = True) -> Iterator[None]:
    """The database refuses every write meanwhile."""
    name = work.engine.url.database
    work.engine.dispose()
    if isinstance(server, servers.PostgreSQL):
        server.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        cut(server, str(name))
    else:
        server.sql("SET GLOBAL read_only = 1")
    try:
        yield
    finally:
        work.engine.dispose()
        if isinstance(server, servers.PostgreSQL):
            server.sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            if cut_after:
                cut(server, str(name))
        else:
            server.sql("SET GLOBAL read_only = 0")


@pytest.mark.parametrize(
    ("kind", "cut_after"),
    [
        ("postgresql", True),
        ("postgresql", False),  # as after a failover: sessions opened on what was a replica then stay read-only
        ("mariadb", True),
    ],
)
def test_read_only_for_a_while(
    kind: str, cut_after: bool, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    with server.fresh() as database:
        if kind == "mariadb":  # its root may write all the same
            name = sqlalchemy.make_url(database.url).database
            server.sql("CREATE OR REPLACE USER app@'127.0.0.1'", f"GRANT ALL ON {name}.* TO app@'127.0.0.1'")
        work = make_work(Database(kind, database.url.replace("//root@", "//app@")), tmp_path / "app")
        insert(work, "gate-1", "gate-1", "gate-1", *["plain"] * 9)
        with served(work, "--max-concurrent-jobs", "2", redis_url=redis_url) as process:
            eventually(lambda: len(begun(work)) == 2)
            with read_only(server, work, cut_after=cut_after):
                open_gate(work, "gate-1")
                eventually(lambda: said_lost(process) >= 3)  # the producer and both horses
                assert len(begun(work)) == 2
                assert work.states() == {"Started": 2, "Queued": 8, "Pending": 2}
            eventually(lambda: work.states() == {"Done": 12}, timeout=40)
        assert ended(work) == dict.fromkeys(range(1, 13), 1)
        work.engine.dispose()


# What it answers


def make_trigger(work: Work, name: str, when: str, table: str, condition: str, body: dict[str, str]) -> None:
    """A trigger that does `body`, one text for each kind of database, when `condition` holds."""
    kind = work.database.name
    if kind == "sqlite":
        work.sql(f"CREATE TRIGGER {name} BEFORE {when} ON {table} WHEN {condition} BEGIN {body[kind]}; END")
    elif kind == "mariadb":
        work.sql(
            f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW"
            f" BEGIN IF {condition} THEN {body[kind]}; END IF; END"
        )
    else:
        work.sql(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN IF {condition} THEN {body[kind]}; END IF; RETURN NEW; END $$"
        )
        work.sql(f"CREATE TRIGGER {name} BEFORE {when} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")


def drop_trigger(work: Work, name: str, table: str) -> None:
    """Away with it."""
    work.sql(f"DROP TRIGGER {name}" + (f" ON {table}" if work.database.name == "postgresql" else ""))


def answer(kind: str, code: str) -> str:
    """The statement with which a trigger answers with this code."""
    if kind == "postgresql":
        return f"RAISE EXCEPTION 'answer %', '{code}' USING ERRCODE = '{code}'"
    return f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'answer {code}'"


PASSING = {
    "all": ("postgresql", ["40P01", "40001", "55P03", "53100", "57014", "53300"]),
    "locks": ("mariadb", ["1213", "1205", "1020", "1290"]),  # deadlock, lock wait, record changed, read-only
    "disk full": ("mariadb", ["1021", "1114", "1030"]),
    "interrupted": ("mariadb", ["1317", "1969"]),  # KILL QUERY, max_statement_time
}
# The claim, the start, the finish.
STEPS = [
    ("INSERT", "true"),
    ("UPDATE", "NEW.run IS NOT NULL AND OLD.run IS NULL"),
    ("UPDATE", "NEW.outcome IS NOT NULL"),
]


def answers(kind: str, codes: list[str], sequence: str) -> str:
    """The block with which a trigger answers with each of the codes once."""
    cases = " ELSEIF ".join(f"n = {n} THEN {answer(kind, code)};" for n, code in enumerate(codes, 1))
    # A sequence isn't rolled back.
    if kind == "postgresql":
        return f"DECLARE n int := nextval('{sequence}'); BEGIN IF {cases} END IF; END"
    return f"BEGIN DECLARE n INT; SET n = nextval({sequence}); IF {cases} END IF; END"


@pytest.mark.parametrize("group", PASSING)
def test_answers_that_pass_are_outlasted(
    group: str, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    kind, codes = PASSING[group]
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    with server.fresh() as database:
        work = make_work(database, tmp_path / "app")
        insert(work, "plain")
        assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
        for number, (when, condition) in enumerate(STEPS):
            work.sql(f"CREATE SEQUENCE tries{number}")
            body = {kind: answers(kind, codes, f"tries{number}")}
            make_trigger(work, f"sick{number}", when, "nih_sched_attempts", condition, body)
        env = work.env | {"REDIS_URL": redis_url}
        done = scheduler(*JOB, "--burst", "--max-concurrent-jobs", "1", "--tries", "0", env=env, cwd=work.folder)
        assert done.returncode == 0, done.stderr
        assert work.states() == {"Done": 1}
        assert [outcomes(work, 1), ended(work)] == [["done"], {1: 1}]
        assert "refused" not in done.stderr
        work.engine.dispose()


FULL = [("postgresql", "53100"), ("mariadb", "1114")]


@pytest.mark.parametrize(("kind", "code"), FULL)
def test_a_full_disk_is_waited_for(
    kind: str, code: str, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    with server.fresh() as database:
        work = make_work(database, tmp_path / "app")
        insert(work, "gate-1")
        with served(work, "--max-concurrent-jobs", "1", "--tries", "0", redis_url=redis_url) as process:
            eventually(lambda: begun(work))
            for when in ("INSERT", "UPDATE"):
                make_trigger(work, f"full_{when}", when, "nih_sched_attempts", "true", {kind: answer(kind, code)})
            open_gate(work, "gate-1")
            insert(work, "plain", "plain", first=2)
            eventually(lambda: said_lost(process) >= 2 or process.poll() is not None)
            assert process.poll() is None, process.output
            assert work.states() == {"Started": 1, "Pending": 2}
            for when in ("INSERT", "UPDATE"):
                drop_trigger(work, f"full_{when}", "nih_sched_attempts")
            eventually(lambda: work.states() == {"Done": 3}, timeout=40)
        assert ended(work) == {1: 1, 2: 1, 3: 1}
        assert [outcomes(work, row) for row in (1, 2, 3)] == [["done"]] * 3
        work.engine.dispose()


FULL_SQLITE = """
import os
from sqlalchemy import event
from sqlalchemy.pool import Pool

@event.listens_for(Pool, "checkout")
def limit(connection, record, proxy):
    # As long as the file stands there, the database can't grow.
    connection.execute(f"PRAGMA max_page_count = {1 if os.path.exists('full') else 1000000}").close()
"""


def test_sqlite_disk_full_when_a_row_ends(lite: Work) -> None:
    (lite.folder / "limits.py").write_text(FULL_SQLITE)
    insert(lite, "any")
    with served(lite, "--job", "sick:big", "--preload", "limits", "--max-concurrent-jobs", "1") as process:
        eventually(lambda: "disk is full" in process.output)
        assert lite.states() == {"Started": 1}
        (lite.folder / "full").rename(lite.folder / "was-full")
        eventually(lambda: lite.states() == {"Done": 1}, timeout=40)
    assert ended(lite) == {1: 1}
    assert outcomes(lite, 1) == ["done"]


REFUSED = {
    "sqlite": "SELECT RAISE(ABORT, 'not this one')",
    "postgresql": "RAISE EXCEPTION 'not this one'",
    "mariadb": "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'",
}


def test_an_outcome_that_the_ledger_refuses_blocks_no_other_and_is_kept(work: Work) -> None:
    insert(work, "gate-1", "gate-1", "plain", "plain")
    with served(work, "--max-concurrent-jobs", "2", "--tries", "0") as process:
        eventually(lambda: len(begun(work)) == 2)
        condition = "NEW.outcome IS NOT NULL AND NEW.row_key = '[1]'"
        make_trigger(work, "refuse", "UPDATE", "nih_sched_attempts", condition, REFUSED)
        open_gate(work, "gate-1")
        eventually(lambda: work.states().get("Done") == 3)
        eventually(lambda: "not this one" in process.output)  # said, not swallowed
        drop_trigger(work, "refuse", "nih_sched_attempts")
        eventually(lambda: work.states() == {"Done": 4})
    assert outcomes(work, 1) == ["done"]
    assert ended(work) == {1: 1, 2: 1, 3: 1, 4: 1}


def test_a_row_whose_new_state_is_refused_blocks_no_other_and_isnt_run_again(work: Work) -> None:
    insert(work, "plain", "plain", "plain")
    if work.database.name == "postgresql":  # refused as late as at COMMIT
        work.sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.id = 1 AND NEW.state = 'Done' THEN RAISE EXCEPTION 'not this one'; END IF;"
            " RETURN NEW; END $$"
        )
        work.sql(
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON work DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    else:
        make_trigger(work, "refuse", "UPDATE", "work", "NEW.id = 1 AND NEW.state = 'Done'", REFUSED)
    done = scheduler(*JOB, "--burst", "--max-concurrent-jobs", "1", env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    assert "row 1 stays as it is, the database refused its new state" in done.stderr
    assert "Traceback" not in done.stderr
    assert work.states() == {"Started": 1, "Done": 2}
    assert outcomes(work, 1) == ["done"]
    assert ended(work) == {1: 1, 2: 1, 3: 1}


def test_nothing_is_claimed_that_cant_be_recorded(work: Work) -> None:
    insert(work, "plain", "plain")
    assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
    make_trigger(work, "refuse", "INSERT", "nih_sched_attempts", "NEW.row_key = '[2]'", REFUSED)
    done = scheduler(*JOB, "--max-concurrent-jobs", "1", env=work.env, cwd=work.folder)
    assert done.returncode == 2, done.stderr
    assert work.states() == {"Pending": 2}
    assert begun(work) == {}
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, done.stderr
    assert "not this one" in errors[0]
    assert "Traceback" not in done.stderr


# Real locks


@contextmanager
def shortened_waits(server: servers.DatabaseServer, work: Work) -> Iterator[None]:
    """Waiting for a lock ends after a second at most."""
    if isinstance(server, servers.PostgreSQL):
        server.sql(f"ALTER DATABASE {work.engine.url.database} SET lock_timeout = '300ms'")
        yield
        return
    (before,) = server.sql("SELECT @@GLOBAL.innodb_lock_wait_timeout")[0]
    server.sql("SET GLOBAL innodb_lock_wait_timeout = 1")
    try:
        yield
    finally:
        server.sql(f"SET GLOBAL innodb_lock_wait_timeout = {before}")


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_lock_that_its_owner_holds_for_long(
    kind: str, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    with server.fresh() as database:
        work = make_work(database, tmp_path / "app")
        insert(work, "gate-1", "plain", "plain")
        with (
            shortened_waits(server, work),
            served(work, "--max-concurrent-jobs", "1", "--tries", "0", redis_url=redis_url) as process,
        ):
            eventually(lambda: begun(work) and work.states() == {"Started": 1, "Queued": 2})
            with work.engine.connect() as holder:
                holder.execute(sqlalchemy.text("SELECT * FROM work WHERE id IN (1, 2) FOR UPDATE"))
                open_gate(work, "gate-1")
                eventually(lambda: said_lost(process) >= 1)
                assert len(begun(work)) == 1
            eventually(lambda: work.states() == {"Done": 3}, timeout=40)
        assert ended(work) == {1: 1, 2: 1, 3: 1}
        assert [outcomes(work, row) for row in (1, 2, 3)] == [["done"]] * 3
        work.engine.dispose()


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_real_deadlock_with_a_rows_owner(
    kind: str, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    with server.fresh() as database:
        work = make_work(database, tmp_path / "app")
        insert(work, "gate-1")
        engine: Any = connect(database.url)
        with served(work, "--max-concurrent-jobs", "1", "--tries", "0", redis_url=redis_url):
            eventually(lambda: begun(work) and work.states() == {"Started": 1})
            with engine.connect() as owner:
                # The owner has the row, and then wants what the horse, which wants the row, has.
                owner.execute(sqlalchemy.text("SELECT * FROM work WHERE id = 1 FOR UPDATE"))
                open_gate(work, "gate-1")
                eventually(lambda: ended(work))
                time.sleep(0.5)
                with suppress(sqlalchemy.exc.DBAPIError):  # one of the two must lose
                    owner.execute(sqlalchemy.text("SELECT id FROM nih_sched_attempts WHERE outcome IS NULL FOR UPDATE"))
                owner.rollback()
            eventually(lambda: work.states() == {"Done": 1}, timeout=40)
        assert [outcomes(work, 1), ended(work)] == [["done"], {1: 1}]
        engine.dispose()
        work.engine.dispose()
