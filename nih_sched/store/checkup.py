"""What a doctor asks of a database; each answer is bounded, however large the tables are."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Integer, and_, case, delete, false, func, insert, inspect, null, select, update
from sqlalchemy.exc import DBAPIError

from nih_sched.dialects import After, Now
from nih_sched.dialects.base import reason
from nih_sched.store.desk import Desk
from nih_sched.store.retries import seconds_between, waiting

FEW = 10_000  # that one looks at first
COUNTED = 100_000  # records that a count looks at


class Checkup:
    """Statements of one source's desk, about all sources of its ledger where that is said."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._attempts = desk.ledger.attempts

    def version(self) -> tuple[int, ...]:
        """The server's, its first two numbers."""
        info = self._desk.engine.dialect.server_version_info or ()
        return tuple(part for part in info[:2] if isinstance(part, int))

    def refused(self) -> Iterator[tuple[str, str]]:
        """What we may not do, and the database's words; tried on no row, and rolled back."""
        rows, ledger = self._desk.rows, self._desk.ledger
        trials: dict[str, Any] = {
            f"updates of {rows.status.name} in {rows.name}": update(rows.table)
            .where(false())
            .values({rows.status: rows.status})
        }
        for table in (ledger.attempts, ledger.sources, ledger.leases, ledger.counts):
            nothing = [null().label(column.name) for column in table.columns]
            trials |= {
                f"inserts into {table.name}": insert(table).from_select(
                    table.columns.keys(), select(*nothing).where(false())
                ),
                f"updates of {table.name}": update(table)
                .where(false())
                .values({c.name: c for c in list(table.columns)[1:2]}),
                f"deletes in {table.name}": delete(table).where(false()),
            }
        for what, statement in trials.items():
            try:
                with self._rolled_back() as connection:
                    connection.execute(statement)
            except DBAPIError as error:
                if not self._desk.dialect.is_refusal(error):
                    raise
                yield what, reason(error)

    @contextlib.contextmanager
    def _rolled_back(self) -> Iterator[Connection]:
        with self._desk.engine.connect() as connection, connection.begin() as transaction:
            self._desk.dialect.wait_briefly(connection)
            yield connection
            transaction.rollback()

    def newest_words(self, limit: int) -> dict[Any, int]:
        """How often each word stands in the status column of the newest rows, by key."""
        rows = self._desk.rows
        query = select(rows.status).where(*rows.conditions).order_by(*(key.desc() for key in rows.keys)).limit(limit)
        # Counted here: MariaDB would take `pending` and `Pending` for one.
        return Counter(self._desk.read_to_show(lambda c: c.execute(query).scalars().all()))

    def has_more_rows_than(self, number: int) -> bool:
        """Whether the table does."""
        rows = self._desk.rows
        query = select(rows.keys[0]).order_by(*rows.keys).offset(number).limit(1)
        return self._desk.read_to_show(lambda c: c.execute(query).first()) is not None

    def is_indexed(self) -> bool:
        """Whether an index of the table begins with the status column, or is a partial one over it."""
        table, name = self._desk.rows.table, self._desk.rows.status.name
        for index in inspect(self._desk.engine).get_indexes(table.name, schema=table.schema):
            if index["column_names"][:1] == [name]:
                return True
            options = index.get("dialect_options", {})
            if any(name in str(value) for option, value in options.items() if option.endswith("_where")):
                return True
        return False

    def ledger_span(self) -> int:
        """How many records the ledger holds at most: from its oldest to its newest."""
        c = self._attempts.c
        query = select(select(func.max(c.id)).scalar_subquery() - select(func.min(c.id)).scalar_subquery())
        return int(self._desk.read(lambda x: x.execute(query).scalar()) or 0)

    def waiting(self, seconds: float) -> list[tuple[str, int]]:
        """Every source with claims that were sent so many seconds ago and haven't begun, and how many."""
        c = self._attempts.c
        late = and_(c.started_at.is_(None), c.sent_at < After(-seconds))
        return self._by_source(late)

    def unled(self, seconds: float) -> list[tuple[str, int]]:
        """Every source with open claims of so many seconds' age that no producer leads, and how many."""
        s = self._desk.ledger.sources.c
        led = select(s.name).where(s.leader_until >= After(-seconds))
        names = set(self._desk.read(lambda c: c.execute(led).scalars().all()))
        old = self._attempts.c.claimed_at < After(-seconds)
        return [(name, count) for name, count in self._by_source(old) if name not in names]

    def _by_source(self, fit: Any) -> list[tuple[str, int]]:
        c = self._attempts.c
        flag = case((fit, 1), else_=0).label("fit")
        # In the index's order, so that it is used; see Retries.carriers.
        some = select(c.source, flag).where(c.open_key > "").order_by(c.open_key).limit(COUNTED).subquery()
        query = select(some.c.source, func.sum(some.c.fit, type_=Integer)).where(some.c.fit == 1)
        found = self._desk.read(lambda x: x.execute(query.group_by(some.c.source)).all())
        return [(name, int(count)) for name, count in found]

    def overdue(self, seconds: float) -> tuple[int, float]:
        """How many retries of this source are overdue by so many seconds, and by how many the first of them is."""
        c = self._attempts.c
        late = waiting(self._attempts, self._desk.source.name) & (c.due_at < After(-seconds))
        due = case((late, c.due_at)).label("due_at")
        for limit in (FEW, COUNTED):
            # By order and a low limit PostgreSQL uses the index also on a table that it hasn't analyzed.
            some = select(due).where(c.due_at.is_not(None)).order_by(c.due_at).limit(limit).subquery()
            query = select(func.count(some.c.due_at), func.min(some.c.due_at), func.count(), Now()).select_from(some)
            count, first, seen, now = self._desk.read(lambda x, its=query: x.execute(its).one())  # type: ignore[misc]
            if seen < limit:
                break
        return int(count), seconds_between(first, now) if count else 0.0
