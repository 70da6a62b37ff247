"""PostgreSQL 13 and newer, by psycopg 3."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import (
    ARRAY,
    BIGINT,
    INTEGER,
    SMALLINT,
    TEXT,
    UUID,
    VARCHAR,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    Select,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    Uuid,
    and_,
    any_,
    bindparam,
    cast,
    column,
    create_engine,
    event,
    func,
    literal,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.schema import Index
from sqlalchemy.sql import ColumnElement, Executable

from nih_sched.dialects import listen, quick
from nih_sched.dialects.base import HARD, IDLE, Dialect, End, Opened, Start, is_any_kept, with_option
from nih_sched.dialects.times import After, Now
from nih_sched.dialects.watch import Watch, channel_of
from nih_sched.model import Word

# https://www.postgresql.org/docs/current/errcodes-appendix.html: connection, resources, rollback, lock, operator
TRANSIENT_CLASSES = ("08", "40", "53", "57")
LOCKED = "55P03"
TRANSIENT_CODES = frozenset({LOCKED, "25006", "25P03", "55006"})


# What the address doesn't say itself. A server that vanished without a word is noticed within half a minute.
DEFAULTS: dict[str, Any] = {
    "application_name": "nih-sched",
    "connect_timeout": 10,
    "prepare_threshold": None,  # none behind a pooler; see _is_direct()
    "tcp_user_timeout": 30_000,  # milliseconds
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


BEGINS = "nih_sched_begins"  # an engine's option, where BEGIN is ours: how; "" for no transaction
EACH = f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE}s'"
HARDLY = f"; SET LOCAL lock_timeout = '{HARD}'"
SOON = "; SET LOCAL synchronous_commit = off"  # https://www.postgresql.org/docs/current/wal-async-commit.html
BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED; {EACH}"

# Types whose arrays compare as their elements do.
ARRAYABLE = (Integer, BigInteger, SmallInteger, String, Text, VARCHAR, TEXT, INTEGER, BIGINT, SMALLINT, UUID, Uuid)


NEVER_BY_ITSELF = 1 << 30  # runs of a statement until psycopg prepares it without being asked
STALE_PLAN = "0A000"  # a column that a prepared statement returns has got another type: once more, on a new connection
LARGE, SAMPLE = 300_000, 1000  # rows from which on a table isn't read for a look; pages that are read of it
SIZE = text(
    "SELECT reltuples, pg_relation_size(oid) / CAST(current_setting('block_size') AS integer)"
    " FROM pg_class WHERE oid = to_regclass(:name) AND relkind = 'r'"
)
EACH_MOST = 2000  # records that select_each finds for one text


class PostgreSQL(Dialect):
    """SKIP LOCKED, RETURNING, partial indexes, time in timestamptz."""

    name = "postgresql"
    returns_updates = True
    writes_in_ctes = True
    sorts_quicker = True  # several processes read it together

    def engine(self, url: URL) -> Engine:
        """One connection for a process. It isn't tested before use, in a round trip: who uses it begins anew.

        BEGIN is ours, not the driver's: so it goes in one round trip with what holds for each transaction.
        """
        engine = create_engine(
            url,
            hide_parameters=True,  # rows' values don't belong in logs
            pool_size=1,
            max_overflow=2,
            connect_args={name: value for name, value in DEFAULTS.items() if name not in url.query},
            execution_options={BEGINS: BEGIN},
        )

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, record: Any) -> None:
            connection.autocommit = True
            if "prepare_threshold" not in url.query and _is_direct(connection):
                connection.prepare_threshold = NEVER_BY_ITSELF

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            if begin := connection.get_execution_options()[BEGINS]:
                quick.say(connection, begin)

        return engine

    def transaction(
        self, engine: Engine, *, hardly: bool = False, lasting: bool = True, briefly: bool = False
    ) -> AbstractContextManager[Connection]:
        """On an engine of ours, with all that begin() would say."""
        if (also := _also(hardly=hardly, lasting=lasting)) and BEGINS in engine.get_execution_options():
            engine = with_option(engine, BEGINS, BEGIN + also)
        return engine.begin()

    def plain(self, engine: Engine) -> Engine:
        """Without our BEGIN there is none."""
        if BEGINS in engine.get_execution_options():
            return with_option(engine, BEGINS, "")
        return super().plain(engine)

    def oldest(self, engine: Engine) -> tuple[int, ...]:
        """The oldest that its makers kept alive when we began."""
        return (13,)

    def lock(self, query: Select[Any], table: Table, *, skip_locked: bool = False) -> Select[Any]:
        """FOR NO KEY UPDATE: rows of other tables may go on referring to it meanwhile."""
        return query.with_for_update(of=table, skip_locked=skip_locked, key_share=True)

    def begin(self, connection: Connection, *, hardly: bool = False, lasting: bool = True) -> None:
        """For this transaction alone: behind PgBouncer the session is everybody's."""
        if BEGINS not in connection.get_execution_options():  # on an engine of the user's
            connection.exec_driver_sql(EACH + _also(hardly=hardly, lasting=lasting))

    def wait_briefly(self, connection: Connection) -> None:
        """For this transaction alone."""
        connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")

    @contextlib.contextmanager
    def looking(self, engine: Engine, seconds: float) -> Iterator[Connection]:
        """For this transaction alone."""
        with engine.begin() as connection:
            limit = f"SET LOCAL statement_timeout = {max(1, round(seconds * 1000))}"
            connection.exec_driver_sql(f"SET TRANSACTION READ ONLY; {limit}")
            yield connection

    def part_to_sample(self, connection: Connection, table: Table) -> float | None:
        """By its catalog, https://www.postgresql.org/docs/current/catalog-pg-class.html: reltuples is -1 if unknown."""
        name = self.compiler().identifier_preparer.format_table(table)
        rows, pages = connection.execute(SIZE, {"name": name}).one_or_none() or (0, 0)
        return 100.0 * SAMPLE / pages if rows >= LARGE and pages > SAMPLE else None

    def is_overdue(self, error: DBAPIError) -> bool:
        """https://www.postgresql.org/docs/current/errcodes-appendix.html: query_canceled."""
        return getattr(error.orig, "sqlstate", None) == "57014"

    def is_word(self, column: Column[Any], word: Word) -> ColumnElement[bool]:
        """Citext and nondeterministic collations take other words for equal; ordinary columns don't."""
        plain = super().is_word(column, word)
        if isinstance(column.type, postgresql.CITEXT):
            return and_(plain, cast(column, String) == str(word))
        return plain

    def holds(self, column: Column[Any], value: Any) -> bool:
        """It casts what is compared with a column, and has no NUL."""
        if isinstance(value, int) and isinstance(column.type, Integer):
            bits = {"SMALLINT": 16, "INTEGER": 32}.get(column.type.__visit_name__.upper(), 64)
            return -(1 << bits - 1) <= value < 1 << bits - 1
        return super().holds(column, value) and not (isinstance(value, str) and "\0" in value)

    def among(self, column: Column[Any], values: Sequence[Any]) -> ColumnElement[bool]:
        """One array instead of many parameters: a third of the time for both sides."""
        if type(column.type) in ARRAYABLE:
            return column == any_(bindparam(None, list(values), type_=_Joined(column.type), unique=True))
        return super().among(column, values)

    def given(self, column: Column[Any], name: str) -> ColumnElement[bool]:
        """As among()."""
        if type(column.type) in ARRAYABLE:
            return column == any_(bindparam(name, type_=_Joined(column.type)))
        return super().given(column, name)

    def numbered(self, name: str) -> Any:
        """From an array."""
        texts = func.unnest(bindparam(name, type_=_Joined(Text())))
        return texts.table_valued(column("value", Text()), with_ordinality="number").render_derived("given")

    def adding_up(self, table: Table, rows: Sequence[dict[str, Any]]) -> Executable:
        """ON CONFLICT DO UPDATE."""
        given = insert(table).values(rows)
        added = {"value": table.c.value + given.excluded.value}
        return given.on_conflict_do_update(index_elements=list(table.primary_key), set_=added)

    def open_claims(
        self, connection: Connection, attempts: Table, own: Sequence[Opened], values: dict[str, Any]
    ) -> tuple[dict[str, int], bool]:
        """One statement, from arrays. ON CONFLICT DO NOTHING, so that one taken row doesn't undo the others' claims."""
        given = _its(own) | {f"new_{name}": value for name, value in values.items()}
        opened, _ = quick.run(connection, _opening(attempts, tuple(values)), given)
        return {open_key: claim_id for open_key, claim_id, _ in opened}, bool(opened and opened[0][-1])

    def close_claims(
        self, connection: Connection, attempts: Table, run: str, values: dict[str, Any], ends: Sequence[End]
    ) -> set[int]:
        """One statement, from arrays."""
        given = _its(ends) | {f"new_{name}": value for name, value in values.items()} | {"its_run": run}
        return {row[0] for row in quick.run(connection, _closing(attempts, tuple(values)), given).rows}

    def select_each(
        self,
        facts: Sequence[Any],
        id_: Column[Any],
        text: Column[Any],
        start: Start,
        texts: Sequence[str],
        *,
        only: Sequence[ColumnElement[bool]] = (),
    ) -> Select[Any]:
        """Text by text: where it hasn't analyzed the table, it takes many texts for all there are, and reads it."""
        given = _parts({"text": Text()}, "given")
        each = select(*facts).where(start(text) == start(given.c.text), text == given.c.text, *only)
        its = each.order_by(id_.desc()).limit(EACH_MOST).lateral("each")
        return select(*its.c).select_from(given.join(its, true())).params(its_text=list(texts))

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

    def gave_up(self, error: DBAPIError) -> bool:
        """https://www.postgresql.org/docs/current/errcodes-appendix.html: lock_not_available."""
        return getattr(error.orig, "sqlstate", None) == LOCKED

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
        if code == STALE_PLAN:
            return "cached plan" in str(error.orig)
        return code[:2] in TRANSIENT_CLASSES or code in TRANSIENT_CODES


