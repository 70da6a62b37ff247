"""A source's desk: its engine, ledger, table and words together, and the way transactions are run on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Engine, bindparam, insert, inspect, literal_column, select, tuple_, update
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool
from sqlalchemy.sql import ColumnElement

from nih_sched import clock, ledger, table, telemetry
from nih_sched.dialects import Dialect, Now, address, connect, dialect_of
from nih_sched.dialects.base import claimable, reason
from nih_sched.dialects.watch import Watch
from nih_sched.errors import BadLedger, DatabaseRefused, NoSuchTable, OlderLedger, UnreachableDatabase, UsageError
from nih_sched.ledger import Ledger
from nih_sched.model import Backoff, Key, Source, State
from nih_sched.settings import Settings
from nih_sched.store.unreadable import Aside
from nih_sched.table import RowTable

T = TypeVar("T")

PATIENCE = 60.0  # seconds for which an ordinary transaction is tried again
FOREVER = 7 * 86400.0  # seconds: what a row's end depends on is tried again until it works
LOUD_AFTER = 1.0  # seconds of trying after which we say so


@dataclass(frozen=True)
class Desk:
    """What every statement of a source needs."""

    engine: Engine
    dialect: Dialect
    ledger: Ledger
    rows: RowTable
    source: Source
    facts: str = ""  # the source as its producer wrote it down; "" where this desk isn't made from that
    is_made: bool = True  # whether our tables are there; who only looks makes none
    _made: dict[str, Any] = field(default_factory=dict, compare=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """A statement, made when it is first asked for: SQLAlchemy takes as long to make one as to run it."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def transact(
        self,
        work: Callable[[Connection], T],
        *,
        patience: float = PATIENCE,
        hardly: bool = False,
        lasting: bool = True,
    ) -> T:
        """Run `work` in one transaction, begun anew as insist() says.

        Args:
            work: must be safe to run again after a rollback, or after a commit whose answer was lost.
            patience: as of insist().
            hardly: have its statements give up at once on a row that others have locked.
            lasting: False doesn't wait for the disk where there is a choice: a crash of the server may undo it, as if
                it had never been; what is committed lastingly after it makes it last too.
        """

        def once() -> T:
            briefly = patience < PATIENCE
            how = {"hardly": hardly, "lasting": lasting}
            with self.dialect.transaction(self.engine, briefly=briefly, **how) as connection:
                self.dialect.begin(connection, **how)
                if briefly and not hardly:
                    self.dialect.wait_briefly(connection)
                return work(connection)

        return self.insist(once, patience=patience)

    def insist(self, work: Callable[[], T], *, patience: float = FOREVER) -> T:
        """Run `work`; again on lost connections, deadlocks and lock timeouts.

        Args:
            work: what to run, on connections of its own.
            patience: seconds after which the error is let through.
        """
        began = clock.monotonic()
        said = False
        turn = 0
        while True:
            try:
                result = work()
            except SQLAlchemyError as error:
                waited = clock.monotonic() - began
                if not self.dialect.is_transient(error) or waited >= patience:
                    raise
                if waited >= LOUD_AFTER and not said:
                    said = True
                    telemetry.emit("database_lost", reason=reason(error))
                self.dialect.forget_connections(self.engine)
                time.sleep(random.uniform(0.5, 1.0) * min(0.02 * 2**turn, 2.0))  # noqa: S311 - spreads, hides nothing
                turn = min(turn + 1, 10)
            else:
                if said:
                    telemetry.emit("database_back")
                return result

    def among(self, column: Column[Any], values: Iterable[Any]) -> ColumnElement[bool]:
        """The column's value is one of these, said in this database's fastest way."""
        return self.dialect.among(column, list(values))

    def keyed(self, keys: Iterable[Key]) -> ColumnElement[bool]:
        """The user's rows with these keys."""
        return self.rows.keyed(list(keys), self.dialect.among)

    @property
    def is_ready(self) -> ColumnElement[bool]:
        """Of the user's rows: ready, and not left out by --where."""
        rows = self.rows
        conditions = [*rows.conditions, *self.aside.conditions]
        ready: ColumnElement[bool] = claimable(self.dialect, rows.status, rows.words[State.READY], conditions)
        return ready

    @property
    def aside(self) -> Aside:
        """Ready rows that no claim can take, because their keys can't be read: those that claims have met."""
        return self.once("aside", lambda: Aside(self.dialect, self.rows))

    @property
    def given_rows(self) -> ColumnElement[bool]:
        """The user's rows with the keys that given_keys() makes parameters of."""
        if len(self.rows.keys) == 1:
            return self.dialect.given(self.rows.keys[0], "given_keys")
        return tuple_(*self.rows.keys).in_(bindparam("given_keys", expanding=True))

    def given_keys(self, keys: Iterable[Key]) -> dict[str, Any]:
        """For a statement with given_rows."""
        return {"given_keys": [key[0] for key in keys] if len(self.rows.keys) == 1 else list(keys)}

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on a connection without a transaction."""
        return self.dialect.read(self.engine, work)

    def read_to_show(self, work: Callable[[Connection], T]) -> T:
        """As read(), for what a person is shown: there, texts that are none in their encoding are no reason to fail."""

        def leniently(connection: Connection) -> T:
            with self.dialect.lenient(connection):
                return work(connection)

        return self.read(leniently)

    @contextlib.contextmanager
    def looking_to_show(self, seconds: float) -> Iterator[Connection]:
        """As the dialect's looking(), for what a person is shown."""
        with self.dialect.looking(self.engine, seconds) as connection, self.dialect.lenient(connection):
            yield connection

    def beside(self, work: Callable[[], T]) -> Callable[[], T]:
        """Have `work` run meanwhile, in a thread and on a connection of its own; what is returned waits for its result.

        A database in memory has one connection: there it runs when its result is asked for.
        """
        if isinstance(self.engine.pool, StaticPool):
            return work
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name="nih-sched-beside").start()
        return future.result

    def watch(self) -> Watch:
        """What tells of new ready rows, on a connection of its own."""
        rows = self.rows
        return self.dialect.watch(
            self.engine, rows.table, rows.status, rows.words[State.READY], self.ledger.metadata.schema
        )

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()


