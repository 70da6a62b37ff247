"""The shape of our own tables, beside the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    MetaData,
    Select,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    literal_column,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal

from nih_sched.dialects import Dialect

_ID = BigInteger().with_variant(Integer(), "sqlite")  # only INTEGER counts up by itself there
_MYSQL = ("mysql", "mariadb")
_ENGINE: dict[str, Any] = {
    f"{name}_{option}": value
    for name in _MYSQL
    for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


KEY_START = 100  # characters of a row_key by which its records are found: an index can't take a text of any length


class _KeyStart(ColumnElement[str]):
    """The start of a text column, in an index."""

    inherit_cache = True
    _traverse_internals: ClassVar[Any] = [("column", InternalTraversal.dp_clauseelement)]  # type: ignore[misc]

    def __init__(self, column: Column[Any]) -> None:
        self.column = column


@compiles(_KeyStart)
def _whole(element: _KeyStart, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(element.column, **options))


@compiles(_KeyStart, "postgresql")
def _start(element: _KeyStart, compiler: SQLCompiler, **options: Any) -> str:
    return f"substr({compiler.process(element.column, **options)}, 1, {KEY_START})"


@compiles(_KeyStart, "mysql", "mariadb")
def _prefix(element: _KeyStart, compiler: SQLCompiler, **options: Any) -> str:
    return f"{compiler.process(element.column, **options)}({KEY_START})"


def of_row(attempts: Table, row_key: str) -> ColumnElement[bool]:
    """The records of one row, found by the index on them."""
    found: ColumnElement[bool] = _start_of(attempts.c.row_key) == row_key[:KEY_START]
    return found & (attempts.c.row_key == row_key)


def of_rows(
    dialect: Dialect,
    attempts: Table,
    facts: Sequence[Any],
    row_keys: Sequence[str],
    only: Sequence[ColumnElement[bool]] = (),
) -> Select[Any]:
    """Select from the records of several rows, found likewise; on PostgreSQL the newest 2000 of each."""
    return dialect.select_each(facts, attempts.c.id, attempts.c.row_key, _start_of, row_keys, only=only)


def _start_of(row_key: Any) -> Any:
    if isinstance(row_key, str):
        return row_key[:KEY_START]
    # As PostgreSQL's index has it, with its numbers as they stand there.
    return func.substr(row_key, literal_column("1"), literal_column(str(KEY_START)))


@dataclass(frozen=True)
class Ledger:
    """Our tables in one schema.

    attempts holds one record for each attempt. The record whose id is the claim id always stands for the claim's
    newest attempt; when that one fails and another follows, what it was is copied to a record of its own (of_claim
    names the claim) and the claim's record goes on. So every hot statement finds its record by primary key.

    leases holds one record for each worker: until when it and its horse are presumed alive, and of what they died.

    counts holds what happened in each minute: how many rows were claimed, done, failed, ..., for charts and metrics.
    """

    metadata: MetaData
    meta: Table
    sources: Table
    attempts: Table
    leases: Table
    counts: Table


def _types(kind: str | None) -> tuple[Any, Any]:
    """An instant's type, and that of a text of any length."""
    instant: Any = DateTime(timezone=True).with_variant(DateTime(), "sqlite")
    if kind is not None and kind not in _MYSQL:
        return instant, Text()
    from sqlalchemy.dialects import mysql  # noqa: PLC0415 - as below

    # TEXT ends at 65,535 bytes there.
    return instant.with_variant(mysql.DATETIME(fsp=6), *_MYSQL), Text().with_variant(mysql.MEDIUMTEXT(), *_MYSQL)


