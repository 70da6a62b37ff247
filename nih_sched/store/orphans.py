"""Rows in a state of ours with no open claim behind them: a backup was restored, or the database refused their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, or_, select, update

from nih_sched import clock
from nih_sched.model import FAILURES, Key, Outcome, State, open_key
from nih_sched.store.claims import CHUNK
from nih_sched.store.desk import Desk
from nih_sched.store.listing import LONGEST, MOST_KEYS, Listing
from nih_sched.store.order import in_key_order
from nih_sched.store.selection import Selection


@dataclass(frozen=True)
class Orphan:
    """A row that nobody will move."""

    key: Key
    word: Any
    outcome: str | None  # of its last claim, where the database refused the row that claim's state

    @property
    def state(self) -> State:
        """Where it belongs."""
        if self.outcome == Outcome.DONE:
            return State.DONE
        return State.FAILED if self.outcome in FAILURES else State.READY


@dataclass(frozen=True)
class Search:
    """What a search has found."""

    orphans: list[Orphan]  # by key
    was_cut: bool  # time ran out
    behind: Key | None  # then: rows down to this key were looked through; None: none was


class Orphans:
    """Finding them, and putting them right; claims of any source on the table count."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        rows = desk.rows
        self._words = tuple({rows.words[state] for state in (State.QUEUED, State.STARTED, State.RETRYING)})
        self._ours = or_(*(desk.dialect.is_word(rows.status, word) for word in self._words))

    def find(self, limit: int, seconds: float = LONGEST) -> Search:
        """Up to `limit` of them, from the greatest key down; looks for `seconds` at most."""
        until = clock.monotonic() + seconds
        found: list[Orphan] = []
        behind: Key | None = None
        # Most of the time for one statement, which reads a table quicker than a walk does.
        listing, chosen = Listing(self._desk, at_once=seconds / 2, exact=True), Selection(self._words)
        for stretch in listing.stretches(chosen, until=until, descending=True, most=MOST_KEYS):
            # Read anew: a row that was claimed and ended since the first look is none.
            found += self._desk.read(partial(self._unclaimed_of, keys=stretch.keys))
            behind = stretch.behind
            if stretch.is_last or len(found) >= limit:
                return Search(found[:limit][::-1], was_cut=False, behind=None)
        return Search(found[:limit][::-1], was_cut=True, behind=behind)

    def _unclaimed_of(self, connection: Connection, keys: Sequence[Key]) -> list[Orphan]:
        return self._look_at(connection, self._unclaimed(connection, keys))

    def _unclaimed(self, connection: Connection, keys: Sequence[Key]) -> list[Key]:
        c = self._desk.ledger.attempts.c
        hashes = {open_key(self._desk.rows.name, key): key for key in keys}
        claimed = set(connection.execute(select(c.open_key).where(c.open_key.in_(list(hashes)))).scalars())
        return [key for hashed, key in hashes.items() if hashed not in claimed]

    def _look_at(self, connection: Connection, keys: Sequence[Key], *, lock: bool = False) -> list[Orphan]:
        if not keys:
            return []
        rows, c = self._desk.rows, self._desk.ledger.attempts.c
        query = select(*rows.keys, rows.status.label("nih_sched_word"))
        query = query.where(rows.keyed(keys), self._ours, *rows.conditions)
        query = query.order_by(*in_key_order(rows.keys, descending=True))
        if lock:
            query = self._desk.dialect.lock(query, rows.table)
        there = {tuple(row)[:-1]: row[-1] for row in connection.execute(query)}
        unclaimed = self._unclaimed(connection, list(there))
        hashes = [open_key(rows.name, key) for key in unclaimed]
        kept = select(c.kept_key, c.outcome).where(c.kept_key.in_(hashes), c.outcome != Outcome.INTERRUPTED.value)
        # The newest one speaks, where several were kept.
        outcomes = {row.kept_key: row.outcome for row in connection.execute(kept.order_by(c.id))} if hashes else {}
        return [Orphan(key, there[key], outcomes.get(open_key(rows.name, key))) for key in unclaimed]

    def put_right(self, orphans: Sequence[Orphan]) -> int:
        """Set them to where they belong, if that is still true of them; return how many were.

        Raises:
            DBAPIError: the database refuses the word; none of these was changed.
        """
        done = 0
        for start in range(0, len(orphans), CHUNK):
            keys = [orphan.key for orphan in orphans[start : start + CHUNK]]
            done += self._desk.transact(partial(self._put_right, keys=keys))
        return done

    def _put_right(self, connection: Connection, keys: Sequence[Key]) -> int:
        rows = self._desk.rows
        changed = 0
        by_state: dict[State, list[Key]] = {}
        for orphan in self._look_at(connection, keys, lock=True):
            by_state.setdefault(orphan.state, []).append(orphan.key)
        for state, chosen in by_state.items():
            statement = update(rows.table).where(rows.keyed(chosen), self._ours)
            changed += connection.execute(statement.values({rows.status: rows.words[state]})).rowcount
        return changed
