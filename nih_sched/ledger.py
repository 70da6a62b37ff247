"""Our own tables, beside the user's: their shape, their making, their version."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    insert,
    inspect,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchTableError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable

from nih_sched.dialects import address, dialect_of
from nih_sched.dialects.base import reason
from nih_sched.errors import BadLedger, DatabaseRefused, NewerLedger

SCHEMA_VERSION = 1

_ID = BigInteger().with_variant(Integer(), "sqlite")  # only INTEGER counts up by itself there
_INSTANT = (
    DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb").with_variant(DateTime(), "sqlite")
)
_LONG = Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")  # TEXT ends at 65,535 bytes there
_ENGINE: dict[str, Any] = {
    f"{name}_{option}": value
    for name in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


@dataclass(frozen=True)
class Ledger:
    """Our three tables in one schema.

    attempts holds one record for each attempt. The record whose id is the claim id always stands for the claim's
    newest attempt; when that one fails and another follows, what it was is copied to a record of its own (of_claim
    names the claim) and the claim's record goes on. So every hot statement finds its record by primary key.
    """

    metadata: MetaData
    meta: Table
    sources: Table
    attempts: Table


def tables(schema: str | None = None) -> Ledger:
    """The shape of our tables, in `schema` or in the connection's own."""
    metadata = MetaData(schema=schema)
    meta = Table(
        "nih_sched_meta",
        metadata,
        Column("name", String(190), primary_key=True),
        Column("value", String(190), nullable=False),
        **_ENGINE,
    )
    sources = Table(
        "nih_sched_sources",
        metadata,
        Column("name", String(190), primary_key=True),
        Column("facts", _LONG, nullable=False),
        Column("updated_at", _INSTANT, nullable=False),
        **_ENGINE,
    )
    attempts = Table(
        "nih_sched_attempts",
        metadata,
        Column("id", _ID, primary_key=True, autoincrement=True),
        Column("of_claim", BigInteger),  # NULL on a claim's newest attempt, whose id is the claim id
        Column("source", String(190), nullable=False),
        Column("row_key", _LONG, nullable=False),
        Column("open_key", String(40)),  # unique while the claim is open, NULL once it has ended
        Column("attempt", Integer, nullable=False),
        Column("failures", Integer, nullable=False),
        Column("tries", SmallInteger, nullable=False),
        Column("rq_id", String(64)),
        Column("claimed_by", String(190)),
        Column("claimed_at", _INSTANT, nullable=False),
        Column("sent_at", _INSTANT),
        Column("due_at", _INSTANT),  # only while waiting for the next attempt
        Column("started_at", _INSTANT),
        Column("run", String(32)),  # made up at each start: guards the attempt as the id guards the claim
        Column("worker", String(190)),
        Column("finished_at", _INSTANT),
        Column("outcome", String(16)),
        Column("seconds", Float),
        Column("reason", _LONG),
        Column("traceback", _LONG),
        Column("result", _LONG),
        # Part of the table, not an index beside it: the table must never stand there without, not even half made.
        UniqueConstraint("open_key", name="nih_sched_attempts_open"),
        sqlite_autoincrement=True,  # a token must never be given out twice, not even after a delete
        **_ENGINE,
    )
    due, of_claim = attempts.c.due_at, attempts.c.of_claim
    Index("nih_sched_attempts_due", due, postgresql_where=due.is_not(None), sqlite_where=due.is_not(None))
    Index(
        "nih_sched_attempts_claim",
        of_claim,
        postgresql_where=of_claim.is_not(None),
        sqlite_where=of_claim.is_not(None),
    )
    return Ledger(metadata, meta, sources, attempts)


def ddl(engine: Engine, ledger: Ledger) -> list[str]:
    """The statements that make our tables, for those who run DDL by hand."""
    statements = []
    for table in ledger.metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(engine)).strip())
        statements += [str(CreateIndex(index).compile(engine)).strip() for index in table.indexes]
    statements += [
        str(insert(ledger.meta).values(name=name, value=value).compile(engine, compile_kwargs={"literal_binds": True}))
        for name, value in _identity().items()
    ]
    return statements


def ensure(engine: Engine, ledger: Ledger) -> bool:
    """Make what is missing of our tables; safe when several do so at once. Return whether any was missing.

    Raises:
        NewerLedger: a newer nih-sched made them. DatabaseRefused: we may not create tables.
    """
    missing = not exists(engine, ledger)
    if missing:
        dialect_of(engine).prepare(engine)
        _create(engine, ledger)
    if missing or _identity_missing(engine, ledger):
        _fill_identity(engine, ledger)
    check_version(engine, ledger)
    return missing


def exists(engine: Engine, ledger: Ledger) -> bool:
    """Whether all our tables are there."""
    schema = ledger.metadata.schema
    try:
        there = set(inspect(engine).get_table_names(schema=schema))
    except DBAPIError:
        if schema is None:
            raise
        return False  # there is no such schema
    return {table.name for table in ledger.metadata.sorted_tables} <= there


def check_version(engine: Engine, ledger: Ledger) -> None:
    """Refuse tables that a newer nih-sched made."""
    found = int(identity(engine, ledger, "schema_version"))
    if found > SCHEMA_VERSION:
        raise NewerLedger(address=address(engine.url), found=found, known=SCHEMA_VERSION)


def identity(engine: Engine, ledger: Ledger, name: str) -> str:
    """A value of our meta table: schema_version, or ledger_id, by which two databases on one Redis differ."""
    with dialect_of(engine).read_engine(engine).connect() as connection:
        value = connection.execute(select(ledger.meta.c.value).where(ledger.meta.c.name == name)).scalar()
    if value is None:
        raise BadLedger(
            reason=f"Our table nih_sched_meta in {address(engine.url)} has no {name}: drop it and init anew."
        )
    return str(value)


def drop(engine: Engine, ledger: Ledger) -> None:
    """Drop our tables, and nothing else."""
    ledger.metadata.drop_all(engine)


def _create(engine: Engine, ledger: Ledger) -> None:
    for turn in range(5):
        try:
            ledger.metadata.create_all(engine)
            break
        except (SQLAlchemyError, NoSuchTableError) as error:
            # Another scheduler may be making the same tables at this moment; then they are there soon.
            if turn == 4:
                raise DatabaseRefused(
                    address=address(engine.url),
                    what="to create our tables nih_sched_*",
                    reason=f"{reason(error)} Let its owner run what `scheduler init --print-sql` prints.",
                ) from error
            time.sleep(0.1 * 2**turn)


def _identity_missing(engine: Engine, ledger: Ledger) -> bool:
    with dialect_of(engine).read_engine(engine).connect() as connection:
        names = connection.execute(select(ledger.meta.c.name)).scalars().all()
    return not set(_identity()) <= set(names)


def _fill_identity(engine: Engine, ledger: Ledger) -> None:
    for name, value in _identity().items():
        try:
            with engine.begin() as connection:
                connection.execute(insert(ledger.meta).values(name=name, value=value))
        except IntegrityError:
            continue  # there already


def _identity() -> dict[str, str]:
    return {"schema_version": str(SCHEMA_VERSION), "ledger_id": secrets.token_hex(4)}