def open_desk(settings: Settings, *, create_ledger: bool = True) -> Desk:
    """Reach the database, check the table, make our tables if they are missing, and write the source down.

    Raises:
        NihError: whatever stands in the way, in one sentence; UnreachableDatabase: it may be gone soon.
    """
    engine = connect(settings.database_url)
    try:
        return desk_on(engine, settings, create_ledger=create_ledger)
    except DBAPIError as error:  # it was there when we knocked
        engine.dispose()
        if dialect_of(engine).is_transient(error):
            raise UnreachableDatabase(address=address(engine.url), reason=reason(error)) from error
        raise
    except BaseException:
        engine.dispose()
        raise


def desk_on(engine: Engine, settings: Settings, *, create_ledger: bool = True) -> Desk:
    """open_desk on an engine that is there already."""
    own = ledger.tables(settings.ledger_schema, engine.dialect.name)
    with dialect_of(engine).reading(engine) as connection:
        inspector = inspect(connection)  # one for all: it asks once which tables there are
        rows = table.reflect(inspector, settings, address(engine.url))
        try:
            ledger_id = ledger.look_up(connection, inspector, own)
        except (BadLedger, OlderLedger):
            if not create_ledger:
                raise
            ledger_id = None
    if create_ledger and ledger_id is None:
        if ledger.ensure(engine, own):
            telemetry.emit("ledger_created", address=address(engine.url))
        ledger_id = ledger.identity(engine, own, "ledger_id")
    source = Source(
        name=source_name(rows, settings.where, ledger_id or ""),
        table=rows.name,
        status_key=rows.status.name,
        key_columns=tuple(column.name for column in rows.keys),
        states=rows.words,
        backoff=Backoff(settings.delay, settings.backoff, settings.max_delay, settings.jitter),
        timeout=settings.timeout,
        lease=settings.lease,
        max_interruptions=settings.max_interruptions,
    )
    desk = Desk(engine, dialect_of(engine), own, rows, source, is_made=ledger_id is not None)
    _probe(desk, settings.where, claims=create_ledger)
    return desk


def _probe(desk: Desk, where: str | None, *, claims: bool) -> None:
    # A mistake in --where, or a missing right, is said now and not by a producer that fails at each look. For those who
    # only look, on no row: without the index, the first ready one may take long to find.
    rows = desk.rows
    none = literal_column("1") == literal_column("0")
    query = select(*rows.keys).where(desk.is_ready).limit(1)
    # In the claims' order: without one PostgreSQL reads the table up to the first, and takes no index.
    query = query.order_by(*rows.keys) if claims else query.where(none)
    try:
        desk.read_to_show(lambda connection: connection.execute(query).all())
    except DBAPIError as error:
        if desk.dialect.is_transient(error):
            raise
        if where:
            raise UsageError(reason=f"--where {where!r} can't be used: {reason(error)}") from error
        raise DatabaseRefused(
            address=address(desk.engine.url), what=f"to read {rows.name}", reason=reason(error)
        ) from error


def register(desk: Desk) -> None:
    """Write the source down for workers, stock ones too, to read by its name."""
    sources = desk.ledger.sources
    values = {"facts": desk.source.to_json(), "updated_at": Now()}

    def write(connection: Connection) -> None:
        same = sources.c.name == desk.source.name
        if not connection.execute(update(sources).where(same).values(values)).rowcount:
            connection.execute(insert(sources).values(name=desk.source.name, **values))

    try:
        desk.transact(write)
    except IntegrityError:
        desk.transact(write)  # another scheduler was first


def source_facts(engine: Engine, own: Ledger, name: str) -> str | None:
    """What a producer has written down of a source; None when there is no such source."""
    query = select(own.sources.c.facts).where(own.sources.c.name == name)
    facts: str | None = dialect_of(engine).read(engine, lambda connection: connection.execute(query).scalar())
    return facts


def source_desk(engine: Engine, own: Ledger, name: str, facts: str) -> Desk:
    """The desk of a source as its producer has written it down.

    Raises:
        BadLedger: its table is gone.
    """
    source = Source.from_json(name, facts)
    try:
        _, found = table.find_table(engine, source.table)
    except NoSuchTable as error:
        raise BadLedger(reason=f"Source {name}: {error}") from error
    rows = RowTable(
        name=source.table,
        table=found,
        status=table.column_of(found, source.status_key, "our table nih_sched_sources"),
        keys=tuple(table.column_of(found, key, "our table nih_sched_sources") for key in source.key_columns),
        words=source.states,
        features=(),
    )
    return Desk(engine, dialect_of(engine), own, rows, source, facts)


def source_name(rows: RowTable, where: str | None, ledger_id: str) -> str:
    """A source's name, which is its RQ queue's too: readable, and different wherever the rows served are different.

    The ledger's id is part of the hash, so that two databases on one Redis never take each other's jobs.
    """
    ready = rows.words[State.READY]
    facts = json.dumps([ledger_id, rows.name, rows.status.name, ready, where])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", f"{rows.table.name}-{ready}").strip("-")[:60]
    return f"{readable}-{digest}"
