"""Which rows of the user's table fit what a person asks for: walked by key, in pages, never for long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, literal_column, select
from sqlalchemy.exc import DBAPIError

from nih_sched import clock
from nih_sched.dialects.base import reason
from nih_sched.errors import UsageError
from nih_sched.model import Key
from nih_sched.store.desk import Desk
from nih_sched.store.history import History, Record
from nih_sched.store.horizon import Horizon
from nih_sched.store.order import beyond, in_key_order
from nih_sched.store.selection import Selection, fitting
from nih_sched.store.selects import Selects
from nih_sched.store.unreadable import Aside

LONGEST = 2.0  # seconds for which rows are looked through
AT_ONCE = 0.3  # seconds in which the database may find the rows by itself, before we walk
SOON = 0.05  # seconds in which it may find them in the order of their keys, where it has another way
SCANNED, MOST = 20_000, 640_000  # rows of the walk's first step, and of its longest
LEAST = 0.1  # seconds that the first one may take, however little time is left
QUICK = 0.05  # seconds that a step may take for the next one to be twice as long
PAGE = 400  # rows whose records are looked at together: SQLite joins at most 500 SELECTs, and values may be long
KEYS, MOST_KEYS = 1000, 16_000  # keys alone that are read together: at first, and at most
SPARSE = 0.1  # seconds after which rows of a time are sparse in the table
SPARSE_OF_STATE = 0.5  # and among those of a state
FEW = 5000  # rows of a time, that the ledger may tell of instead
SHARE = 2 / 3  # of the time that is left: for reading keys before they are looked at, and of that for all but the walk


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


@dataclass(frozen=True)
class Stretch:
    """Some of the rows that fit as far as the table can tell."""

    keys: list[Key]
    behind: Key | None  # the table was looked through up to this key
    is_last: bool  # and to its end


class Listing:
    """Walks the table of a source.

    Args:
        desk: the source's.
        at_once: seconds in which the database may find the rows by itself, before we walk; None: as a page has them.
        exact: the keys are to be acted on, not shown: one that is no text in its encoding is an error.
    """

    def __init__(self, desk: Desk, *, at_once: float | None = None, exact: bool = False) -> None:
        self._at_once, self._exact = at_once, exact
        self._desk = desk
        self._rows = desk.rows
        self._selects = Selects(desk)
        self._history = History(desk)
        self._horizon = Horizon(desk)
        self.aside = Aside(desk.dialect, desk.rows)  # rows that aren't listed, where keys are to be acted on
        self._too_slow = 0  # ways to find rows at once that were: they aren't tried again

    def check(self, where: str) -> None:
        """Hold a person's SQL against the table.

        Raises:
            UsageError: it can't be used.
        """
        none = [tuple(None for _ in self._rows.keys)]
        query = self._selects.rows(Selection(where=where), None, None, 1, descending=False, errors=dict.fromkeys(none))
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
        bare: bool = False,
    ) -> Page:
        """The first rows that fit.

        Args:
            selection: what is asked for.
            limit: how many at most.
            after: only rows behind this key.
            descending: whether the greatest keys come first.
            seconds: when to stop looking.
            bare: their keys alone are wanted, and no values.
        """
        until = clock.monotonic() + seconds
        if selection.where:
            self.check(selection.where)
        if not selection.asks_the_ledger:
            return _cut(self._of_table(selection, limit, after, descending, until, bare=bare), limit)
        page = _cut(self._of_both(selection, limit, after, descending, until), limit)
        rows = page.rows if bare or selection.text is not None else self._filled(page.rows)
        return Page(rows, page.next, page.stopped, page.was_cut)

    def with_records(self, page: Page) -> Page:
        """The same rows with their records."""
        records = self._history.of_rows([row.key for row in page.rows])
        rows = [Found(row.key, row.values, records.get(row.key, [])) for row in page.rows]
        return Page(rows, page.next, page.stopped, page.was_cut)

    def keys(self, selection: Selection, limit: int | None = None, *, seconds: float | None = None) -> Iterator[Key]:
        """The keys of all rows that fit, as they are found: however long it takes, or until time is over."""
        after: Key | None = None
        left, until = limit, None if seconds is None else clock.monotonic() + seconds
        while left is None or left > 0:
            patience = LONGEST if until is None else min(LONGEST, until - clock.monotonic())
            if patience <= 0:
                return
            most = 1000 if left is None else min(1000, left)
            page = self.page(selection, most, after=after, seconds=patience, bare=True)
            yield from (row.key for row in page.rows)
            left = None if left is None else left - len(page.rows)
            if page.was_cut and patience < LONGEST:
                return
            if page.was_cut and page.stopped == after:
                raise UsageError(reason="The database takes too long to find the next row. Narrow it, or add an index.")
            after = page.next or page.stopped
            if after is None:
                return

    def _of_table(
        self, selection: Selection, limit: int, after: Key | None, descending: bool, until: float, *, bare: bool
    ) -> Page:
        whole = self._selects.rows(selection, after, None, limit + 1, descending=descending, bare=bare)
        at_once = AT_ONCE if self._at_once is None else self._at_once
        ways = [(at_once, whole)]
        if self._desk.dialect.sorts_quicker:
            ways = [(SOON, whole), (at_once, self._selects.sorted_later(whole, limit + 1, descending))]
        now = clock.monotonic()
        end_of_ways = now + (until - now) * SHARE  # the rest is left for a walk, which says how far it came
        for seconds, query in ways[self._too_slow :]:
            try:
                return Page(self._run(query, min(seconds, end_of_ways - clock.monotonic()), bare=bare))
            except DBAPIError as error:
                if not self._desk.dialect.is_overdue(error):
                    raise
                self._too_slow += 1
        return self._walk(selection, limit, after, descending, until, bare=bare)

    def _walk(
        self, selection: Selection, limit: int, after: Key | None, descending: bool, until: float, *, bare: bool
    ) -> Page:
        rows: list[Found] = []
        start, scanned = after, SCANNED
        while len(rows) <= limit:
            began = clock.monotonic()
            left = max(until - began, LEAST if after == start else 0.0)
            if left <= 0:
                return Page(rows, stopped=after, was_cut=True)
            try:
                last = self._step(after, scanned, descending, left)
                query = self._selects.rows(
                    selection, after, last, limit + 1 - len(rows), descending=descending, bare=bare
                )
                rows += self._run(query, left, bare=bare)
            except DBAPIError as error:
                if not self._desk.dialect.is_overdue(error):
                    raise
                return Page(rows, stopped=after, was_cut=True)
            if last is None:
                break
            after = last
            if clock.monotonic() - began < QUICK:
                scanned = min(2 * scanned, MOST)
        return Page(rows)

    def stretches(
        self,
        selection: Selection,
        *,
        until: float,
        after: Key | None = None,
        descending: bool = False,
        most: int = KEYS,
    ) -> Iterator[Stretch]:
        """The keys of rows that fit as far as the table can tell, in their order; ends when time is over.

        Args:
            selection: what is asked for.
            until: when time is over, by the boot clock; the first keys are given in any case.
            after: only rows behind this key.
            descending: whether the greatest keys come first.
            most: keys that are read together at first.
        """
        while (left := until - clock.monotonic()) > 0:
            page = self._of_table(selection, most, after, descending, until - left * (1 - SHARE), bare=True)
            page = _cut(page, most)
            keys = [row.key for row in page.rows]
            for start in range(0, max(1, len(keys)), PAGE):
                if start and clock.monotonic() >= until:
                    return
                some, is_end = keys[start : start + PAGE], start + PAGE >= len(keys)
                behind = page.stopped if page.was_cut and is_end else some[-1] if some else after
                yield Stretch(some, behind, is_end and page.next is None and not page.was_cut)
            if behind == after:
                return  # not one step was quick enough
            after, most = behind, min(4 * most, MOST_KEYS)

    def _of_both(self, selection: Selection, limit: int, after: Key | None, descending: bool, until: float) -> Page:
        if selection.since is None:
            return self._through(selection, limit, after, descending, until)
        now = clock.monotonic()
        first = self._horizon.below(selection.since)
        if first is not None:  # the ledger's end can tell, unless much has happened in it
            keys = self._history.lately(selection.since, FEW, until=min(until, now + SPARSE), first=first)
            if keys is not None:
                return self._among(keys, selection, limit, after, descending)
        sparse = now + (SPARSE if selection.words is None else SPARSE_OF_STATE)
        page = self._through(selection, limit, after, descending, min(until, sparse))
        if not page.was_cut:
            return page
        # In the table there are few of them for a long way: perhaps the ledger has few in all.
        keys = self._history.lately(selection.since, FEW, until=now + (until - now) * SHARE)
        if keys is not None:
            return self._among(keys, selection, limit, after, descending)
        rest = self._through(selection, limit - len(page.rows), page.stopped, descending, until)
        return Page(page.rows + rest.rows, stopped=rest.stopped, was_cut=rest.was_cut)

    def _through(self, selection: Selection, limit: int, after: Key | None, descending: bool, until: float) -> Page:
        rows: list[Found] = []
        for stretch in self.stretches(selection.of_table, until=until, after=after, descending=descending):
            rows += self._fitting(selection, stretch.keys)
            if stretch.is_last or len(rows) > limit:
                return Page(rows)
            after = stretch.behind
        return Page(rows, stopped=after, was_cut=True)

    def _among(
        self, keys: Sequence[Key], selection: Selection, limit: int, after: Key | None, descending: bool
    ) -> Page:
        query = self._selects.rows(selection.of_table, after, None, len(keys), descending=descending, bare=True)
        found = self._run(query.where(self._desk.keyed(keys)), LONGEST, bare=True) if keys else []
        rows: list[Found] = []
        for start in range(0, len(found), PAGE):
            rows += self._fitting(selection, [row.key for row in found[start : start + PAGE]])
            if len(rows) > limit:
                break
        return Page(rows)

    def _fitting(self, selection: Selection, keys: Sequence[Key]) -> list[Found]:
        bare = [Found(key, {}, []) for key in keys]
        rows = bare if selection.text is None else self._filled(bare)
        fit = fitting(self._history, selection, {row.key: row.values for row in rows})
        rows = [row for row in rows if row.key in fit]
        return self._by_where(selection, rows) if selection.where_asks and rows else rows

    def _filled(self, rows: Sequence[Found]) -> list[Found]:
        """The same rows with their values; one that is gone by now isn't there."""
        found: dict[Key, Found] = {}
        for start in range(0, len(rows), PAGE):
            some = rows[start : start + PAGE]
            query = select(*self._rows.table.columns).where(self._desk.keyed([row.key for row in some]))
            found |= {row.key: row for row in self._run(query, LONGEST)}
        return [found[row.key] for row in rows if row.key in found]

    def _by_where(self, selection: Selection, rows: Sequence[Found]) -> list[Found]:
        keys = [row.key for row in rows]
        errors = dict.fromkeys(keys) | self._history.last_errors(keys)
        query = self._selects.rows(selection, None, None, len(rows), descending=False, errors=errors)
        fit = {found.key for found in self._run(query, LONGEST)}
        return [row for row in rows if row.key in fit]

    def _looking(self, seconds: float) -> AbstractContextManager[Connection]:
        desk = self._desk
        return desk.dialect.looking(desk.engine, seconds) if self._exact else desk.looking_to_show(seconds)

    def _step(self, after: Key | None, length: int, descending: bool, seconds: float) -> Key | None:
        """The key at the end of the walk's next step of so many rows; None when that is the table's end."""
        keys = self._rows.keys
        query = select(*keys).order_by(*in_key_order(keys, descending)).limit(1).offset(length - 1)
        if after is not None:
            query = query.where(beyond(keys, after, descending))
        found = self._read(query, seconds)
        return tuple(found[0]) if found else None

    def _read(self, query: Select[Any], seconds: float) -> Sequence[Any]:
        while True:
            chosen = query.where(*self.aside.conditions)
            try:
                with self._looking(seconds) as connection:
                    return connection.execute(chosen).all()
            except DBAPIError as error:
                if not self._exact or not self._desk.dialect.is_about_a_value(error):
                    raise
                if not self._desk.read(lambda connection, q=chosen: self.aside.learn(connection, q)):  # type: ignore[misc]
                    raise

    def _run(self, query: Select[Any], seconds: float, *, bare: bool = False) -> list[Found]:
        names, count = self._rows.columns, len(self._rows.columns)
        at = [names.index(key.name) for key in self._rows.keys]
        found = self._read(query, max(0.01, seconds))
        if bare:
            return [Found(tuple(row), {}, []) for row in found]
        return [
            Found(tuple(row[n] for n in at), dict(zip(names, tuple(row)[:count], strict=True)), []) for row in found
        ]


def _cut(page: Page, limit: int) -> Page:
    """At most so many of its rows."""
    return Page(page.rows[:limit], next=page.rows[limit - 1].key) if len(page.rows) > limit else page