def _is_direct(connection: Any) -> bool:
    """Whether it is the server itself that answers: a pooler makes up the process id that it tells a client.

    Behind PgBouncer in transaction mode what was prepared is unknown to the next transaction's server.
    https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS
    """
    (pid,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    return bool(pid == connection.info.backend_pid)


def _also(*, hardly: bool, lasting: bool) -> str:
    return (HARDLY if hardly else "") + ("" if lasting else SOON)


class _Joined(TypeDecorator[Any]):
    """An array as text: psycopg would dump each element by itself, at ten times the cost.

    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """

    impl = ARRAY
    cache_ok = True

    def bind_processor(self, dialect: Any) -> Callable[[Any], str]:
        """In place of the array's own."""
        return lambda values: f"{{{_joined(values)}}}"


def _joined(values: Sequence[Any]) -> str:
    kinds = set(map(type, values))
    if kinds == {int}:
        return ",".join(map(str, values))
    if kinds == {float}:  # seconds, to the nanosecond: repr() takes six times as long
        return ",".join([f"{value:.9f}" for value in values])
    if kinds == {str}:
        plain = '","'.join(values)
        if "\\" not in plain and plain.count('"') == 2 * (len(values) - 1):
            return f'"{plain}"'
    return ",".join(map(_element, values))


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    text = str(value)
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _its(records: Sequence[Opened] | Sequence[End]) -> dict[str, Any]:
    return {f"its_{part}": found for part, found in zip(records[0]._fields, zip(*records, strict=True), strict=True)}


def _parts(kinds: dict[str, Any], name: str) -> Any:
    """A table of arrays that are parameters: its_x for column x."""
    arrays = (bindparam(f"its_{part}", type_=_Joined(kind)) for part, kind in kinds.items())
    columns = (column(part, kind) for part, kind in kinds.items())
    return func.unnest(*arrays).table_valued(*columns).render_derived(name)


@functools.lru_cache(maxsize=16)
def _opening(attempts: Table, names: tuple[str, ...]) -> Any:
    each = _parts({name: attempts.c[name].type for name in Opened._fields}, "given")
    same = [bindparam(f"new_{name}", type_=attempts.c[name].type) for name in names]
    now = select(Now().label("now")).subquery("instant")
    chosen = select(*each.c, *same, now.c.now, now.c.now).select_from(each.join(now, true()))
    return (
        insert(attempts)
        .from_select([*Opened._fields, *names, "claimed_at", "sent_at"], chosen)
        .on_conflict_do_nothing(index_elements=[attempts.c.open_key])
        # Looked up here, the claimed rows are locked by now.
        .returning(attempts.c.open_key, attempts.c.id, is_any_kept(attempts).label("any_kept"))
    )


@functools.lru_cache(maxsize=16)
def _closing(attempts: Table, names: tuple[str, ...]) -> Any:
    """Close records that have the ids given, as far as they are open and the run's.

    The fence is a part of the join: by itself it would have the planner expect a single row, and compare each record
    with each end. OFFSET 0 keeps it from seeing through that.
    """
    c = attempts.c
    each = _parts(dict(zip(End._fields, (c.id.type, c.seconds.type, Float(), Text()), strict=True)), "each")
    fence = bindparam("its_run", type_=c.run.type).label("run"), literal(True).label("open")
    given = select(*each.c, *fence).offset(literal_column("0")).subquery("given")
    values: dict[str, Any] = {name: bindparam(f"new_{name}", type_=c[name].type) for name in names}
    return (
        update(attempts)
        .where(c.id == any_(bindparam("its_id", type_=_Joined(c.id.type))), c.id == given.c.id)
        .where(c.run == given.c.run, c.finished_at.is_(None) == given.c.open)
        .values(
            **values,
            seconds=given.c.seconds,
            result=given.c.result,
            started_at=After(-given.c.age - given.c.seconds),
            finished_at=After(-given.c.age),
        )
        .returning(c.id)
    )
