"""The making of our tables, their version, and their upgrade while schedulers run."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from sqlalchemy import Column, Connection, Engine, Inspector, Table, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchTableError, SQLAlchemyError
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable, Index

from nih_sched.dialects import address, dialect_of
from nih_sched.dialects.base import reason
from nih_sched.errors import BadLedger, DatabaseRefused, NewerLedger, OlderLedger
from nih_sched.ledger.shape import Ledger

SCHEMA_VERSION = 3  # grows by one whenever tables or columns are added; nothing is ever taken away
TURNS = 10  # tries to make or upgrade our tables, beside others who do the same


def ensure(engine: Engine, ledger: Ledger) -> bool:
    """Make what is missing of our tables; safe when several do so at once, and while older schedulers run.

    Returns:
        whether anything was missing.

    Raises:
        NewerLedger: a newer nih-sched made them. DatabaseRefused: we may not create or alter tables.
    """
    missing = not exists(engine, ledger)
    if missing:
        dialect_of(engine).prepare(engine)
        _again(engine, "to create our tables nih_sched_*", lambda: ledger.metadata.create_all(engine))
    unnamed = _identity_missing(engine, ledger)
    if not unnamed and version(engine, ledger) >= SCHEMA_VERSION:
        return False
    # What has no version yet may have been left half made by an older one of us.
    _again(engine, "to upgrade our tables nih_sched_*", lambda: _run(engine, _shape_ddl(engine, ledger)))
    if unnamed:
        _again(engine, "to name our tables nih_sched_*", lambda: _fill_identity(engine, ledger))
    if version(engine, ledger) < SCHEMA_VERSION:
        what = "to upgrade our tables nih_sched_*"
        _again(engine, what, lambda: _run(engine, [_version_ddl(engine, ledger)]))
    return True


def exists(engine: Engine, ledger: Ledger, of: Table | None = None) -> bool:
    """Whether all our tables are there, or one of them."""
    wanted = ledger.metadata.sorted_tables if of is None else [of]
    return {table.name for table in wanted} <= _there(inspect(engine), ledger)


def _there(inspector: Inspector, ledger: Ledger) -> set[str]:
    schema = ledger.metadata.schema
    try:
        return set(inspector.get_table_names(schema=schema))
    except DBAPIError as error:
        if schema is None or dialect_of(inspector.engine).is_transient(error):
            raise
        return set()  # there is no such schema


def version(engine: Engine, ledger: Ledger) -> int:
    """The schema version of our tables.

    Raises:
        NewerLedger: it is newer than what can run beside us. The next one can: versions only add.
    """
    return _version(engine, {"schema_version": identity(engine, ledger, "schema_version")})


def _version(engine: Engine, named: Mapping[str, str]) -> int:
    found = int(_named(engine, named, "schema_version"))
    if found > SCHEMA_VERSION + 1:
        raise NewerLedger(address=address(engine.url), found=found, known=SCHEMA_VERSION)
    return found


def check_made(engine: Engine, ledger: Ledger) -> bool:
    """Whether our tables are there, for those who only look.

    Raises:
        NewerLedger; OlderLedger: an older nih-sched made them, and nobody has upgraded them yet.
    """
    with dialect_of(engine).reading(engine) as connection:
        return look_up(connection, inspect(connection), ledger) is not None


def look_up(connection: Connection, inspector: Inspector, ledger: Ledger) -> str | None:
    """The ledger's id, where our tables are as they should be; None where they aren't there.

    Raises:
        NewerLedger, OlderLedger: as of check_made(). BadLedger: it has no id.
    """
    there, engine = _there(inspector, ledger), connection.engine
    if ledger.attempts.name not in there:
        return None
    if not {table.name for table in ledger.metadata.sorted_tables} <= there:
        raise OlderLedger(address=address(engine.url), known=SCHEMA_VERSION)
    named = _read(connection, ledger)
    if _version(engine, named) < SCHEMA_VERSION:
        raise OlderLedger(address=address(engine.url), known=SCHEMA_VERSION)
    return _named(engine, named, "ledger_id")


def ddl(engine: Engine, ledger: Ledger) -> list[str]:
    """The statements that make our tables or bring older ones up to date, the version last."""
    named = _names(engine, ledger) if exists(engine, ledger, of=ledger.meta) else set[str]()
    if not set(_identity()) <= named:
        return _shape_ddl(engine, ledger) + _identity_ddl(engine, ledger, named)
    last = [_version_ddl(engine, ledger)] if version(engine, ledger) < SCHEMA_VERSION else []
    return _shape_ddl(engine, ledger) + last


def _identity_ddl(engine: Engine, ledger: Ledger, but: Collection[str] = ()) -> list[str]:
    return [
        str(insert(ledger.meta).values(name=name, value=value).compile(engine, compile_kwargs={"literal_binds": True}))
        for name, value in _identity().items()
        if name not in but
    ]


def _version_ddl(engine: Engine, ledger: Ledger) -> str:
    value = update(ledger.meta).where(ledger.meta.c.name == "schema_version").values(value=str(SCHEMA_VERSION))
    return str(value.compile(engine, compile_kwargs={"literal_binds": True}))


def _shape_ddl(engine: Engine, ledger: Ledger) -> list[str]:
    inspector = inspect(engine)
    schema, statements = ledger.metadata.schema, []
    for table in ledger.metadata.sorted_tables:
        if not inspector.has_table(table.name, schema=schema):
            statements.append(str(CreateTable(table).compile(engine)).strip())
            columns, indexes = set(table.columns.keys()), set()
        else:
            columns = {column["name"] for column in inspector.get_columns(table.name, schema=schema)}
            indexes = {index["name"] for index in inspector.get_indexes(table.name, schema=schema)}
        statements += [_add(engine, column) for column in table.columns if column.name not in columns]
        statements += [_index(engine, index) for index in table.indexes if index.name not in indexes]
    return statements


def _add(engine: Engine, column: Column[object]) -> str:
    table = engine.dialect.identifier_preparer.format_table(column.table)
    return f"ALTER TABLE {table} ADD COLUMN {CreateColumn(column).compile(engine)}"


def _index(engine: Engine, index: Index) -> str:
    return str(CreateIndex(index).compile(engine)).strip()


def _run(engine: Engine, statements: Sequence[str]) -> None:
    # One by one: MySQL commits at each DDL statement, and a half upgraded ledger serves old and new alike.
    for statement in statements:
        with engine.begin() as connection:
            dialect_of(engine).wait_briefly(connection)
            connection.execute(text(statement.replace(":", "\\:")))


def identity(engine: Engine, ledger: Ledger, name: str) -> str:
    """A value of our meta table: schema_version, or ledger_id, by which two databases on one Redis differ."""
    with dialect_of(engine).reading(engine) as connection:
        return _named(engine, _read(connection, ledger), name)


def _read(connection: Connection, ledger: Ledger) -> dict[str, str]:
    return dict(map(tuple, connection.execute(select(ledger.meta.c.name, ledger.meta.c.value))))


def _named(engine: Engine, named: Mapping[str, str], name: str) -> str:
    if (value := named.get(name)) is None:
        raise BadLedger(
            reason=f"Our table nih_sched_meta in {address(engine.url)} has no {name}: drop it and init anew."
        )
    return value


def drop(engine: Engine, ledger: Ledger) -> None:
    """Drop our tables and what --notify made, and nothing else."""
    _run(engine, dialect_of(engine).unnotify_ddl(ledger.metadata.schema))
    ledger.metadata.drop_all(engine)


def _again(engine: Engine, what: str, work: Callable[[], None]) -> None:
    for turn in range(TURNS):
        try:
            work()
            return
        except (SQLAlchemyError, NoSuchTableError) as error:
            # Another scheduler may be making the same tables at this moment, or have one of them locked.
            if turn == TURNS - 1:
                if dialect_of(engine).is_transient(error):
                    raise
                raise DatabaseRefused(
                    address=address(engine.url),
                    what=what,
                    reason=f"{reason(error)} Let its owner run what `scheduler init --print-sql` prints.",
                ) from error
            time.sleep(min(0.1 * 2**turn, 1.0))


def _identity_missing(engine: Engine, ledger: Ledger) -> bool:
    return not set(_identity()) <= _names(engine, ledger)


def _names(engine: Engine, ledger: Ledger) -> set[str]:
    with dialect_of(engine).reading(engine) as connection:
        return set(_read(connection, ledger))


def _fill_identity(engine: Engine, ledger: Ledger) -> None:
    for name, value in _identity().items():
        try:
            with engine.begin() as connection:
                dialect_of(engine).wait_briefly(connection)
                connection.execute(insert(ledger.meta).values(name=name, value=value))
        except IntegrityError:
            continue  # there already


def _identity() -> dict[str, str]:
    return {"schema_version": str(SCHEMA_VERSION), "ledger_id": secrets.token_hex(4)}
