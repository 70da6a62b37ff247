"""MariaDB 10.6, MySQL 8.0 and newer, by PyMySQL."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Enum,
    String,
    Table,
    and_,
    create_engine,
    func,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import Index
from sqlalchemy.sql import ColumnElement, Executable
from sqlalchemy.sql.expression import literal, literal_column

from nih_sched.dialects.base import IDLE, Dialect, End, Opened, on_living
from nih_sched.model import Word

T = TypeVar("T")

# https://mariadb.com/kb/en/mariadb-error-codes/
TRANSIENT_CODES = frozenset(
    {
        *(3, 1021, 1026, 1030, 1114, 1135),  # disk or memory full
        *(1040, 1203, 1226),  # too many connections
        *(1053, 1077, 1158, 1159, 1160, 1161, 1927, 2002, 2003, 2006, 2013, 2055, 4031),  # shutdown, lost connections
        *(1020, 1180, 1205, 1213, 1317, 1969),  # record changed, failed commit, lock wait, deadlock, query killed
        *(1047, 1290, 1792, 1836),  # Galera not ready, read-only
    }
)


# MariaDB has a limit for frozen clients' transactions; MySQL reads over it.
# What each record gets of its own, as a table.
GIVEN = """JSON_TABLE(:given, '$[*]' COLUMNS (id BIGINT PATH '$[0]', seconds DOUBLE PATH '$[1]',
 age DECIMAL(20, 6) PATH '$[2]', result MEDIUMTEXT PATH '$[3]')) AS given"""
OPENED = """JSON_TABLE(:given, '$[*]' COLUMNS (row_key MEDIUMTEXT PATH '$[0]', open_key VARCHAR(40) PATH '$[1]',
 rq_id VARCHAR(64) PATH '$[2]')) AS given"""
BINARY = "COLLATE utf8mb4_bin"  # as our own columns compare
INIT = f"SET @nih_sched = 1 /*M!100300 , @@SESSION.idle_transaction_timeout = {IDLE} */"


class MySQL(Dialect):
    """No RETURNING for updates, case-insensitive words by default, DATETIME(6) in UTC."""

    name = "mysql"

    def engine(self, url: URL) -> Engine:
        """READ COMMITTED, because the default's gap locks would block other people's INSERTs."""
        return create_engine(
            url.update_query_dict({"charset": url.query.get("charset", "utf8mb4")}),
            hide_parameters=True,  # rows' values don't belong in logs
            isolation_level="READ COMMITTED",
            pool_size=1,
            max_overflow=2,
            pool_reset_on_return=None,  # whoever gives one back has ended its transaction: a round trip less for each
            pool_recycle=3600,  # servers close idle connections after wait_timeout
            connect_args={"connect_timeout": 10, "init_command": INIT} | _tls(url),
        )

    @contextlib.contextmanager
    def reading(self, engine: Engine) -> Iterator[Connection]:
        """In a transaction that is over at once: to have none, and then have them again, takes four round trips."""
        with self.minding_the_pool(engine), engine.begin() as connection:
            yield connection

    def write_at_once(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        """Without one all the same: MySQL would let one that is frozen have its locks for ever."""
        return on_living(lambda: Dialect.reading(self, engine), work)

    @contextlib.contextmanager
    def looking(self, engine: Engine, seconds: float) -> Iterator[Connection]:
        """MariaDB counts in seconds, MySQL in milliseconds; both for the session, which gets back what it had."""
        with engine.connect() as connection:
            name, unit = ("max_statement_time", 1) if engine.dialect.is_mariadb else ("max_execution_time", 1000)  # type: ignore[attr-defined]
            limit = f"{seconds * unit:.3f}" if unit == 1 else f"{max(1, round(seconds * unit))}"
            connection.exec_driver_sql(f"SET SESSION {name} = {limit}")
            connection.exec_driver_sql("START TRANSACTION READ ONLY")
            try:
                yield connection
            finally:
                connection.rollback()
                connection.exec_driver_sql(f"SET SESSION {name} = DEFAULT")

    def is_overdue(self, error: DBAPIError) -> bool:
        """Of MariaDB and of MySQL."""
        return _code(error) in (1969, 3024)

    def wait_briefly(self, connection: Connection) -> None:
        """For the session, as there is nothing shorter; who retries anyway doesn't mind."""
        connection.exec_driver_sql("SET SESSION lock_wait_timeout = 2, innodb_lock_wait_timeout = 2")

    def lock(self, query: Any, table: Table, *, skip_locked: bool = False) -> Any:
        """MariaDB knows no OF."""
        return query.with_for_update(skip_locked=skip_locked)

    def is_word(self, column: Column[Any], word: Word) -> ColumnElement[bool]:
        """The default collations take `pending` for `Pending`: compare bytes too, after the index has done its part."""
        plain = super().is_word(column, word)
        if isinstance(column.type, String) and not isinstance(column.type, Enum):
            found = func.hex(func.convert(column.op("USING")(literal_column("utf8mb4"))))
            return and_(plain, found == literal(str(word).encode().hex().upper(), literal_execute=True))
        return plain

    def adding_up(self, table: Table, rows: Sequence[dict[str, Any]]) -> Executable:
        """ON DUPLICATE KEY UPDATE."""
        given = mysql.insert(table).values(rows)
        return given.on_duplicate_key_update(value=table.c.value + given.inserted.value)

    def insert_claims(
        self, connection: Connection, attempts: Table, own: Sequence[Opened], values: dict[str, Any]
    ) -> dict[str, int]:
        """Nobody else can be inserting the same ones, because the claimed rows are locked; so a look before is enough.

        MySQL can't tell what an INSERT has inserted: it is looked for. All of them travel as one text: PyMySQL would
        write each value into the statement by itself.
        """
        preparer = connection.dialect.identifier_preparer
        table, names = preparer.format_table(attempts), [*Opened._fields, *values]
        found = [*(f"given.{name}" for name in Opened._fields), *(f":{name}" for name in values)]
        insert = text(
            f"INSERT INTO {table} ({', '.join(map(preparer.quote, names))})"  # noqa: S608 - our names
            f" SELECT {', '.join(found)} FROM {OPENED}"
            f" WHERE NOT EXISTS (SELECT 1 FROM {table} AS taken WHERE taken.open_key = given.open_key {BINARY})"
        )
        given = {"given": json.dumps(own)}
        if connection.dialect.is_mariadb:  # type: ignore[attr-defined]
            returning = text(f"{insert.text} RETURNING open_key, id")
            return dict(map(tuple, connection.execute(returning, values | given).all()))
        connection.execute(insert, values | given)
        query = text(
            f"SELECT kept.open_key, kept.id FROM {OPENED} JOIN {table} AS kept"  # noqa: S608 - our names
            f" ON kept.open_key = given.open_key {BINARY} WHERE kept.rq_id = given.rq_id {BINARY}"
        )
        return dict(map(tuple, connection.execute(query, given).all()))

    def write_ends(self, connection: Connection, attempts: Table, values: dict[str, Any], ends: Sequence[End]) -> None:
        """One statement: PyMySQL would send one for each record."""
        preparer = connection.dialect.identifier_preparer
        sets = {preparer.quote(name): f":{name}" for name in values if values[name] is not None}
        sets |= {preparer.quote(name): "NULL" for name in values if values[name] is None}
        sets |= {"seconds": "given.seconds", "result": "given.result"}
        sets |= {"started_at": "utc_timestamp(6) - INTERVAL given.age + cast(given.seconds AS decimal(20, 6)) SECOND"}
        sets |= {"finished_at": "utc_timestamp(6) - INTERVAL given.age SECOND"}
        statement = text(
            f"UPDATE {preparer.format_table(attempts)} AS kept JOIN {GIVEN} ON kept.id = given.id"  # noqa: S608 - our names
            f" SET {', '.join(f'kept.{name} = {value}' for name, value in sets.items())}"
        )
        own = [[end.id, end.seconds, f"{end.age:.6f}", end.result] for end in ends]
        told = {name: value for name, value in values.items() if value is not None}
        connection.execute(statement, {**told, "given": json.dumps(own)})

    def recommended_index(self, table: Table, status: Column[Any], ready: Word, keys: Sequence[Column[Any]]) -> Index:
        """InnoDB knows no partial indexes; it appends the primary key by itself, saying so keeps the order clear."""
        return Index(f"nih_sched_{table.name}_ready"[:60], status, *keys)

    def compiler(self) -> Any:
        """For showing SQL."""
        return mysql.dialect(paramstyle="named")

    def oldest(self, engine: Engine) -> tuple[int, ...]:
        """The first with SKIP LOCKED."""
        return (10, 6) if getattr(engine.dialect, "is_mariadb", False) else (8, 0)

    def is_refusal(self, error: DBAPIError) -> bool:
        """The server's errors have numbers outside of the client's range, 2000 to 2999."""
        code = _code(error)
        return isinstance(code, int) and code != 0 and not 2000 <= code < 3000

    def code_is_transient(self, error: DBAPIError) -> bool:
        """By the server's error number."""
        code = _code(error)
        return code in TRANSIENT_CODES or code == 0


def _tls(url: URL) -> dict[str, Any]:
    # PyMySQL reads all of the system's CA certificates for each connection (22 ms of CPU), even where it then checks
    # none of them: without need on this very machine.
    asked = any(name.startswith("ssl") for name in url.query)
    local = url.host in (None, "localhost", "127.0.0.1", "::1") or "unix_socket" in url.query
    return {"ssl_disabled": True} if local and not asked and url.get_driver_name() == "pymysql" else {}


def _code(error: DBAPIError) -> Any:
    return error.orig.args[0] if error.orig is not None and error.orig.args else None
