"""PostgreSQL's NOTIFY: the triggers that `scheduler init --notify` makes, and a connection that listens to them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Connection, Engine, Table, and_, bindparam, text, true
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import clock
from nih_sched.dialects.base import Dialect
from nih_sched.dialects.watch import Watch, channel_of
from nih_sched.model import Word

FUNCTION = "nih_sched_notify"
LOOK_AGAIN = 60.0  # seconds between looks whether the triggers are there
PROOF = 5.0  # seconds within which our own notification must come back
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds until a lost connection is made anew

TRIGGERS = text("""
    SELECT count(*) FROM pg_catalog.pg_trigger
    WHERE tgrelid = to_regclass(:relation) AND tgname IN :names AND tgenabled IN ('O', 'A')
""").bindparams(bindparam("names", expanding=True))


def triggers(channel: str) -> tuple[str, str]:
    """The names of the triggers that notify this channel."""
    return channel.replace("nih_sched_", "nih_sched_insert_"), channel.replace("nih_sched_", "nih_sched_update_")


def create_ddl(dialect: Dialect, table: Table, status: Column[Any], ready: Word, schema: str | None) -> list[str]:
    """The function and the triggers; running it again changes nothing.

    Inserts notify once for each statement. Updates do so only where they make a row ready: ours, but for a row that is
    given back, never.
    """
    compiler = dialect.compiler()
    quote = compiler.identifier_preparer
    relation, function = quote.format_table(table), _function(quote, schema)
    channel = channel_of(schema, table, status, ready)
    inserted, updated = triggers(channel)
    new, old = (dialect.is_word(table.alias(name).c[status.key], ready) for name in ("new", "old"))
    becomes_ready = and_(new, old.is_not(true())).compile(dialect=compiler, compile_kwargs={"literal_binds": True})
    call = f"EXECUTE FUNCTION {function}('{channel}')"
    body = "BEGIN PERFORM pg_catalog.pg_notify(TG_ARGV[0], ''); RETURN NULL; END"
    column = quote.format_column(status)
    return [
        f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
        f"DROP TRIGGER IF EXISTS {inserted} ON {relation}",
        f"CREATE TRIGGER {inserted} AFTER INSERT ON {relation} FOR EACH STATEMENT {call}",
        f"DROP TRIGGER IF EXISTS {updated} ON {relation}",
        f"CREATE TRIGGER {updated} AFTER UPDATE OF {column} ON {relation} FOR EACH ROW WHEN ({becomes_ready}) {call}",
    ]


def drop_ddl(dialect: Dialect, schema: str | None) -> list[str]:
    """The end of the function, and with it of every trigger that calls it."""
    return [f"DROP FUNCTION IF EXISTS {_function(dialect.compiler().identifier_preparer, schema)}() CASCADE"]


def _function(quote: Any, schema: str | None) -> str:
    return f"{quote.quote_schema(schema)}.{FUNCTION}" if schema else FUNCTION


class Listen(Watch):
    """Hears a channel. What it hears is live once our own notification, sent on another connection, has come back.

    Behind a pooler in transaction mode it never does, because LISTEN belongs to a session: then we poll.
    """

    def __init__(self, engine: Engine, dialect: Dialect, table: Table, channel: str) -> None:
        self._engine = engine
        self._dialect = dialect
        self._relation = engine.dialect.identifier_preparer.format_table(table)
        self._channel = channel
        self._connection: Connection | None = None
        self._driver: Any = None
        self._next = self._proof_by = 0.0
        self._wait = FIRST_WAIT

    def fileno(self) -> int | None:
        """The connection's socket."""
        return None if self._driver is None else int(self._driver.fileno())

    def tend(self) -> None:
        """Listen, as long as the triggers are there: without them nothing would be told."""
        now = clock.monotonic()
        if self._driver is not None and not self.live and now >= self._proof_by:
            self._wait = LONGEST_WAIT
            self._lose()
        if now < self._next:
            return
        self._next = now + LOOK_AGAIN
        try:
            if self._are_there(triggers(self._channel)):
                self._open()
            else:
                self.close()
        except (SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error):
            self._lose()

    def rung(self) -> bool:
        """Whether a notification has come, or the connection is lost."""
        if self._driver is None:
            return False
        heard = False
        try:
            self._driver.pgconn.consume_input()
            while self._driver.pgconn.notifies() is not None:
                heard = True
        except self._engine.dialect.loaded_dbapi.Error:
            self._lose()
            return True
        if heard:
            self.live, self._wait = True, FIRST_WAIT
        return heard

    def close(self) -> None:
        """Hang up."""
        connection, self._connection, self._driver, self.live = self._connection, None, None, False
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error):
                connection.close()

    def _open(self) -> None:
        if self._connection is not None:
            return
        connection = self._dialect.plain(self._engine).connect()
        self._connection, driver = connection, connection.connection.driver_connection
        connection.detach()  # ours alone: it takes no place in the pool, and isn't closed with it
        connection.exec_driver_sql(f"LISTEN {self._channel}")
        self._driver = driver
        self._proof_by = clock.monotonic() + PROOF
        with self._dialect.reading(self._engine) as other:
            other.exec_driver_sql(f"NOTIFY {self._channel}")

    def _lose(self) -> None:
        self.close()
        self._next = clock.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _are_there(self, names: Sequence[str]) -> bool:
        with self._dialect.reading(self._engine) as connection:
            found = connection.execute(TRIGGERS, {"relation": self._relation, "names": list(names)}).scalar_one()
        return int(found) == len(names)