def tables(schema: str | None = None, kind: str | None = None) -> Ledger:
    """The shape of our tables.

    Args:
        schema: where they are; None: in the connection's own.
        kind: the database that they are for, by its name; None: any. For each one SQLAlchemy imports all that it has of
            it, which takes as long as a look at a table.
    """

    def own(**options: Any) -> dict[str, Any]:
        names = ("postgresql", "sqlite", *_MYSQL) if kind is None else _MYSQL if kind in _MYSQL else (kind,)
        return {name: value for name, value in options.items() if name.startswith(tuple(f"{one}_" for one in names))}

    def some(column: Column[Any]) -> dict[str, Any]:
        return own(postgresql_where=column.is_not(None), sqlite_where=column.is_not(None))

    instant, long = _types(kind)
    engine = own(**_ENGINE)
    metadata = MetaData(schema=schema)
    meta = Table(
        "nih_sched_meta",
        metadata,
        Column("name", String(190), primary_key=True),
        Column("value", String(190), nullable=False),
        **engine,
    )
    sources = Table(
        "nih_sched_sources",
        metadata,
        Column("name", String(190), primary_key=True),
        Column("facts", long, nullable=False),
        Column("updated_at", instant, nullable=False),
        Column("leader", String(400)),  # the producer that rescues, and until when it is presumed to
        Column("leader_until", instant),
        Column("paused_at", instant),  # no row of it starts anywhere until that is NULL again
        Column("paused_by", String(190)),
        Column("pause_reason", long),
        Column("redis_lost_at", instant),  # since when its leader has found Redis away
        **engine,
    )
    leases = Table(
        "nih_sched_leases",
        metadata,
        Column("id", String(32), primary_key=True),
        Column("worker", String(190), nullable=False),
        Column("host", String(250), nullable=False),
        Column("pid", BigInteger, nullable=False),  # the worker's; and when it was started, as host.born() says
        Column("born", BigInteger, nullable=False),
        Column("horse", BigInteger),
        Column("horse_born", BigInteger),
        Column("seconds", Float, nullable=False),
        Column("beat", BigInteger, nullable=False),  # grows at each renewal: who sees it stand still needs no clock
        Column("lease_until", instant, nullable=False),
        Column("died", String(400)),  # how its death was seen; from then on nothing of it is accepted
        **engine,
    )
    attempts = Table(
        "nih_sched_attempts",
        metadata,
        Column("id", _ID, primary_key=True, autoincrement=True),
        Column("of_claim", BigInteger),  # NULL on a claim's newest attempt, whose id is the claim id
        Column("source", String(190), nullable=False),
        Column("row_key", long, nullable=False),
        Column("open_key", String(40)),  # unique while the claim is open, NULL once it has ended
        Column("attempt", Integer, nullable=False),
        Column("failures", Integer, nullable=False),
        Column("tries", SmallInteger, nullable=False),
        Column("rq_id", String(64)),
        Column("claimed_by", String(190)),
        Column("claimed_at", instant, nullable=False),
        Column("sent_at", instant),
        Column("due_at", instant),  # only while waiting for the next attempt
        Column("started_at", instant),
        Column("run", String(32)),  # made up at each start: guards the attempt as the id guards the claim
        Column("worker", String(190)),
        Column("finished_at", instant),
        Column("outcome", String(16)),
        Column("seconds", Float),
        Column("reason", long),
        Column("traceback", long),
        Column("result", long),
        Column("lease", String(32)),  # under which the attempt runs, or ran
        Column("interruptions", Integer),  # how many interrupted attempts of the row came just before
        # Where the row was interrupted into this claim: the claim from which that began, which the handler gets as its
        # claim_id, and how many attempts there were before this claim's.
        Column("first_claim", BigInteger),
        Column("earlier", Integer),
        Column("ended_by", String(190)),  # who wrote the outcome: the worker, or the producer that rescued
        Column("late", String(16)),  # what a stale worker brought afterwards, and was refused
        # The row's open_key once more, on an ended claim that the row's next one must know of: it was interrupted, or
        # the database refused the row its state.
        Column("kept_key", String(40)),
        Column("error", String(190)),  # kind and place, by which failures are grouped
        Column("output", long),  # the last lines that the handler wrote
        Column("cpu_seconds", Float),
        Column("peak_memory", BigInteger),  # bytes
        # Part of the table, not an index beside it: the table must never stand there without, not even half made.
        UniqueConstraint("open_key", name="nih_sched_attempts_open"),
        # Each record is updated twice: room for that on its page spares the indexes the first one.
        **own(postgresql_with={"fillfactor": 50}),
        # A token must never be given out twice, not even after a delete.
        **own(sqlite_autoincrement=True),
        **engine,
    )
    due, of_claim = attempts.c.due_at, attempts.c.of_claim
    Index("nih_sched_attempts_due", due, **some(due))
    Index("nih_sched_attempts_claim", of_claim, **some(of_claim))
    kept = attempts.c.kept_key
    Index("nih_sched_attempts_kept", kept, **some(kept))
    Index("nih_sched_attempts_row", _KeyStart(attempts.c.row_key))
    counts = Table(
        "nih_sched_counts",
        metadata,
        Column("source", String(190), primary_key=True),
        Column("minute", BigInteger, primary_key=True),  # since 1970, UTC; 0: all that has been folded together
        Column("name", String(64), primary_key=True),
        Column("value", Float, nullable=False),
        **engine,
    )
    return Ledger(metadata, meta, sources, attempts, leases, counts)
