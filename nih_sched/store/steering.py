"""What a person does to rows: back to ready, or cancelled; rows and ledger together, all of a chunk or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, or_, select, update

from nih_sched.dialects import Now
from nih_sched.errors import CantCancel
from nih_sched.model import Key, Outcome, State, clean_text, encode_key, open_key
from nih_sched.store.desk import Desk

ENDED = (State.FAILED, State.CANCELLED, State.DONE)
UNENDED = (State.READY, State.QUEUED, State.RETRYING, State.STARTED)


@dataclass(frozen=True)
class Steered:
    """What became of some rows."""

    changed: list[Key] = field(default_factory=list)
    running: list[Key] = field(default_factory=list)  # of those: they run, and their workers are to stop them
    left: list[tuple[Key, Any]] = field(default_factory=list)  # not changed, with the words that they have
    missing: list[Key] = field(default_factory=list)  # the table has no such rows
    void: list[str] = field(default_factory=list)  # RQ ids of jobs that have lost claims


class Steering:
    """The statements; each takes at most CHUNK keys, and is one transaction."""

    def __init__(self, desk: Desk, by: str) -> None:
        self._desk = desk
        self._by = by
        self._attempts = desk.ledger.attempts

    def requeue(self, keys: Sequence[Key]) -> Steered:
        """Set rows that have ended back to ready, with all their tries."""
        return self._desk.transact(lambda c: self._requeue(c, keys))

    def cancel(self, keys: Sequence[Key]) -> Steered:
        """Set rows that haven't ended to the cancelled word, and end the claims of those that haven't begun.

        Raises:
            CantCancel: the cancelled word is also that of a row on its way.
        """
        words = self._desk.rows.words
        for state in UNENDED:
            if words[state] == words[State.CANCELLED]:
                raise CantCancel(word=words[State.CANCELLED], state=state.value)
        return self._desk.transact(lambda c: self._cancel(c, keys))

    def _requeue(self, connection: Connection, keys: Sequence[Key]) -> Steered:
        found = self._lock(connection, keys, ENDED)
        self._set(connection, found, State.READY)
        return Steered(found, [], *self._others(connection, keys, found))

    def _cancel(self, connection: Connection, keys: Sequence[Key]) -> Steered:
        # Rows before ledger, as a start locks them: whoever has the row decides.
        found = self._lock(connection, keys, UNENDED)
        c, by_claim = self._attempts.c, {open_key(self._desk.rows.name, key): key for key in found}
        query = select(c.id, c.open_key, c.rq_id, c.started_at).where(self._desk.among(c.open_key, by_claim))
        claims = connection.execute(self._desk.dialect.lock(query, self._attempts)).all() if found else []
        if unstarted := [claim for claim in claims if claim.started_at is None]:
            ended = {
                "open_key": None,
                "due_at": None,
                "finished_at": Now(),
                "outcome": Outcome.CANCELLED.value,
                "reason": clean_text(f"cancelled by {self._by}"),
                "ended_by": self._by[:190],
            }
            these = self._desk.among(c.id, [claim.id for claim in unstarted])
            connection.execute(update(self._attempts).where(these).values(ended))
        self._set(connection, found, State.CANCELLED)
        running = [by_claim[claim.open_key] for claim in claims if claim.started_at is not None]
        void = list(dict.fromkeys(claim.rq_id for claim in unstarted if claim.rq_id))
        return Steered(found, running, *self._others(connection, keys, found), void)

    def _lock(self, connection: Connection, keys: Sequence[Key], states: Sequence[State]) -> list[Key]:
        rows = self._desk.rows
        query = select(*rows.keys).where(self._desk.keyed(keys), self._is_one(states)).order_by(*rows.keys)
        return [tuple(row) for row in connection.execute(self._desk.dialect.lock(query, rows.table))]

    def _is_one(self, states: Sequence[State]) -> ColumnElement[bool]:
        rows = self._desk.rows
        words = dict.fromkeys(rows.words[state] for state in states)
        return or_(*(self._desk.dialect.is_word(rows.status, word) for word in words))

    def _set(self, connection: Connection, keys: Sequence[Key], state: State) -> None:
        rows = self._desk.rows
        if keys:
            statement = update(rows.table).where(self._desk.keyed(keys))
            connection.execute(statement.values({rows.status: rows.words[state]}))

    def _others(
        self, connection: Connection, keys: Sequence[Key], found: Sequence[Key]
    ) -> tuple[list[tuple[Key, Any]], list[Key]]:
        known = {encode_key(key) for key in found}
        others = [key for key in keys if encode_key(key) not in known]
        if not others:
            return [], []
        rows = self._desk.rows
        query = select(*rows.keys, rows.status).where(self._desk.keyed(others))
        with self._desk.dialect.lenient(connection):  # their words are only told
            left = [(tuple(row)[:-1], row[-1]) for row in connection.execute(query)]
        there = {encode_key(key) for key, _ in left}
        return left, [key for key in others if encode_key(key) not in there]
