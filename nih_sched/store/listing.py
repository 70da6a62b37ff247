"""Which rows of the user's table fit what a person asks for: walked by key, in pages, never for long."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Select, and_, literal, literal_column, or_, select, union_all
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import Text

from nih_sched import clock
from nih_sched.dialects.base import reason
from nih_sched.errors import UsageError
from nih_sched.model import Key, State, Word
from nih_sched.store.desk import Desk
from nih_sched.store.history import History, Record, group_name, group_of, last_failure
from nih_sched.table import fit

LONGEST = 2.0  # seconds for which rows are looked through
AT_ONCE = 0.3  # seconds in which the database may find the rows by itself, before we walk
SOON = 0.1  # seconds in which it may find them in the order of their keys, where it has another way
SCANNED = 20_000  # rows of one step of the walk
PAGE = 400  # rows whose records are looked at together: SQLite joins at most 500 SELECTs
LEDGERS = re.compile(r"\berror\b", re.IGNORECASE)  # what --where may say of a row beyond its columns


@dataclass(frozen=True)
class Selection:
    """What rows are asked for; what isn't said doesn't matter.

    Args:
        words: the status column holds one of these.
        where: SQL over the row's columns, and `error`: the reason of the row's last failed attempt.
        since: something happened to the row, as the ledger has it, at or after this instant.
        text: its key, its texts or its last error contain this.
        error: its last failure is of this group, by kind and place.
        waiting: it waits for its next attempt (True), or doesn't (False).
    """

    words: tuple[Word, ...] | None = None
    where: str | None = None
    since: datetime | None = None
    text: str | None = None
    error: str | None = None
    waiting: bool | None = None

    @property
    def asks_the_ledger(self) -> bool:
        """Whether the table alone can't tell."""
        asked = (self.since, self.text, self.error, self.waiting)
        return any(one is not None for one in asked) or bool(self.where and LEDGERS.search(self.where))


@dataclass(frozen=True)
class Found:
    """A row that fits."""

    key: Key
    values: dict[str, Any]
    records: list[Record]  # newest first; empty where they weren't asked for


@dataclass
class Page:
    """Some rows that fit, in the order of their keys."""

    rows: list[Found]
    next: Key | None = None  # more follow after this key
    stopped: Key | None = None  # time ran out when all rows up to this key had been looked through
    was_cut: bool = False  # whether time ran out


