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
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    literal_column,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal

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
    return (_start_of(attempts) == row_key[:KEY_START]) & (attempts.c.row_key == row_key)


def of_rows(attempts: Table, row_keys: Sequence[str]) -> ColumnElement[bool]:
    """The records of several rows, found likewise."""
    starts = dict.fromkeys(row_key[:KEY_START] for row_key in row_keys)
    return _start_of(attempts).in_(list(starts)) & attempts.c.row_key.in_(row_keys)


def _start_of(attempts: Table) -> ColumnElement[str]:
    # As PostgreSQL's index has it, with its numbers as they stand there.
    return func.substr(attempts.c.row_key, literal_column("1"), literal_column(str(KEY_START)))


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
        Column("leader", String(400)),  # the producer that rescues, and until when it is presumed to
        Column("leader_until", _INSTANT),
        Column("paused_at", _INSTANT),  # no row of it starts anywhere until that is NULL again
        Column("paused_by", String(190)),
        Column("pause_reason", _LONG),
        Column("redis_lost_at", _INSTANT),  # since when its leader has found Redis away
        **_ENGINE,
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
        Column("lease_until", _INSTANT, nullable=False),
        Column("died", String(400)),  # how its death was seen; from then on nothing of it is accepted
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
        Column("output", _LONG),  # the last lines that the handler wrote
        Column("cpu_seconds", Float),
        Column("peak_memory", BigInteger),  # bytes
        # Part of the table, not an index beside it: the table must never stand there without, not even half made.
        UniqueConstraint("open_key", name="nih_sched_attempts_open"),
        # Each record is updated twice: room for that on its page spares the indexes the first one.
        postgresql_with={"fillfactor": 50},
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
    kept = attempts.c.kept_key
    Index("nih_sched_attempts_kept", kept, postgresql_where=kept.is_not(None), sqlite_where=kept.is_not(None))
    Index("nih_sched_attempts_row", _KeyStart(attempts.c.row_key))
    counts = Table(
        "nih_sched_counts",
        metadata,
        Column("source", String(190), primary_key=True),
        Column("minute", BigInteger, primary_key=True),  # since 1970, UTC; 0: all that has been folded together
        Column("name", String(64), primary_key=True),
        Column("value", Float, nullable=False),
        **_ENGINE,
    )
    return Ledger(metadata, meta, sources, attempts, leases, counts)
