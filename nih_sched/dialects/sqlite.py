"""SQLite 3.35 and newer."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    LargeBinary,
    Select,
    String,
    Table,
    and_,
    case,
    cast,
    collate,
    create_engine,
    event,
    func,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import QueuePool, StaticPool
from sqlalchemy.schema import Index
from sqlalchemy.sql import ColumnElement, Executable
from sqlalchemy.sql.expression import literal
from sqlalchemy.types import NullType

from nih_sched import clock
from nih_sched.dialects.base import Dialect, Opened, with_option
from nih_sched.dialects.data_version import DataVersion
from nih_sched.dialects.watch import Watch
from nih_sched.model import Word

BUSY_SECONDS, BRIEF_SECONDS = 30.0, 2.0  # for another writer; and where nobody may wait for long
PATIENCE = "nih_sched_patience"  # an engine's option: seconds for which its transactions wait to begin
STEP, LONG_STEP = 0.0005, 0.005  # seconds between tries to be the next writer, at first and later
SOON = 0.05  # seconds that most writers need at most
AGAIN = 0.01  # seconds between interruptions of what takes too long

T = TypeVar("T")


class SQLite(Dialect):
    """One writer at a time: BEGIN IMMEDIATE takes the write lock first, so no row needs a lock of its own."""

    name = "sqlite"
    returns_updates = True  # and whoever has begun to write has the whole file

    def engine(self, url: URL) -> Engine:
        """Transactions that begin at BEGIN, wait for the writer before them, and survive a crash of ours."""
        memory = url.database in (None, "", ":memory:")
        engine = create_engine(
            url,
            hide_parameters=True,  # rows' values don't belong in logs
            poolclass=StaticPool if memory else QueuePool,
            connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        )

        engine.dialect.ischema_names = _Types(engine.dialect.ischema_names)  # type: ignore[attr-defined]

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, record: Any) -> None:
            connection.isolation_level = None  # the driver's own BEGIN would be a deferred one, and late
            cursor = connection.cursor()
            cursor.execute("PRAGMA synchronous = NORMAL")
            cursor.close()

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
                return
            driver: Any = connection.connection.driver_connection
            driver.execute("PRAGMA busy_timeout = 0")
            try:
                if not _begin_soon(driver, connection.get_execution_options().get(PATIENCE, BUSY_SECONDS)):
                    connection.exec_driver_sql("BEGIN IMMEDIATE")  # it says what is wrong
            finally:
                driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")

        return engine

    def transaction(
        self, engine: Engine, *, hardly: bool = False, lasting: bool = True, briefly: bool = False
    ) -> AbstractContextManager[Connection]:
        """Waiting is over when it has begun, so this is where it must be brief."""
        return (with_option(engine, PATIENCE, BRIEF_SECONDS) if briefly else engine).begin()

    def write_at_once(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        """In a transaction, which waits for the writer before it in smaller steps than a statement by itself would."""
        with engine.begin() as connection:
            return work(connection)

    def prepare(self, engine: Engine) -> None:
        """Write-ahead log, so that readers and the writer don't wait for each other; stays set in the file.

        Where it can't be had, on some network disks, the rollback journal does: slower, and as safe.
        """
        with self.reading(engine) as connection:
            if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "delete":
                return
            for turn in range(5):
                try:
                    connection.exec_driver_sql("PRAGMA journal_mode = WAL")
                except OperationalError:
                    time.sleep(0.05 * 2**turn)  # somebody reads at this moment, and SQLite doesn't wait for that
                else:
                    return

    def oldest(self, engine: Engine) -> tuple[int, ...]:
        """The first with RETURNING."""
        return (3, 35)

    def journal_mode(self, engine: Engine) -> str | None:
        """As the file has it."""
        with self.reading(engine) as connection:
            return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())

    @contextlib.contextmanager
    def looking(self, engine: Engine, seconds: float) -> Iterator[Connection]:
        """No write lock is taken. A database in memory has this one connection, which is set right afterwards.

        A thread ends what takes too long: to be asked every so many steps would cost the statement more than that.
        """
        with self.reading(engine) as connection:
            driver: Any = connection.connection.driver_connection
            over = threading.Event()
            clock = threading.Thread(target=_interrupt, args=(driver, over, seconds), daemon=True)
            connection.exec_driver_sql("PRAGMA query_only = ON")
            clock.start()
            try:
                yield connection
            finally:
                over.set()
                clock.join()
                connection.exec_driver_sql("PRAGMA query_only = OFF")

    @contextlib.contextmanager
    def lenient(self, connection: Connection) -> Iterator[None]:
        """SQLite stores whatever bytes it is given as a text; Python's driver refuses to read what isn't UTF-8."""
        driver: Any = connection.connection.driver_connection
        driver.text_factory = partial(str, encoding="utf-8", errors="replace")
        try:
            yield
        finally:
            driver.text_factory = str

    def is_overdue(self, error: DBAPIError) -> bool:
        """SQLITE_INTERRUPT."""
        return getattr(error.orig, "sqlite_errorcode", None) == 9

    def lock(self, query: Select[Any], table: Table, *, skip_locked: bool = False) -> Select[Any]:
        """The write lock is held already."""
        return query

    def is_word(self, column: Column[Any], word: Word) -> ColumnElement[bool]:
        """A NOCASE column takes `pending` for `Pending`: compare bytes too, after the index has done its part."""
        plain = super().is_word(column, word)
        if isinstance(column.type, String | NullType):
            return and_(plain, collate(column, "BINARY") == literal(word, literal_execute=True))
        return plain

    def holds(self, column: Column[Any], value: Any) -> bool:
        """Whatever its type is called, an integer has 64 bits."""
        return super().holds(column, value) and not (isinstance(value, int) and value >= 1 << 63)

    def adding_up(self, table: Table, rows: Sequence[dict[str, Any]]) -> Executable:
        """ON CONFLICT DO UPDATE."""
        given = insert(table).values(rows)
        added = {"value": table.c.value + given.excluded.value}
        return given.on_conflict_do_update(index_elements=list(table.primary_key), set_=added)

    def insert_claims(
        self, connection: Connection, attempts: Table, own: Sequence[Opened], values: dict[str, Any]
    ) -> dict[str, int]:
        """ON CONFLICT DO NOTHING, so that one taken row doesn't undo the others' claims."""
        statement = (
            insert(attempts)
            .on_conflict_do_nothing(index_elements=[attempts.c.open_key])
            .returning(attempts.c.open_key, attempts.c.id)
        )
        return {row.open_key: row.id for row in connection.execute(statement, [one._asdict() | values for one in own])}

    def recommended_index(self, table: Table, status: Column[Any], ready: Word, keys: Sequence[Column[Any]]) -> Index:
        """Partial: it holds ready rows only, so it stays small whatever the table grows to."""
        plain = super().is_word(status, ready)
        return Index(f"nih_sched_{table.name}_ready"[:60], *keys, sqlite_where=plain)

    def watch(self, engine: Engine, table: Table, status: Column[Any], ready: Word, schema: str | None) -> Watch:
        """The file's data_version; a database in memory has one connection, and nobody else writes to it."""
        return Watch() if isinstance(engine.pool, StaticPool) else DataVersion(engine)

    def compiler(self) -> Any:
        """For showing SQL."""
        return sqlite.dialect(paramstyle="named")

    def plan(self, connection: Connection, sql: str) -> str:
        """EXPLAIN alone would list byte code."""
        rows = connection.exec_driver_sql("EXPLAIN QUERY PLAN " + sql).all()
        return "\n".join(str(row[3]) for row in rows)

    def is_about_a_value(self, error: DBAPIError) -> bool:
        """Text that isn't UTF-8; what SQLite itself refuses has a code."""
        return getattr(error.orig, "sqlite_errorcode", None) is None

    def raw_text(self, column: Column[Any]) -> ColumnElement[bytes] | None:
        """It takes any bytes for a text."""
        return case((func.typeof(column) == "text", cast(column, LargeBinary)))

    def is_refusal(self, error: DBAPIError) -> bool:
        """What SQLite itself says has a code; only a file that isn't its own any more looks like a locked one."""
        return getattr(error.orig, "sqlite_errorcode", None) is not None

    def code_is_transient(self, error: DBAPIError) -> bool:
        """Busy, locked, full and I/O errors pass; a missing table doesn't.

        https://www.sqlite.org/rescode.html: SQLITE_BUSY 5, LOCKED 6, IOERR 10, FULL 13, CANTOPEN 14, PROTOCOL 15
        """
        code = getattr(error.orig, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in {5, 6, 10, 13, 14, 15}


def _begin_soon(driver: Any, patience: float) -> bool:
    """Begin to write as soon as the writers before us have ended; False when that can't be had.

    SQLite itself tries again after 1, 2, 5, 10, 15, 20, 25, 50 and then each 100 ms, while most of our transactions
    take one or two: who has waited for long would get the lock last of all, and among them are leases to be renewed.
    """
    began = clock.monotonic()
    while True:
        try:
            driver.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            waited = clock.monotonic() - began
            code = getattr(error, "sqlite_errorcode", None) or 0  # the driver's own errors have none
            if code & 0xFF != sqlite3.SQLITE_BUSY or waited >= patience:
                return False
            time.sleep(STEP if waited < SOON else LONG_STEP)
        else:
            return True


def _interrupt(driver: Any, over: threading.Event, seconds: float) -> None:
    # Again and again: between two statements nothing is there to be ended.
    while not over.wait(seconds):
        driver.interrupt()
        seconds = AGAIN


class _Types(dict[str, Any]):
    """SQLAlchemy takes a type that it doesn't know, such as STRING or UUID, for a number; to SQLite it is any type."""

    def __contains__(self, name: object) -> bool:
        by_affinity = ("INT", "CHAR", "CLOB", "TEXT", "BLOB", "REAL", "FLOA", "DOUB")
        return super().__contains__(name) or not any(part in str(name) for part in by_affinity)

    def __missing__(self, name: str) -> type[NullType]:
        return NullType