class Listing:
    """Walks the table of a source."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._rows = desk.rows
        self._history = History(desk)

    def check(self, where: str) -> None:
        """Hold a person's SQL against the table.

        Raises:
            UsageError: it can't be used.
        """
        none = [tuple(None for _ in self._rows.keys)]
        query = self._query(Selection(where=where), None, None, 1, descending=False, errors=dict.fromkeys(none))
        try:
            with self._desk.dialect.looking(self._desk.engine, LONGEST) as connection:
                connection.execute(query.where(literal_column("1") == literal_column("0"))).all()
        except DBAPIError as error:
            raise UsageError(reason=f"--where {where!r} can't be used: {reason(error)}") from error

    def page(
        self,
        selection: Selection,
        limit: int,
        *,
        after: Key | None = None,
        descending: bool = False,
        seconds: float = LONGEST,
    ) -> Page:
        """The first rows that fit.

        Args:
            selection: what is asked for.
            limit: how many at most.
            after: only rows behind this key.
            descending: whether the greatest keys come first.
            seconds: when to stop looking.
        """
        until = clock.monotonic() + seconds
        if selection.where:
            self.check(selection.where)
        if not selection.asks_the_ledger:
            page = self._of_table(selection, limit, after, descending, until)
        else:
            page = self._of_both(selection, limit, after, descending, until)
        if len(page.rows) > limit:
            page = Page(page.rows[:limit], next=page.rows[limit - 1].key)
        return page

    def with_records(self, page: Page) -> Page:
        """The same rows with their records."""
        return Page(self._recorded(page.rows), page.next, page.stopped, page.was_cut)

    def keys(self, selection: Selection, limit: int | None = None, *, seconds: float | None = None) -> Iterator[Key]:
        """The keys of all rows that fit, as they are found: however long it takes, or until time is over."""
        after: Key | None = None
        left, until = limit, None if seconds is None else clock.monotonic() + seconds
        while left is None or left > 0:
            patience = LONGEST if until is None else min(LONGEST, until - clock.monotonic())
            if patience <= 0:
                return
            page = self.page(selection, 1000 if left is None else min(1000, left), after=after, seconds=patience)
            yield from (row.key for row in page.rows)
            left = None if left is None else left - len(page.rows)
            if page.was_cut and patience < LONGEST:
                return
            if page.was_cut and page.stopped == after:
                raise UsageError(reason="The database takes too long to find the next row. Narrow it, or add an index.")
            after = page.next or page.stopped
            if after is None:
                return

    def _of_table(self, selection: Selection, limit: int, after: Key | None, descending: bool, until: float) -> Page:
        whole = self._query(selection, after, None, limit + 1, descending=descending)
        ways = [(AT_ONCE, whole)]
        if self._desk.dialect.sorts_quicker:
            ways = [(SOON, whole), (AT_ONCE, self._sorted(whole, limit + 1, descending))]
        for seconds, query in ways:
            try:
                return Page(self._run(query, min(seconds, until - clock.monotonic())))
            except DBAPIError as error:
                if not self._desk.dialect.is_overdue(error):
                    raise
        rows: list[Found] = []
        while len(rows) <= limit:
            left = until - clock.monotonic()
            if left <= 0:
                return Page(rows, stopped=after, was_cut=True)
            try:
                last = self._step(after, descending, left)
                query = self._query(selection, after, last, limit + 1 - len(rows), descending=descending)
                rows += self._run(query, left)
            except DBAPIError as error:
                if not self._desk.dialect.is_overdue(error):
                    raise
                return Page(rows, stopped=after, was_cut=True)
            if last is None:
                break
            after = last
        return Page(rows)

    def _of_both(self, selection: Selection, limit: int, after: Key | None, descending: bool, until: float) -> Page:
        asks = bool(selection.where and LEDGERS.search(selection.where))
        first = Selection(selection.words, None if asks else selection.where)
        rows: list[Found] = []
        while len(rows) <= limit:
            if clock.monotonic() >= until:
                return Page(rows, stopped=after, was_cut=True)
            page = self._of_table(first, PAGE, after, descending, until)
            some = page.rows[:PAGE]
            fit = [row for row in self._recorded(some) if self._fits(selection, row)]
            rows += self._by_where(selection, fit) if asks and fit else fit
            if page.was_cut:
                return Page(rows, stopped=page.stopped, was_cut=True)
            if len(page.rows) <= PAGE:
                break
            after = some[-1].key
        return Page(rows)

    def _recorded(self, rows: Sequence[Found]) -> list[Found]:
        records = self._history.of_rows([row.key for row in rows])
        return [Found(row.key, row.values, records.get(row.key, [])) for row in rows]

    def _fits(self, selection: Selection, row: Found) -> bool:
        failure = last_failure(row.records)
        if selection.error is not None and group_of(row.records) != group_name(selection.error):
            return False
        if selection.waiting is not None and any(one.is_waiting for one in row.records) != selection.waiting:
            return False
        if selection.since is not None and not _is_since(row.records, selection.since):
            return False
        if selection.text is not None:
            wanted = selection.text.casefold()
            texts = [*map(str, row.values.values()), failure.reason or "" if failure else ""]
            return any(wanted in text.casefold() for text in texts)
        return True

    def _by_where(self, selection: Selection, rows: Sequence[Found]) -> list[Found]:
        errors = {}
        for row in rows:
            failure = last_failure(row.records)
            errors[row.key] = failure.reason if failure else None
        query = self._query(selection, None, None, len(rows), descending=False, errors=errors)
        fit = {found.key for found in self._run(query, LONGEST)}
        return [row for row in rows if row.key in fit]

    def _step(self, after: Key | None, descending: bool, seconds: float) -> Key | None:
        """The key at the end of the walk's next step; None when that is the table's end."""
        keys = self._rows.keys
        query = select(*keys).order_by(*in_key_order(keys, descending)).limit(SCANNED)
        if after is not None:
            query = query.where(beyond(keys, after, descending))
        step = query.subquery()
        columns = [step.c[key.name] for key in keys]
        last = select(*columns, select(literal_column("count(*)")).select_from(step).scalar_subquery().label("n"))
        last = last.order_by(*in_key_order(columns, not descending)).limit(1)
        with self._desk.dialect.looking(self._desk.engine, seconds) as connection:
            row = connection.execute(last).one_or_none()
        return None if row is None or row[-1] < SCANNED else tuple(row)[:-1]

    def _query(
        self,
        selection: Selection,
        after: Key | None,
        last: Key | None,
        limit: int,
        *,
        descending: bool,
        errors: dict[Key, str | None] | None = None,
    ) -> Select[Any]:
        rows, table = self._rows, self._rows.table
        query = select(*table.columns)
        if errors is not None and "error" not in rows.columns:
            given = self._given(errors)
            same = [key == given.c[f"nih_sched_{n}"] for n, key in enumerate(rows.keys)]
            query = query.select_from(table.join(given, and_(*same)))
        elif errors is not None:
            query = query.where(rows.keyed(list(errors)))
        if selection.words is not None:
            query = query.where(or_(*(self._desk.dialect.is_word(rows.status, one) for one in selection.words)))
        if selection.where:
            # On a line of its own, so that a comment at its end doesn't swallow our parenthesis.
            query = query.where(literal_column(f"({selection.where}\n)"))
        if after is not None:
            query = query.where(beyond(rows.keys, after, descending))
        if last is not None:
            query = query.where(or_(beyond(rows.keys, last, not descending), rows.keyed([last])))
        return query.order_by(*in_key_order(rows.keys, descending)).limit(limit)

    def _sorted(self, query: Select[Any], limit: int, descending: bool) -> Select[Any]:
        """The same rows, found in whatever order the database likes, and sorted then: OFFSET keeps it from asking."""
        found = query.order_by(None).limit(None).offset(literal_column("0")).subquery("nih_sched_found")
        columns = [found.c[key.name] for key in self._rows.keys]
        return select(*found.c).order_by(*in_key_order(columns, descending)).limit(limit)

    def _given(self, errors: dict[Key, str | None]) -> Any:
        """A table of keys and the errors that the ledger has for them."""
        selects = [
            select(
                *(
                    literal(part, column.type).label(f"nih_sched_{n}")
                    for n, (part, column) in enumerate(zip(key, self._rows.keys, strict=True))
                ),
                literal(error, Text()).label("error"),
            )
            for key, error in errors.items()
        ]
        return union_all(*selects).subquery("nih_sched_given") if len(selects) > 1 else selects[0].subquery("given")

    def _run(self, query: Select[Any], seconds: float) -> list[Found]:
        names, count = self._rows.columns, len(self._rows.columns)
        at = [names.index(key.name) for key in self._rows.keys]
        with self._desk.dialect.looking(self._desk.engine, max(0.01, seconds)) as connection:
            found = connection.execute(query).all()
        return [
            Found(tuple(row[n] for n in at), dict(zip(names, tuple(row)[:count], strict=True)), []) for row in found
        ]


def words_of(desk: Desk, state: str) -> tuple[tuple[Word, ...], bool | None]:
    """The words that a person means by a state's name or a word, and whether such rows wait for a retry.

    Raises:
        UsageError: neither.
    """
    words = desk.rows.words
    if state in State.__members__.values():
        wanted = State(state)
        shared = words[State.RETRYING] == words[State.QUEUED] and wanted in (State.RETRYING, State.QUEUED)
        return (words[wanted],), (wanted is State.RETRYING) if shared else None
    for word in words.values():
        if str(word) == state:
            return (word,), None
    try:
        return (fit(desk.rows.status, state),), None
    except ValueError as error:
        names = ", ".join(one.value for one in State)
        raise UsageError(reason=f"{state!r} is no state: expected {names}, or a word ({error}).") from error


def _is_since(records: Sequence[Record], since: datetime) -> bool:
    times = (t for one in records for t in (one.finished_at, one.started_at, one.claimed_at) if t is not None)
    return any(instant >= since for instant in times)


def in_key_order(keys: Sequence[Any], descending: bool) -> list[Any]:
    """What to order rows by."""
    return [key.desc() for key in keys] if descending else list(keys)


def beyond(keys: Sequence[Column[Any]], key: Key, descending: bool) -> ColumnElement[bool]:
    """Rows behind this key, said so that an index on several columns is used on every database."""
    first, part = keys[0], key[0]
    if len(keys) == 1:
        last: ColumnElement[bool] = first < part if descending else first > part
        return last
    parts: list[ColumnElement[bool]] = []
    for n, (column, value) in enumerate(zip(keys, key, strict=True)):
        same = [one == its for one, its in zip(keys[:n], key[:n], strict=True)]
        parts.append(and_(*same, column < value if descending else column > value))
    near = first <= part if descending else first >= part
    behind: ColumnElement[bool] = and_(near, or_(*parts))
    return behind
