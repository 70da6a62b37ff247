"""The fixtures. Servers start when the first test needs them, and serve the whole run; see servers.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import redis
import servers
from servers import Database

DEVELOPERS = {"DATABASE_URL", "REDIS_URL", "WEB_CONCURRENCY", "PORT", "DYNO"}
DEVELOPERS |= {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
DEVELOPERS_PREFIXES = ("NIH_SCHED_", "XDG_", "PG", "RQ_", "FLASK_")


@pytest.fixture(autouse=True, scope="session")
def _no_developer() -> Iterator[None]:
    """None of the developer's settings, from the first fixture on."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name in DEVELOPERS or name.startswith(DEVELOPERS_PREFIXES):
                patch.delenv(name)
        patch.setenv("HOME", str(servers.folder("h")))
        patch.setenv("XDG_RUNTIME_DIR", str(servers.folder("r")))
        yield


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HOME and a short XDG_RUNTIME_DIR for each test. What its commands left running is its error."""
    path, runtime = servers.folder("h"), servers.folder("r")
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    yield path
    left = servers.strays()
    for folder in (path, runtime):
        shutil.rmtree(folder, ignore_errors=True)
    if left:
        pytest.fail("left running, now killed:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[servers.PostgreSQL]:
    """The run's PostgreSQL; a test that stops it starts it again, or better has its own: servers.PostgreSQL()."""
    server = servers.ReusingPostgreSQL().start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[servers.MariaDB]:
    """The run's MariaDB."""
    server = servers.MariaDB().start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Redis]:
    """The run's Redis."""
    server = servers.Redis().start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_url(redis_server: servers.Redis) -> str:
    """A real Redis, empty when the test begins."""
    return redis_server.url


@pytest.fixture(autouse=True)
def _empty_redis(request: pytest.FixtureRequest) -> None:
    if "redis_server" in request.fixturenames:
        request.getfixturevalue("redis_server").flush()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of redis_url."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def sqlite_db(tmp_path: Path) -> Database:
    """A fresh SQLite file."""
    path = tmp_path / "test.db"
    path.touch()
    return Database("sqlite", f"sqlite:///{path}")


@pytest.fixture
def postgresql_db(postgresql_server: servers.PostgreSQL) -> Iterator[Database]:
    """A fresh PostgreSQL database."""
    with postgresql_server.fresh() as database:
        yield database


@pytest.fixture
def mariadb_db(mariadb_server: servers.MariaDB) -> Iterator[Database]:
    """A fresh MariaDB database."""
    with mariadb_server.fresh() as database:
        yield database


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def database(request: pytest.FixtureRequest) -> Database:
    """A fresh, empty database; the test runs once on each kind."""
    found: Database = request.getfixturevalue(f"{request.param}_db")
    return found


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that names one kind of database itself carries its marker too.

    What runs on each kind is measured once: to measure it thrice takes minutes, and adds nothing. PostgreSQL's own
    lines are measured by the conformance suite.
    """
    for item in items:
        kind = item.callspec.params.get("database") if hasattr(item, "callspec") else None
        if kind == "mariadb" or (kind == "postgresql" and "integration" in item.path.parts):
            item.add_marker("many")
        for kind in ("postgresql", "mariadb"):
            if f"{kind}_server" in getattr(item, "fixturenames", ()):
                item.add_marker(kind)


# What takes minutes on two cores, the longest first: each process of a run begins with some of it, so that none is left
# alone with it at the end.
LONG = (
    "test_quick_bench_measures_everything",
    "no_fence_in_start",
    "test_a_minute_of_all_faults",
    "no_fence_in_finish",
    "no_lease_check",
    "test_a_gigabyte_of_a_commands_output",
    "test_an_operator_at_three_in_the_morning",
    "test_jobs_that_redis_delivers_twice",
)


@pytest.hookimpl(tryfirst=True)  # before xdist tells of them; -m has chosen by then
def pytest_collection_finish(session: pytest.Session) -> None:
    """Put the long ones where xdist's processes begin: it gives each of them as many tests, in their order."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = sorted((item for item in session.items if rank(item) < len(LONG)), key=rank)
    rest = iter([item for item in session.items if item not in long])
    each = len(session.items) // workers
    ordered: list[pytest.Item] = []
    for process in range(workers):
        first = long[process::workers]
        ordered += [*first, *islice(rest, max(0, each - len(first)))]
    session.items[:] = [*ordered, *rest]


def rank(item: pytest.Item) -> int:
    """Its place in LONG; behind all of them where it has none."""
    return next((place for place, words in enumerate(LONG) if words in item.nodeid), len(LONG))


LEFT = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """No process outlives the run; one that would have is a failure."""
    left = servers.finish()
    session.config.stash[LEFT] = left
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left running."""
    if left := config.stash.get(LEFT, []):
        terminalreporter.section("left running at the end, now killed", red=True)
        for words in left:
            terminalreporter.line(words)
