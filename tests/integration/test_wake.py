"""A new row starts long before the next poll: by NOTIFY, by the doorbell, by SQLite's data_version."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import servers
from conftest import Work, make_work
from servers import Database, Spawned, eventually, scheduler, spawn_scheduler

import nih_sched
from nih_sched.pace import LATELY
from nih_sched.settings import Settings
from nih_sched.wake import channel

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

POLL = 30  # seconds
SOON = 15.0  # seconds: well before the poll
LINE = ("--job", "handlers:count", "--max-concurrent-jobs", "1", "--poll-interval", str(POLL))


@contextmanager
def idle(work: Work, *options: str, **env: str) -> Iterator[Spawned]:
    """A scheduler that has run row 1 and has nothing to do now, 30 s from its next look at the table."""
    work.insert(1)
    with spawn_scheduler(*LINE, *options, env=work.env | env, cwd=work.folder) as process:
        eventually(lambda: work.states() == {"Done": 1})
        time.sleep(LATELY + 1.0)  # for so long it looks for more by itself
        yield process
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == 0
        assert "Traceback" not in process.output


def runs_soon(work: Work, *ids: int) -> None:
    """Insert these rows; they are done well before the poll."""
    work.insert(*ids)
    done_soon(work, *ids)


def done_soon(work: Work, *ids: int) -> None:
    names = ", ".join(map(str, ids))
    left = f"SELECT id FROM work WHERE id IN ({names}) AND state <> 'Done'"
    eventually(lambda: work.sql(left) == [], timeout=SOON)


@pytest.fixture
def pg(postgresql_db: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = make_work(postgresql_db, tmp_path / "app")
    yield made
    made.engine.dispose()


def init(work: Work, *options: str) -> str:
    done = scheduler("init", *options, env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def triggers(work: Work) -> int:
    return int(work.sql("SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass('work')")[0][0])


def listeners(work: Work) -> list[int]:
    query = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
    return [row[0] for row in work.sql(query)]


def source(work: Work) -> str:
    return scheduler("source", env=work.env, cwd=work.folder).stdout.strip()


def test_without_anything_that_tells_a_row_waits_for_the_poll(pg: Work) -> None:
    with idle(pg):
        pg.insert(2)
        time.sleep(3)
        assert pg.states() == {"Done": 1, "Pending": 1}
        assert listeners(pg) == []


def test_rows_that_are_added_start_at_once(pg: Work) -> None:
    with idle(pg):
        done = scheduler("add", "--set", "id=2", "--set", "kind=a", env=pg.env, cwd=pg.folder)
        assert done.stdout == "Added 1 rows to work.\n", done.stderr
        done_soon(pg, 2)


def test_rows_are_added_without_redis_too(pg: Work) -> None:
    env = pg.env | {"REDIS_URL": "redis://localhost:1"}
    done = scheduler("add", "--set", "id=2", "--set", "kind=a", env=env, cwd=pg.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert pg.states() == {"Pending": 1}


def test_while_rows_come_others_are_looked_for_without_being_told(pg: Work) -> None:
    with idle(pg, "--poll-interval", f"{SOON + 5}"):
        pg.insert(2)
        eventually(lambda: pg.states() == {"Done": 2}, timeout=45)  # nobody tells of it: it waits for the poll
        runs_soon(pg, 3)


def test_a_notification_starts_a_row(pg: Work) -> None:
    init(pg, "--notify")
    with idle(pg):
        runs_soon(pg, 2)
        pg.insert(3, state="Draft")
        pg.sql("UPDATE work SET state = 'Pending' WHERE id = 3")
        done_soon(pg, 3)


def test_only_rows_that_become_ready_notify(pg: Work) -> None:
    init(pg, "--notify")
    pg.insert(1)
    with pg.engine.connect() as ears:
        driver = ears.connection.driver_connection
        assert driver is not None
        driver.autocommit = True
        (name,) = pg.sql(
            "SELECT DISTINCT substring(pg_get_triggerdef(oid) from '\"?nih_sched_[0-9a-f]{16}') FROM "
            "pg_trigger WHERE tgrelid = to_regclass('work')"
        )[0]
        driver.execute(f"LISTEN {name}")

        def heard() -> list[str]:
            return [one.payload for one in driver.notifies(timeout=0.3)]

        for word in ("Queued", "Started", "Done"):
            pg.sql(f"UPDATE work SET state = '{word}' WHERE id = 1")
        assert heard() == []
        pg.sql("UPDATE work SET state = 'Pending' WHERE id = 1")
        assert heard() == [""]
        pg.sql("UPDATE work SET state = 'Pending', kind = 'b' WHERE id = 1")
        assert heard() == []
        pg.insert(2, 3, 4)
        assert heard() == [""]


def test_a_lost_listener_comes_back(pg: Work) -> None:
    init(pg, "--notify")
    with idle(pg) as process:
        (pid,) = eventually(lambda: listeners(pg))
        pg.sql("SELECT pg_terminate_backend(:pid)", pid=pid)
        (other,) = eventually(lambda: [one for one in listeners(pg) if one != pid])
        assert other != pid
        runs_soon(pg, 2)
        assert "unreachable" not in process.output


def test_triggers_made_twice_and_shown_and_dropped(pg: Work) -> None:
    shown = init(pg, "--notify", "--print-sql")
    assert "CREATE TRIGGER nih_sched_insert_" in shown
    assert pg.sql("SELECT to_regclass('nih_sched_attempts')")[0][0] is None
    assert triggers(pg) == 0
    assert "Created: CREATE TRIGGER" in init(pg, "--notify")
    assert "Created: CREATE TRIGGER" in init(pg, "--notify")
    assert triggers(pg) == 2
    done = scheduler("uninstall", "--yes", env=pg.env, cwd=pg.folder)
    assert done.returncode == 0, done.stderr
    assert triggers(pg) == 0
    assert pg.sql("SELECT count(*) FROM pg_proc WHERE proname = 'nih_sched_notify'")[0][0] == 0


def test_triggers_on_names_and_words_that_need_quoting(pg: Work) -> None:
    pg.sql('CREATE SCHEMA "Our Own"')
    pg.sql('CREATE SCHEMA "Its"')
    pg.sql("CREATE TYPE mood AS ENUM ('it''s: 100%', 'Queued', 'Started', 'Done', 'Failed')")
    pg.sql('CREATE TABLE "Its"."My Rows" ("Id" INTEGER PRIMARY KEY, "The State" mood)')
    named = {
        "NIH_SCHED_TABLE": "Its.My Rows",
        "NIH_SCHED_STATUS_KEY": "The State",
        "NIH_SCHED_LEDGER_SCHEMA": "Our Own",
    }
    env = pg.env | named | {"NIH_SCHED_READY_VAL": "it's: 100%"}
    for _ in range(2):
        done = scheduler("init", "--notify", env=env, cwd=pg.folder)
        assert done.returncode == 0, done.stderr
    with spawn_scheduler("--command", "true", "--poll-interval", str(POLL), env=env, cwd=pg.folder) as process:
        eventually(lambda: listeners(pg))
        time.sleep(1.0)
        pg.sql('INSERT INTO "Its"."My Rows" VALUES (1, :word)', word="it's: 100%")
        eventually(lambda: pg.sql('SELECT "The State" FROM "Its"."My Rows"') == [("Done",)], timeout=SOON)
        process.terminate()
        process.wait(20)
    assert scheduler("uninstall", "--yes", env=env, cwd=pg.folder).returncode == 0
    assert pg.sql("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'nih_sched_%'")[0][0] == 0


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def test_other_databases_refuse_to_notify(request: pytest.FixtureRequest, kind: str) -> None:
    database: Database = request.getfixturevalue(f"{kind}_db")
    done = scheduler("init", "--notify", env={"DATABASE_URL": database.url})
    assert (done.returncode, done.stdout) == (2, "")
    assert "--notify is for PostgreSQL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "kind",
    ["sqlite", *(pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ("mariadb", "postgresql"))],
)
def test_the_doorbell_starts_a_row(
    request: pytest.FixtureRequest, kind: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    work = make_work(request.getfixturevalue(f"{kind}_db"), tmp_path / "app")
    with idle(work, **deaf_to_sqlite(work)):
        work.insert(2)
        assert nih_sched.ring(Settings(database_url=work.database.url, table="work", redis_url=redis_url))
        done_soon(work, 2)
        work.insert(3)
        with redis.Redis.from_url(redis_url) as client:
            assert client.publish(channel(source(work)), "1") == 1
        done_soon(work, 3)
    work.engine.dispose()


def deaf_to_sqlite(work: Work) -> dict[str, str]:
    """The environment in which a scheduler doesn't see SQLite's data_version change; other databases have none."""
    (work.folder / "sitecustomize.py").write_text(
        "from nih_sched.dialects.data_version import DataVersion\nDataVersion.tend = lambda self: None\n"
    )
    return {"PYTHONPATH": str(work.folder)}


def test_data_version_starts_a_row(lite: Work) -> None:
    with idle(lite):
        runs_soon(lite, 2)
        runs_soon(lite, 3, 4, 5)


def test_the_doorbell_of_an_embedded_redis(sqlite_db: Database, tmp_path: Path) -> None:
    work = make_work(sqlite_db, tmp_path / "app")
    settings = Settings(database_url=sqlite_db.url, table="work")
    assert nih_sched.ring(settings) is False  # nobody is there
    with idle(work):
        assert nih_sched.ring(settings) is True
    eventually(lambda: nih_sched.ring(settings) is False)
    work.engine.dispose()


def test_the_doorbell_works_again_after_redis_was_away(
    mariadb_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = servers.Redis().start()
    try:
        monkeypatch.setenv("REDIS_URL", server.url)
        work = make_work(mariadb_db, tmp_path / "app")
        settings = Settings(database_url=work.database.url, table="work", redis_url=server.url)
        with idle(work) as process:
            assert nih_sched.ring(settings)
            server.kill()
            assert nih_sched.ring(settings) is False
            time.sleep(3)
            server.start()
            eventually(lambda: nih_sched.ring(settings), timeout=SOON)
            time.sleep(1)
            work.insert(2)
            assert nih_sched.ring(settings)
            done_soon(work, 2)
            assert process.output.count("Redis unreachable") <= 3
        work.engine.dispose()
    finally:
        server.kill()
