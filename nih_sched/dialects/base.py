"""The contract that each database meets, and what most of them share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Column, Connection, Engine, Float, Select, Table, and_, bindparam, select, text, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateIndex, Index
from sqlalchemy.sql import ColumnElement, Executable
from sqlalchemy.sql.expression import literal
from sqlalchemy.types import NullType

from nih_sched.dialects import quick
from nih_sched.dialects.times import After, Now
from nih_sched.dialects.watch import Watch
from nih_sched.model import SURROGATES, Word

T = TypeVar("T")

Start = Callable[[Any], Any]  # of a text: what an index on it holds
HARD = "50ms"  # for which PostgreSQL waits for a lock that is hardly to be waited for
IDLE = 5  # seconds for which a transaction of ours may do nothing: its statements follow each other at once


class End(NamedTuple):
    """What one attempt's end has of its own, where several ended alike."""

    id: int
    seconds: float
    age: float  # seconds since it ended
    result: str | None


class Opened(NamedTuple):
    """What one claim has of its own, where several are opened together."""

    row_key: str
    open_key: str
    rq_id: str


class Dialect:
    """One database's ways. The default methods are right for a standard one."""

    name = ""
    sorts_quicker = False  # whether it finds rare rows sooner by reading the whole table, than in their keys' order
    writes_in_ctes = False  # whether a WITH may write
    returns_updates = False  # whether an UPDATE can return what it wrote, and begin(hardly=True) gives up at once

    def engine(self, url: URL) -> Engine:
        """An engine for short transactions in READ COMMITTED.

        The session's time zone is left alone: the user's triggers write by it. Our own times say UTC themselves.
        """
        raise NotImplementedError

    def prepare(self, engine: Engine) -> None:
        """What the database as a whole needs once, when our tables are made."""

    def oldest(self, engine: Engine) -> tuple[int, ...]:
        """The oldest version that is served; of a server that has been reached."""
        raise NotImplementedError

    def journal_mode(self, engine: Engine) -> str | None:
        """SQLite's; None elsewhere."""
        return None

    def begin(self, connection: Connection, *, hardly: bool = False, lasting: bool = True) -> None:
        """At each transaction's begin: if we freeze in the middle of it, others mustn't wait for our locks for ever.

        Args:
            connection: its.
            hardly: have it give up at once on a row that others have locked.
            lasting: False: its commit needn't wait for the disk.
        """

    def wait_briefly(self, connection: Connection) -> None:
        """Have this transaction give up soon on a table or row that others have locked."""

    def transaction(
        self, engine: Engine, *, hardly: bool = False, lasting: bool = True, briefly: bool = False
    ) -> AbstractContextManager[Connection]:
        """A transaction; `hardly` and `lasting` as of begin(), and `briefly` as of wait_briefly().

        Both are to be called on it.
        """
        return engine.begin()

    @contextlib.contextmanager
    def reading(self, engine: Engine) -> Iterator[Connection]:
        """A connection for reading, without a transaction where none costs no more.

        Raises:
            DBAPIError: also where SQLAlchemy lets the driver's own error through, as it does when a connection is lost
                just before it goes back to its pool.
        """
        with self.minding_the_pool(engine), self.plain(engine).connect() as connection:
            yield connection

    @contextlib.contextmanager
    def minding_the_pool(self, engine: Engine) -> Iterator[None]:
        """Of reading(): the driver's own error becomes SQLAlchemy's."""
        try:
            yield
        except engine.dialect.loaded_dbapi.Error as error:
            self.forget_connections(engine)  # SQLAlchemy has left its place in the pool taken, for ever
            raise OperationalError(None, None, error, connection_invalidated=True) from error

    def plain(self, engine: Engine) -> Engine:
        """The same engine; its connections begin no transaction."""
        return with_option(engine, "isolation_level", "AUTOCOMMIT")

    def read(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        """Run `work` on a connection of reading(); once more on a new one if that one had died meanwhile."""
        return on_living(lambda: self.reading(engine), work)

    def write_at_once(self, engine: Engine, work: Callable[[Connection], T]) -> T:
        """Run `work`, one statement that writes: without a transaction in whose middle one could freeze.

        Args:
            engine: where.
            work: must be safe to run again after a commit whose answer was lost.
        """
        return self.read(engine, work)

    @contextlib.contextmanager
    def looking(self, engine: Engine, seconds: float) -> Iterator[Connection]:
        """A connection on which one may only read, and where a statement ends after so many seconds.

        Raises:
            DBAPIError: is_overdue() tells whether a statement took too long.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def lenient(self, connection: Connection) -> Iterator[None]:
        """Meanwhile a text that is none in its encoding is read with replacement characters: to be shown, no more."""
        yield

    def part_to_sample(self, connection: Connection, table: Table) -> float | None:
        """Of a table too large to be read for a look: the percentage that tells how many rows are of a kind, about.

        None: it isn't so large, or this database can't read a part of it.
        """
        return None

    def is_overdue(self, error: DBAPIError) -> bool:
        """Whether a statement was ended because it took longer than looking() allows."""
        raise NotImplementedError

    def adding_up(self, table: Table, rows: Sequence[dict[str, Any]]) -> Executable:
        """A statement that inserts these, or adds their `value` to that of the record that has their primary key."""
        raise NotImplementedError

    def forget_connections(self, engine: Engine) -> None:
        """Have the next statement run on a connection that was made anew: one may be sick in a way that only it knows.

        After a failover the old ones stay read-only for ever; and user code may have closed their files.
        """
        if not isinstance(engine.pool, StaticPool):  # an SQLite database in memory is its connection
            engine.dispose()

    def lock(self, query: Select[Any], table: Table, *, skip_locked: bool = False) -> Select[Any]:
        """Lock the rows that `query` finds, waiting for those that others have locked, or passing over them."""
        return query.with_for_update(of=table, skip_locked=skip_locked)

    def is_word(self, column: Column[Any], word: Word) -> ColumnElement[bool]:
        """The column holds exactly `word`, whatever its collation thinks is equal.

        The word is written into the SQL, by SQLAlchemy's quoting, because no database uses a partial index for a
        parameter.
        """
        kind = None if isinstance(column.type, NullType) else column.type
        return column == literal(word, kind, literal_execute=True)

    def holds(self, column: Column[Any], value: Any) -> bool:
        """Whether the column can hold this value at all; if not, no row has it, and to ask for it is an error."""
        if isinstance(value, int):
            return -(1 << 63) <= value < 1 << 64
        return not isinstance(value, str) or not SURROGATES.search(value)

    def open_claims(
        self, connection: Connection, attempts: Table, own: Sequence[Opened], values: dict[str, Any]
    ) -> tuple[dict[str, int], bool]:
        """insert_claims(), each claimed and sent now; and whether any row's record is kept: nearly always none is."""
        ((instant, any_kept),) = quick.run(connection, _before(attempts), {}).rows
        times = {"claimed_at": instant, "sent_at": instant}
        return self.insert_claims(connection, attempts, own, values | times), bool(any_kept)

    def insert_claims(
        self, connection: Connection, attempts: Table, own: Sequence[Opened], values: dict[str, Any]
    ) -> dict[str, int]:
        """Insert claims whose open_key isn't taken; return {open_key: id} of those that were inserted.

        Args:
            connection: in a transaction.
            attempts: our table.
            own: what each gets of its own.
            values: what all of them get.
        """
        raise NotImplementedError

    def among(self, column: Column[Any], values: Sequence[Any]) -> ColumnElement[bool]:
        """The column's value is one of these."""
        return column.in_(values)

    def given(self, column: Column[Any], name: str) -> ColumnElement[bool]:
        """The column's value is one of those that this parameter will hold."""
        return column.in_(bindparam(name, expanding=True))

    def numbered(self, name: str) -> Any:
        """A table of the texts that this parameter will hold: each `value` and its `number`, from 1."""
        raise NotImplementedError

    def close_claims(
        self,
        connection: Connection,
        attempts: Table,
        run: str,
        values: dict[str, Any],
        ends: Sequence[End],
    ) -> set[int]:
        """Close the records of attempts that ended alike, in one or two statements; return whose were still `run`'s.

        Args:
            connection: in a transaction.
            attempts: our table.
            run: what they were begun with; those that have ended since are left alone.
            values: what all of them get.
            ends: what each gets of its own.
        """
        ids = self.among(attempts.c.id, [end.id for end in ends])
        mine = (attempts.c.run == run) & attempts.c.finished_at.is_(None)
        query = self.lock(select(attempts.c.id).where(ids, mine), attempts)
        ours = set(connection.execute(query).scalars())
        if ends := [end for end in ends if end.id in ours]:
            self.write_ends(connection, attempts, values, ends)
        return ours

    def write_ends(self, connection: Connection, attempts: Table, values: dict[str, Any], ends: Sequence[End]) -> None:
        """Of close_claims: write to records that are locked, one by one."""
        own = {
            "seconds": bindparam("its_seconds"),
            "result": bindparam("its_result"),
            "started_at": After(-bindparam("its_age", type_=Float()) - bindparam("its_seconds", type_=Float())),
            "finished_at": After(-bindparam("its_age", type_=Float())),
        }
        statement = update(attempts).where(attempts.c.id == bindparam("its_id")).values(**values, **own)
        connection.execute(
            statement,
            [{"its_id": e.id, "its_seconds": e.seconds, "its_result": e.result, "its_age": e.age} for e in ends],
        )

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
        """Select from the records that hold one of these texts.

        Args:
            facts: what to select.
            id_: their table's primary key.
            text: the column that holds the text.
            start: makes of a text what an index finds: its start.
            texts: which ones.
            only: what else is true of the records.
        """
        starts = dict.fromkeys(start(one) for one in texts)
        return select(*facts).where(start(text).in_(list(starts)), text.in_(texts), *only)

    def index_ddl(self, table: Table, status: Column[Any], ready: Word, keys: Sequence[Column[Any]]) -> str:
        """The index that makes finding ready rows cheap."""
        index = self.recommended_index(table, status, ready, keys)
        return str(CreateIndex(index).compile(dialect=self.compiler())).strip()

    def recommended_index(self, table: Table, status: Column[Any], ready: Word, keys: Sequence[Column[Any]]) -> Index:
        """The index of index_ddl, on a copy of the table that nobody else sees."""
        raise NotImplementedError

    def notify_ddl(self, table: Table, status: Column[Any], ready: Word, schema: str | None) -> list[str]:
        """What has this database tell of new rows, its function in `schema`; nothing where it can't."""
        return []

    def unnotify_ddl(self, schema: str | None) -> list[str]:
        """What takes away all that notify_ddl made with this schema."""
        return []

    def watch(self, engine: Engine, table: Table, status: Column[Any], ready: Word, schema: str | None) -> Watch:
        """What tells of new rows of this table."""
        return Watch()

    def compiler(self) -> Any:
        """An SQLAlchemy dialect to show SQL with."""
        raise NotImplementedError

    def plan(self, connection: Connection, sql: str) -> str:
        """The database's plan for `sql`, as it words it."""
        rows = connection.execute(text("EXPLAIN " + sql.replace(":", "\\:"))).all()
        return "\n".join(" ".join(str(cell) for cell in row if cell is not None) for row in rows)

    def is_transient(self, error: Exception) -> bool:
        """Whether the same statement may succeed when tried again: a lost connection, a deadlock, a lock timeout."""
        if isinstance(error, PoolTimeout):
            return True
        if isinstance(error, DBAPIError):
            return error.connection_invalidated or self.code_is_transient(error)
        return False

    def gave_up(self, error: DBAPIError) -> bool:
        """Whether a statement that waits for no lock, as after begin(hardly=True), has met one."""
        return False

    def is_about_a_value(self, error: DBAPIError) -> bool:
        """Whether the driver alone failed, at turning a value into Python; the transaction goes on."""
        return False

    def raw_text(self, column: Column[Any]) -> ColumnElement[bytes] | None:
        """A text's bytes, NULL for what is none; None where every text of the database's can be read."""
        return None

    def is_refusal(self, error: DBAPIError) -> bool:
        """Whether the database itself refused a statement, in words of its own: no driver failed, nothing broke."""
        raise NotImplementedError

    def code_is_transient(self, error: DBAPIError) -> bool:
        """is_transient, by the driver's own error code."""
        return isinstance(error, OperationalError | InterfaceError)


def on_living(connect: Callable[[], AbstractContextManager[Connection]], work: Callable[[Connection], T]) -> T:
    """Run `work` on a connection; once more on a new one if that one had died meanwhile."""
    try:
        with connect() as connection:
            return work(connection)
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
    with connect() as connection:
        return work(connection)


@functools.lru_cache(maxsize=32)
def with_option(engine: Engine, name: str, value: str) -> Engine:
    """The engine with an execution option. Kept: to make one takes as long as a round trip to a database nearby."""
    return engine.execution_options(**{name: value})


@functools.lru_cache(maxsize=16)
def _before(attempts: Table) -> Any:
    return select(Now(), is_any_kept(attempts))


def is_any_kept(attempts: Table) -> ColumnElement[bool]:
    """Whether any row's next claim must know of its last one."""
    c = attempts.c
    kept = select(c.id).where(c.kept_key.is_not(None)).order_by(c.kept_key).limit(1)  # ordered, it uses the index
    return kept.scalar_subquery().is_not(None)


def claimable(dialect: Dialect, status: Column[Any], ready: Word, extra: Sequence[ColumnElement[bool]]) -> Any:
    """The WHERE of a claim."""
    return and_(dialect.is_word(status, ready), *extra)


def reason(error: Exception) -> str:
    """The database's own words for an error, on one line, without the statement and its values."""
    original = getattr(error, "orig", None) or error
    lines = str(original).strip().splitlines() or [type(original).__name__]
    return " ".join(line.strip() for line in lines if line.strip())
