"""Rows in a state of ours with no open claim behind them: a backup was restored, or the database refused their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, or_, select, update

from nih_sched.model import FAILURES, Key, Outcome, State, open_key
from nih_sched.store.claims import CHUNK
from nih_sched.store.desk import Desk


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


class Orphans:
    """Finding them, and putting them right; claims of any source on the table count."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        rows = desk.rows
        words = {rows.words[state] for state in (State.QUEUED, State.STARTED, State.RETRYING)}
        self._ours = or_(*(desk.dialect.is_word(rows.status, word) for word in words))

    def find(self, limit: int) -> list[Orphan]:
        """Up to `limit` of them, by key."""
        rows = self._desk.rows
        query = select(*rows.keys).where(self._ours, *rows.conditions).order_by(*rows.keys)
        found: list[Orphan] = []
        with self._desk.dialect.reading(self._desk.engine) as connection:
            keys = [tuple(row) for row in connection.execute(query)]
            for start in range(0, len(keys), CHUNK):
                # Read anew: a row that was claimed and ended since the first look is none.
                suspects = self._unclaimed(connection, keys[start : start + CHUNK])
                found += self._look_at(connection, suspects)
                if len(found) >= limit:
                    break
        return found[:limit]

    def _unclaimed(self, connection: Connection, keys: Sequence[Key]) -> list[Key]:
        c = self._desk.ledger.attempts.c
        hashes = {open_key(self._desk.rows.name, key): key for key in keys}
        claimed = set(connection.execute(select(c.open_key).where(c.open_key.in_(list(hashes)))).scalars())
        return [key for hashed, key in hashes.items() if hashed not in claimed]

    def _look_at(self, connection: Connection, keys: Sequence[Key], *, lock: bool = False) -> list[Orphan]:
        if not keys:
            return []
        rows, c = self._desk.rows, self._desk.ledger.attempts.c
        query = select(*rows.keys, rows.status.label("nih_sched_word")).where(rows.keyed(keys), self._ours)
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
