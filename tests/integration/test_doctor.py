"""Each finding of the doctor, provoked for real; and silence where all is well."""

from __future__ import annotations

import http.server
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import redis
import servers
from conftest import Work, make_work
from servers import eventually, scheduler, spawn_scheduler

from nih_sched import doctor
from nih_sched.doctor import database as database_checks
from nih_sched.doctor import redis as redis_checks
from nih_sched.doctor import rows as row_checks
from nih_sched.settings import load
from nih_sched.store import Checkup, Orphans, open_desk
from nih_sched.store.history import History


def told(work: Work, *options: str, code: int, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `scheduler doctor --json` finds, by name."""
    done = scheduler("doctor", "--json", *options, env={**work.env, **(env or {})}, cwd=work.folder)
    assert done.returncode == code, done.stdout + done.stderr
    found = json.loads(done.stdout)
    for finding in found:
        assert finding["what"]
        assert finding["why"].endswith(".")
        assert finding["type"]
    return {finding["name"]: finding for finding in found}


def test_all_is_well_while_a_scheduler_works(work: Work) -> None:
    work.insert(*range(1, 4))
    with spawn_scheduler("--job", "handlers:count", env=work.env, cwd=work.folder):
        eventually(lambda: work.states() == {"Done": 3})
        assert told(work, "--job", "handlers:count", code=0) == {}
        done = scheduler("doctor", env=work.env, cwd=work.folder)
        assert (done.returncode, done.stdout) == (0, "Nothing is wrong.\n")


def test_claims_that_nobody_looks_after(work: Work) -> None:
    work.insert(1, 2)
    assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
    with spawn_scheduler("producer", "--job", "handlers:count", env=work.env, cwd=work.folder):
        eventually(lambda: work.states() == {"Queued": 2})
    assert told(work, code=0) == {}  # it has given them back
    work.sql("UPDATE work SET state = 'Queued'")
    hour = {
        "sqlite": "datetime('now', '-1 hour')",
        "postgresql": "now() - interval '1 hour'",
        "mariadb": "utc_timestamp(6) - interval 1 hour",
    }[work.database.name]
    source = scheduler("source", env=work.env, cwd=work.folder).stdout.strip()
    columns = "source, row_key, open_key, attempt, failures, tries, rq_id, claimed_at"
    both = f"'{source}', '[{{0}}]', '{{0}}', 1, 0, 3, 'x{{0}}', {hour}"
    work.sql(f"INSERT INTO nih_sched_attempts ({columns}, sent_at) VALUES ({both.format(1)}, {hour})")
    work.sql(f"INSERT INTO nih_sched_attempts ({columns}, due_at) VALUES ({both.format(2)}, {hour})")
    found = told(work, code=1)
    assert set(found) == {"no-producer", "no-worker", "overdue-retries", "orphans"}
    assert f"Source {source} has 2 open claims" in found["no-producer"]["what"]
    assert f"1 claims of source {source} wait" in found["no-worker"]["what"]
    assert "1 retries are overdue, the first of them by 36" in found["overdue-retries"]["what"]


def test_the_search_for_orphans_ends_and_says_so(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.insert(*range(1, 10), state="Started")
    assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
    with visit(work) as seen:
        (finding,) = row_checks.orphans(seen)
        assert "9 rows are Started with no open claim behind them: 1, 2, 3, 4, 5, 6, 7, 8, 9" in finding.what
        (finding,) = row_checks.orphans_of(seen.desk, 0.0)
        assert (finding.name, finding.is_problem) == ("orphans-unsearched", False)
        assert finding.what.startswith("None of the rows of ")
        assert finding.what.endswith("work were looked at, for such with no open claim: 0 s were over")
        monkeypatch.setattr("nih_sched.store.listing.PAGE", 2)
        now, real = [0.0], Orphans._unclaimed_of

        def slowly(self: Orphans, *args: Any, **facts: Any) -> Any:
            now[0] += 6.0
            return real(self, *args, **facts)

        monkeypatch.setattr("nih_sched.store.orphans.clock.monotonic", lambda: now[0])

        monkeypatch.setattr(Orphans, "_unclaimed_of", slowly)
        some, finding = row_checks.orphans_of(seen.desk, 10.0)
        assert "4 rows are Started with no open claim behind them: 6, 7, 8, 9" in some.what
        assert "Only those from the greatest key down to 6 of the rows" in finding.what
        monkeypatch.undo()
        assert some.fix is not None
        assert some.fix() == "Set 4 rows to where they belong."
    assert work.states() == {"Started": 5, "Pending": 4}


def test_words_and_index(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.insert(1, 2)
    work.insert(3, 4, 5, state="pending")
    work.insert(6, state="Draft")
    assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
    found = told(work, code=0)
    assert set(found) == {"unknown-words"}
    assert "'pending' (3), 'Draft' (1)" in found["unknown-words"]["what"]
    assert "pending differs from a word of ours in case" in found["unknown-words"]["why"]
    monkeypatch.setattr(row_checks, "LARGE", 4)
    with visit(work) as seen:
        (finding,) = row_checks.index(seen)
        assert finding.remedy.startswith("CREATE INDEX")
        monkeypatch.setattr(row_checks, "LARGE", 6)
        assert row_checks.index(seen) == []
        monkeypatch.setattr(row_checks, "LARGE", 4)
        monkeypatch.setattr(row_checks, "HEAVY", 0)
        (finding,) = row_checks.ledger(seen)
        assert "prune-history" in finding.remedy
    assert scheduler("init", "--create-index", env=work.env, cwd=work.folder).returncode == 0
    with visit(work) as seen:
        assert row_checks.index(seen) == []


@contextmanager
def visit(work: Work) -> Iterator[doctor.Visit]:
    settings = load({}, work.env)
    desk = open_desk(settings, create_ledger=False)
    try:
        yield doctor.Visit(settings, desk, None)
    finally:
        desk.close()


def test_missing_rights_on_postgresql(postgresql_db: servers.Database, work_on: Any) -> None:
    work = work_on(postgresql_db)
    work.sql("CREATE ROLE weak LOGIN")
    work.sql("GRANT SELECT ON work TO weak")
    assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
    for table in ("sources", "leases", "counts", "attempts"):
        work.sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON nih_sched_{table} TO weak")
    work.sql("REVOKE DELETE ON nih_sched_attempts FROM weak")
    work.sql("GRANT SELECT ON nih_sched_meta TO weak")
    url = work.database.url.replace("postgres@", "weak@")
    done = scheduler("doctor", env={**work.env, "DATABASE_URL": url}, cwd=work.folder)
    assert done.returncode == 1
    assert "The database refuses updates of state in public.work" in done.stdout
    assert "The database refuses deletes in nih_sched_attempts" in done.stdout
    assert done.stdout.count("refuses") == 2
    work.sql("DROP OWNED BY weak")
    work.sql("DROP ROLE weak")


@pytest.fixture
def work_on(redis_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("REDIS_URL", redis_url)
    return lambda database: make_work(database, tmp_path / "app")


def test_a_database_or_redis_that_is_away(lite: Work) -> None:
    lite.insert(1)
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    found = told(lite, code=1, env={"REDIS_URL": "redis://:secret@127.0.0.1:1/0"})
    assert set(found) == {"redis"}
    assert "secret" not in json.dumps(found)
    found = told(lite, code=1, env={"DATABASE_URL": "postgresql://me:secret@127.0.0.1:1/x"})
    assert set(found) == {"database"}
    assert "secret" not in json.dumps(found)


def test_an_sqlite_file_without_wal_gets_it(lite: Work) -> None:
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    lite.engine.dispose()
    with sqlite3.connect(str(lite.engine.url.database)) as connection:
        assert connection.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    connection.close()
    assert set(told(lite, code=0)) == {"sqlite-journal"}
    assert told(lite, "--fix", code=0)["sqlite-journal"]["fixed"] == "The journal mode is wal now."
    assert told(lite, code=0) == {}


def test_handlers_that_cant_work(lite: Work) -> None:
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    (lite.folder / "broken.py").write_text("def asks(address): pass\n")
    for job, words in (("nowhere:f", "No module named"), ("broken:asks", "'address', which is no column")):
        found = told(lite, "--job", job, code=1)
        assert words in found["handler"]["what"]


def test_a_redis_that_evicts_is_full_or_cant_save(lite: Work, redis_client: redis.Redis) -> None:
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    used = int(redis_client.info("memory")["used_memory"])
    try:
        redis_client.config_set("maxmemory", used + 50_000)
        redis_client.config_set("maxmemory-policy", "allkeys-lru")
        assert set(told(lite, code=1)) == {"redis-evicts", "redis-full"}
    finally:
        redis_client.config_set("maxmemory", 0)
        redis_client.config_set("maxmemory-policy", "noeviction")
    assert told(lite, code=0) == {}


@pytest.mark.parametrize(
    ("facts", "check", "name"),
    [
        ({"redis_version": "4.0.9"}, redis_checks.version, "old-redis"),
        ({"rdb_last_bgsave_status": "err"}, redis_checks.persistence, "redis-cant-save"),
        ({"aof_last_write_status": "err"}, redis_checks.persistence, "redis-cant-save"),
    ],
)
def test_what_a_server_here_cant_be_made_to_say(
    facts: dict[str, str], check: doctor.Check, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nih_sched.redis_client.server_facts", lambda connection: facts)
    assert [finding.name for finding in check(doctor.Visit(None, None, object()))] == [name]  # type: ignore[arg-type]


def test_an_old_server_and_clocks_that_differ(lite: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    with visit(lite) as seen:
        assert database_checks.version(seen) == database_checks.clock(seen) == []
        monkeypatch.setattr(Checkup, "version", lambda self: (3, 34))
        assert "3.34; the oldest served is 3.35" in database_checks.version(seen)[0].what
        real = History.now
        for hours, words in ((1, "3600 s ahead of"), (-1, "3600 s behind")):
            monkeypatch.setattr(History, "now", lambda self, hours=hours: real(self) + timedelta(hours=hours))
            assert words in database_checks.clock(seen)[0].what


def test_a_pause_is_mentioned(lite: Work) -> None:
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    lite.insert(1)
    assert scheduler("--job", "handlers:count", "--burst", env=lite.env, cwd=lite.folder).returncode == 0
    assert scheduler("pause", "--reason", "a move", env=lite.env, cwd=lite.folder).returncode == 0
    found = told(lite, code=0)
    assert "a move" in found["paused"]["what"]
    assert "scheduler resume" in found["paused"]["type"]


class _Open(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<title>RQ dashboard</title>")

    def log_message(self, *args: object) -> None:
        pass


def test_an_open_dashboard(lite: Work) -> None:
    assert scheduler("init", env=lite.env, cwd=lite.folder).returncode == 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        port = str(server.server_address[1])
        assert set(told(lite, "--dashboard-port", port, code=1)) == {"open-dashboard"}
    finally:
        server.shutdown()
        server.server_close()
