"""get_jobs and its async twin: just the rows and columns that are asked for, streamed, nothing changed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Database, run
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import nih_sched
from nih_sched import get_jobs, get_jobs_async
from nih_sched.errors import NoSuchColumn, NoSuchTable

ROWS = [(5, "Pending", "e"), (1, "Pending", "a"), (2, "Done", "b"), (3, "pending", "c"), (4, "Pending ", "d")]


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    """The user's own engine, not one of ours, on a table with words that only look alike."""
    engine = create_engine(database.url)
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(20), code integer)")
        )
        insert = text("INSERT INTO jobs VALUES (:id, :state, :name, :code)")
        connection.execute(insert, [{"id": i, "state": s, "name": n, "code": i % 2} for i, s, n in ROWS])
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture
def statements(engine: Engine) -> list[str]:
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(" ".join(statement.split()))

    return seen


def test_rows_of_exactly_that_word_come_by_key(session: Session) -> None:
    found = list(get_jobs(session, "state", "Pending"))
    assert [dict(row) for row in found] == [
        {"id": 1, "state": "Pending", "name": "a", "code": 1},
        {"id": 5, "state": "Pending", "name": "e", "code": 1},
    ]
    assert list(get_jobs(session, "state", "Queued")) == []


def test_a_word_may_be_a_number(session: Session) -> None:
    assert [row["id"] for row in get_jobs(session, "code", 0)] == [2, 4]
    assert [row["id"] for row in get_jobs(session, "code", "1", ["id"])] == [1, 3, 5]


def test_only_the_columns_asked_for_are_selected_and_the_query_does_the_filtering(
    session: Session, statements: list[str]
) -> None:
    assert [dict(row) for row in get_jobs(session, "state", "Done", ["name", "id"])] == [{"name": "b", "id": 2}]
    mine = [s for s in statements if "FROM jobs" in s and "WHERE" in s]
    assert len(mine) == 1
    assert mine[0].startswith("SELECT jobs.name, jobs.id FROM jobs WHERE jobs.state = 'Done'")
    assert not any(s.split()[0] in ("INSERT", "UPDATE", "DELETE", "CREATE") for s in statements)


def test_it_sees_the_sessions_own_changes_and_ends_none_of_them(session: Session) -> None:
    session.execute(text("UPDATE jobs SET state = 'Pending' WHERE id = 2"))
    assert [row["id"] for row in get_jobs(session, "state", "Pending")] == [1, 2, 5]
    assert session.in_transaction()
    session.rollback()
    assert [row["id"] for row in get_jobs(session, "state", "Pending")] == [1, 5]


def test_rows_are_read_only_as_far_as_they_are_asked_for(session: Session) -> None:
    rows = get_jobs(session, "state", "Pending", batch_size=1)
    assert next(rows)["id"] == 1
    rows.close()  # type: ignore[attr-defined]
    assert session.execute(text("SELECT count(*) FROM jobs")).scalar_one() == len(ROWS)


def test_the_sessions_later_statements_are_as_before(session: Session) -> None:
    list(get_jobs(session, "state", "Pending", batch_size=1))
    assert not {"yield_per", "stream_results"} & set(session.connection().get_execution_options())


def test_nothing_is_read_before_the_first_row_is_asked_for(session: Session) -> None:
    get_jobs(session, "nothing", "Pending", table="nowhere")


def test_wrong_names_are_told_with_the_right_ones(session: Session) -> None:
    with pytest.raises(NoSuchTable, match=r"There is no table nowhere in the database\. It has: jobs\."):
        next(get_jobs(session, "state", "Pending", table="nowhere"))
    with pytest.raises(
        NoSuchColumn, match=r"no column 'status' \(argument status_key\)\. It has: id, state, name, code"
    ):
        next(get_jobs(session, "status", "Pending"))
    with pytest.raises(NoSuchColumn, match=r"no column 'title' \(argument columns\)"):
        next(get_jobs(session, "state", "Pending", ["id", "title"]))


def test_both_are_the_packages_own() -> None:
    assert nih_sched.get_jobs is get_jobs
    assert nih_sched.get_jobs_async is get_jobs_async


# The async twin


def asynchronously(url: str, work: Callable[[AsyncSession], Any]) -> Any:
    async def main() -> Any:
        engine = create_async_engine(url)
        try:
            async with AsyncSession(engine) as session:
                return await work(session)
        finally:
            await engine.dispose()

    return asyncio.run(main())


