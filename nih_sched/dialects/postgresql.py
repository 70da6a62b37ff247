"""PostgreSQL 13 and newer, by psycopg 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Connection, Engine, Select, String, Table, and_, cast, create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.schema import Index
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import listen
from nih_sched.dialects.base import IDLE, Dialect
from nih_sched.dialects.watch import Watch, channel_of
from nih_sched.model import Word

# https://www.postgresql.org/docs/current/errcodes-appendix.html: connection, resources, rollback, lock, operator
TRANSIENT_CLASSES = ("08", "40", "53", "57")
TRANSIENT_CODES = frozenset({"55P03", "25006", "25P03", "55006"})


# What the address doesn't say itself. A server that vanished without a word is noticed within half a minute.
DEFAULTS: dict[str, Any] = {
    "application_name": "nih-sched",
    "connect_timeout": 10,
    "prepare_threshold": None,  # PgBouncer in transaction mode knows none of ours on the next connection
    "tcp_user_timeout": 30_000,  # milliseconds
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


class PostgreSQL(Dialect):
    """SKIP LOCKED, RETURNING, partial indexes, time in timestamptz."""

    name = "postgresql"

    def engine(self, url: URL) -> Engine:
        """One connection for a process, tested before use because servers restart."""
        return create_engine(
            url,
            hide_parameters=True,  # rows' values don't belong in logs
            isolation_level="READ COMMITTED",
            pool_size=1,
            max_overflow=2,
            pool_pre_ping=True,
            connect_args={name: value for name, value in DEFAULTS.items() if name not in url.query},
        )

    def lock(self, query: Select[Any], table: Table, *, skip_locked: bool = False) -> Select[Any]:
        """FOR NO KEY UPDATE: rows of other tables may go on referring to it meanwhile."""
        return query.with_for_update(of=table, skip_locked=skip_locked, key_share=True)

    def begin(self, connection: Connection) -> None:
        """For this transaction alone: behind PgBouncer the session is everybody's."""
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE}s'")

    def wait_briefly(self, connection: Connection) -> None:
        """For this transaction alone."""
        connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")

    def is_word(self, column: Column[Any], word: Word) -> ColumnElement[bool]:
        """Citext and nondeterministic collations take other words for equal; ordinary columns don't."""
        plain = super().is_word(column, word)
        if isinstance(column.type, postgresql.CITEXT):
            return and_(plain, cast(column, String) == str(word))
        return plain

    def insert_claims(
        self, connection: Connection, attempts: Table, records: Sequence[dict[str, Any]]
    ) -> dict[str, int]:
        """ON CONFLICT DO NOTHING, so that one taken row doesn't undo the others' claims."""
        statement = (
            insert(attempts)
            .on_conflict_do_nothing(index_elements=[attempts.c.open_key])
            .returning(attempts.c.open_key, attempts.c.id)
        )
        return {row.open_key: row.id for row in connection.execute(statement, list(records))}

    def recommended_index(self, table: Table, status: Column[Any], ready: Word, keys: Sequence[Column[Any]]) -> Index:
        """Partial: it holds ready rows only, so it stays small whatever the table grows to."""
        name = f"nih_sched_{table.name}_ready"[:60]
        return Index(name, *keys, postgresql_where=self.is_word(status, ready))

    def notify_ddl(self, table: Table, status: Column[Any], ready: Word, schema: str | None) -> list[str]:
        """Triggers that notify."""
        return listen.create_ddl(self, table, status, ready, schema)

    def unnotify_ddl(self, schema: str | None) -> list[str]:
        """The triggers go with their function."""
        return listen.drop_ddl(self, schema)

    def watch(self, engine: Engine, table: Table, status: Column[Any], ready: Word, schema: str | None) -> Watch:
        """A connection that listens, once there are triggers."""
        return listen.Listen(engine, self, table, channel_of(schema, table, status, ready))

    def compiler(self) -> Any:
        """Psycopg's paramstyle would double percent signs; plain PostgreSQL doesn't."""
        return postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]

    def is_about_a_value(self, error: DBAPIError) -> bool:
        """Dates beyond Python's, such as infinity; what the server refuses has an SQLSTATE."""
        return isinstance(error, DataError) and getattr(error.orig, "sqlstate", None) is None

    def is_refusal(self, error: DBAPIError) -> bool:
        """The server's errors have an SQLSTATE."""
        return getattr(error.orig, "sqlstate", None) is not None

    def code_is_transient(self, error: DBAPIError) -> bool:
        """By SQLSTATE; an operational error without one is a failed connection."""
        code = getattr(error.orig, "sqlstate", None)
        if code is None:
            return super().code_is_transient(error)
        return code[:2] in TRANSIENT_CLASSES or code in TRANSIENT_CODES
