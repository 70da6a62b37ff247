"""Redis or the database away for a while, with nothing in flight: said once, and work goes on by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import servers
from conftest import make_work
from servers import Database, Spawned, eventually, spawn_scheduler


def told(process: Spawned, what: str) -> int:
    return process.output.count(f"Redis {what}")


def test_redis_restarted_empty(sqlite_db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = servers.Redis().start()
    try:
        monkeypatch.setenv("REDIS_URL", redis.url)
        work = make_work(sqlite_db, tmp_path / "app")
        line = ("--job", "handlers:count", "--max-concurrent-jobs", "2")
        with spawn_scheduler(*line, env=work.env, cwd=work.folder) as process:
            work.insert(1, 2)
            eventually(lambda: work.states() == {"Done": 2})
            redis.stop()
            eventually(lambda: "Redis unreachable" in process.output)
            work.insert(3, 4)
            redis.revive()
            eventually(lambda: work.states() == {"Done": 4}, timeout=40)
            eventually(lambda: told(process, "reachable again") == told(process, "unreachable"))
            assert told(process, "unreachable") <= 3
            process.terminate()
            assert process.wait(20) == 0
            assert "Traceback" not in process.output
        assert set(work.ran().values()) == {1}
    finally:
        redis.kill()


@pytest.mark.parametrize("kind", [servers.PostgreSQL, servers.MariaDB])
def test_database_restarted(kind: type[servers.DatabaseServer], redis_url: str, tmp_path: Path) -> None:
    server = kind().start()
    try:
        with server.fresh() as database:
            work = make_work(database, tmp_path / "app")
            env = work.env | {"REDIS_URL": redis_url}
            line = ("--job", "handlers:count", "--max-concurrent-jobs", "2")
            with spawn_scheduler(*line, env=env, cwd=work.folder) as process:
                work.insert(1, 2)
                eventually(lambda: work.states() == {"Done": 2})
                work.engine.dispose()
                server.stop()
                eventually(lambda: process.output.count("database unreachable") == 1)
                server.revive()
                eventually(lambda: "database reachable again" in process.output)
                work.insert(3, 4)
                eventually(lambda: work.states() == {"Done": 4})
                process.terminate()
                assert process.wait(20) == 0
                assert "Traceback" not in process.output
            assert set(work.ran().values()) == {1}
            work.engine.dispose()
    finally:
        server.kill()
