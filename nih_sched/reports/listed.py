"""Rows by state, text and time, and failures grouped: what `scheduler list` and the web's lists show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from nih_sched import clock
from nih_sched.model import Key, State, show_key
from nih_sched.reports import words
from nih_sched.reports.shown import plain, state_of
from nih_sched.store import Desk
from nih_sched.store.history import Brief, History, group_of, last_failure
from nih_sched.store.listing import LONGEST, Listing
from nih_sched.store.selection import Selection, words_of
from nih_sched.store.unreadable import Unreadable

GROUP_KEYS = 5  # rows of a group that are named


@dataclass(frozen=True)
class ListedRow:
    """A row in a list."""

    key: Key
    state: str  # what its word means; "" if it isn't ours
    word: Any
    values: dict[str, Any]
    attempts: int  # that have ended
    outcome: str | None  # of the last one
    at: datetime | None  # when something last happened to it, as the ledger has it
    worker: str | None
    error: str | None  # the reason of its last failure
    place: str | None  # that one's kind and place

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {
            "key": show_key(self.key),
            "state": self.state,
            "word": plain(self.word),
            "attempts": self.attempts,
            "outcome": self.outcome,
            "at": self.at and self.at.isoformat(),
            "worker": self.worker,
            "error": self.error,
            "place": self.place,
            "row": {name: plain(value) for name, value in self.values.items()},
        }


@dataclass(frozen=True)
class Listed:
    """Rows in the order of their keys."""

    rows: tuple[ListedRow, ...]
    next: Key | None  # more follow after this key
    stopped: Key | None  # time ran out here; what lies beyond wasn't looked at
    was_cut: bool  # whether time ran out, also where nothing was looked at

    @property
    def sentence(self) -> str:
        """What is missing, in words; "" if nothing is."""
        if self.was_cut:
            where = f"after key {words.first_line(show_key(self.stopped))}" if self.stopped else "at the first row"
            return f"Stopped {where}: {LONGEST:g} s were over. Narrow it by --state, or go on behind that key."
        if self.next is not None:
            return f"More follow after key {words.first_line(show_key(self.next))}."
        return ""

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {
            "rows": [row.as_json() for row in self.rows],
            "next": None if self.next is None else show_key(self.next),
            "stopped": None if self.stopped is None else show_key(self.stopped),
            "complete": self.next is None and not self.was_cut,
        }


@dataclass
class Group:
    """Rows in the failed state whose last failures are of one kind and place."""

    error: str
    count: int = 0
    newest: datetime | None = None
    reason: str = ""  # of the newest
    keys: list[str] = field(default_factory=list)  # some of them

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {**vars(self), "newest": self.newest and self.newest.isoformat()}


@dataclass(frozen=True)
class Groups:
    """The largest first."""

    groups: tuple[Group, ...]
    looked_at: int  # failed rows
    stopped: Key | None  # time ran out here
    was_cut: bool  # whether time ran out, also where nothing was looked at
    seconds: float  # that there were

    @property
    def sentence(self) -> str:
        """What is missing, in words; "" if nothing is."""
        if not self.was_cut:
            return ""
        where = f", down to key {words.first_line(show_key(self.stopped))}" if self.stopped else ""
        return f"Of the newest {self.looked_at:,} failed rows alone{where}: {self.seconds:g} s were over."

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {
            "groups": [group.as_json() for group in self.groups],
            "looked_at": self.looked_at,
            "stopped": None if self.stopped is None else show_key(self.stopped),
            "complete": not self.was_cut,
        }


def select(
    desk: Desk,
    *,
    state: str | None = None,
    where: str | None = None,
    since: float | None = None,
    text: str | None = None,
    error: str | None = None,
) -> Selection:
    """A selection in a person's words.

    Args:
        desk: the source's.
        state: a state's name, or a word of the status column.
        where: SQL over the row's columns, and `error`.
        since: seconds back from now.
        text: what its key, its texts or its last error contain.
        error: the kind and place of its last failure.

    Raises:
        UsageError: there is no such state.
    """
    chosen, waits = words_of(desk, state) if state else (None, None)
    earliest = None if since is None else History(desk).now() - timedelta(seconds=since)
    return Selection(chosen, where or None, earliest, text or None, error or None, waits)


def rows(
    desk: Desk, selection: Selection, limit: int = 100, *, after: Key | None = None, descending: bool = False
) -> Listed:
    """The first rows that fit, by key, with what the ledger has of them last.

    Raises:
        UsageError: its --where can't be used.
    """
    listing = Listing(desk)
    page = listing.page(selection, limit, after=after, descending=descending)
    shown = listing.with_records(page)
    return Listed(tuple(_listed(desk, row) for row in shown.rows), page.next, page.stopped, page.was_cut)


def keys(
    desk: Desk,
    selection: Selection,
    limit: int | None = None,
    *,
    seconds: float | None = None,
    left_out: list[Unreadable] | None = None,
) -> Iterator[Key]:
    """The keys of all rows that fit, however long it takes, or as many as are found in `seconds`.

    Args:
        desk: the source's.
        selection: what is asked for.
        limit: how many at most.
        seconds: for which they are looked for.
        left_out: gets the rows that were met whose keys can't be read, in the end.
    """
    listing = Listing(desk, exact=True)
    yield from listing.keys(selection, limit, seconds=seconds)
    if left_out is not None:
        left_out += listing.aside.found


def groups(desk: Desk, seconds: float = LONGEST) -> Groups:
    """Failed rows grouped by their last failure's kind and place, newest keys first; looks for `seconds` at most."""
    listing, history = Listing(desk), History(desk)
    until = clock.monotonic() + seconds
    chosen = Selection((desk.rows.words[State.FAILED],))
    found: dict[str, Group] = {}
    newest: dict[str, int] = {}  # the record of each group's newest failure
    stopped: Key | None = None
    looked, is_all = 0, False
    for stretch in listing.stretches(chosen, until=until, descending=True):
        briefs = history.briefs(stretch.keys)
        for key in stretch.keys:
            _put(found, newest, key, briefs.get(key, []))
        looked, stopped, is_all = looked + len(stretch.keys), stretch.behind, stretch.is_last
    reasons = history.reasons(newest.values())
    for name, record in newest.items():
        found[name].reason = words.first_line(reasons.get(record))
    ordered = sorted(found.values(), key=lambda group: -group.count)
    return Groups(tuple(ordered), looked, None if is_all else stopped, not is_all, seconds)


def _put(found: dict[str, Group], newest: dict[str, int], key: Key, records: list[Brief]) -> None:
    failure, name = last_failure(records), group_of(records)
    group = found.setdefault(name, Group(name))
    group.count += 1
    if len(group.keys) < GROUP_KEYS:
        group.keys.append(show_key(key))
    at = failure.finished_at if failure is not None else None
    if failure is not None and at is not None and (group.newest is None or at > group.newest):
        group.newest, newest[name] = at, failure.id


def _listed(desk: Desk, row: Any) -> ListedRow:
    word, failure = row.values[desk.rows.status.name], last_failure(row.records)
    newest = row.records[0] if row.records else None
    ended = [record for record in row.records if record.outcome is not None]
    times = [t for t in (newest.finished_at, newest.started_at, newest.claimed_at) if t] if newest else []
    return ListedRow(
        row.key,
        state_of(desk, word, row.records),
        word,
        row.values,
        len(ended),
        ended[0].outcome if ended else None,
        times[0] if times else None,
        newest.worker if newest else None,
        failure.reason if failure else None,
        failure.error if failure else None,
    )