def async_url(engine: Engine) -> str:
    url = engine.url.render_as_string(hide_password=False)
    if engine.dialect.name == "sqlite":
        return url.replace("sqlite:", "sqlite+aiosqlite:")
    if engine.dialect.name == "postgresql":
        return url  # psycopg is both
    raise NotImplementedError("no asynchronous driver for MariaDB is among our extras")


with_async_driver = pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)


@with_async_driver
def test_the_async_twin_gives_the_same(engine: Engine) -> None:
    async def work(session: AsyncSession) -> list[Any]:
        rows = [dict(row) async for row in get_jobs_async(session, "state", "Pending", ["id", "name"], 1)]
        options = (await session.connection()).sync_connection.get_execution_options()  # type: ignore[union-attr]
        assert not {"yield_per", "stream_results"} & set(options)
        return rows

    assert asynchronously(async_url(engine), work) == [{"id": 1, "name": "a"}, {"id": 5, "name": "e"}]


@with_async_driver
def test_the_async_twin_tells_wrong_names_too(engine: Engine) -> None:
    async def work(session: AsyncSession) -> None:
        with pytest.raises(NoSuchTable, match="There is no table nowhere"):
            [row async for row in get_jobs_async(session, "state", "Pending", table="nowhere")]
        with pytest.raises(NoSuchColumn, match="has no column 'status'"):
            [row async for row in get_jobs_async(session, "status", "Pending")]

    asynchronously(async_url(engine), work)


# Memory

MEASURE = """
import asyncio, psutil, sys
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from nih_sched import get_jobs, get_jobs_async

form, url, expected = sys.argv[1], sys.argv[2], int(sys.argv[3])

peak = 0.0

def note():  # not ru_maxrss: a child begins with its parent's
    global peak
    peak = max(peak, psutil.Process().memory_info().rss / 2**20)

def plain(batch, limit):
    count = 0
    with Session(create_engine(url)) as session:
        for row in get_jobs(session, "state", "Pending", ["id", "payload"], batch):
            count += 1
            if count % 20000 == 0:
                note()
            if count == limit:
                break
    return count

async def twin(batch, limit):
    count = 0
    engine = create_async_engine(url)
    async with AsyncSession(engine) as session:
        async for row in get_jobs_async(session, "state", "Pending", ["id", "payload"], batch):
            count += 1
            if count % 20000 == 0:
                note()
            if count == limit:
                break
    await engine.dispose()
    return count

def read(limit):
    return plain(100, limit) if form == "plain" else asyncio.run(twin(1000, limit))

read(2000)  # what is loaded once isn't what we measure
note()
before = peak
assert read(expected) == expected
print(peak - before)
"""


def growth(form: str, url: str, expected: int) -> float:
    """By how many megabytes a fresh process grows while it reads that many rows."""
    done = run([sys.executable, "-c", MEASURE, form, url, str(expected)], timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def fill(url: str, count: int) -> None:
    engine = create_engine(url)
    words = "CASE WHEN n % 10 = 0 THEN 'Done' ELSE 'Pending' END"
    payload = "'payload of a hundred characters, more or less, so that what is kept would soon be seen: ' || n"
    series = "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < :count) SELECT n"
    mariadb = engine.dialect.name not in ("sqlite", "postgresql")
    if mariadb:
        payload = f"concat({payload.replace('||', ',')})"
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), payload varchar(200))"))
        if mariadb:
            connection.execute(text("SET max_recursive_iterations = 10000000"))
        connection.execute(text(f"INSERT INTO jobs {series}, {words}, {payload} FROM s"), {"count": count})
    engine.dispose()


@pytest.mark.many
def test_memory_stays_flat_over_a_million_rows(sqlite_db: Database) -> None:
    fill(sqlite_db.url, 1_111_112)
    assert growth("plain", sqlite_db.url, 1_000_000) < 30
    assert growth("twin", sqlite_db.url.replace("sqlite:", "sqlite+aiosqlite:"), 200_000) < 20


@pytest.mark.many
@pytest.mark.postgresql
def test_memory_stays_flat_on_postgresql(postgresql_db: Database) -> None:
    fill(postgresql_db.url, 222_223)
    assert growth("plain", postgresql_db.url, 200_000) < 20
    assert growth("twin", postgresql_db.url, 200_000) < 20


@pytest.mark.many
@pytest.mark.mariadb
def test_memory_stays_flat_on_mariadb(mariadb_db: Database) -> None:
    fill(mariadb_db.url, 222_223)
    assert growth("plain", mariadb_db.url, 200_000) < 20
