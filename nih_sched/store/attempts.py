"""The start and the finish of attempts: ledger and row together, guarded by the token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Column, Connection, insert, or_, select, update
from sqlalchemy.exc import DBAPIError

from nih_sched import telemetry
from nih_sched.dialects import After, Now
from nih_sched.dialects.base import reason
from nih_sched.model import (
    Claim,
    Ended,
    Fate,
    Key,
    Outcome,
    StartedRow,
    State,
    Word,
    clean_text,
    decide,
    decode_key,
    encode_key,
    show_key,
)
from nih_sched.store.desk import FOREVER, Desk


class _Raced(Exception):
    """Another process started some of these claims between our look and our write."""


class Attempts:
    """The horse's statements. `run` is its own made-up word for this start; it guards what it started."""

    def __init__(self, desk: Desk, run: str, worker: str) -> None:
        self._desk = desk
        self._run = run
        self._worker = worker[:190]
        self._attempts = desk.ledger.attempts

    def start(self, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        """Begin the attempts of these claims, row and ledger in one transaction; drop what may not begin.

        Dropped are claims that ended, run elsewhere or are not yet due, and rows that their owner changed or deleted.
        """
        try:
            return self._desk.transact(lambda c: self._start(c, claim_ids, columns))
        except _Raced:
            if len(claim_ids) == 1:
                return []
        except DBAPIError as error:
            if self._desk.dialect.is_transient(error):
                raise
            if len(claim_ids) == 1:
                why = reason(error)
                return self._desk.transact(lambda c: self._start_refused(c, claim_ids[0], why))
        return [row for claim_id in dict.fromkeys(claim_ids) for row in self.start([claim_id], columns)]

    def _start_refused(self, connection: Connection, claim_id: int, why: str) -> list[StartedRow]:
        # The attempt begins in the ledger alone, so that it can fail there, be counted, and end.
        head = self._heads(connection, [claim_id])
        if not head or (head[0].run != self._run and not self._mark(connection, [claim_id])):
            return []
        return [StartedRow(_claim(head[0]), {}, refused=f"the database refused to start the row: {why}")]

    def _start(self, connection: Connection, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        rows = self._desk.rows
        heads = self._heads(connection, claim_ids)
        claims = {head.row_key: _claim(head) for head in heads}
        if not claims:
            return []
        ours_already = {head.row_key for head in heads if head.run == self._run}
        # Before a retry the row is still Started where the database refused to set it back.
        begun = ours_already | {head.row_key for head in heads if head.attempt > 1}
        found = self._lock_rows(connection, [claim.key for claim in claims.values()])
        startable = [k for k in claims if k in found and self._expects(found[k], again=k in begun)]
        self._cancel(connection, [claim for k, claim in claims.items() if k not in startable])
        if not startable:
            return []
        fresh = [claims[k].id for k in startable if k not in ours_already]
        if fresh:
            marked = self._mark(connection, fresh)
            if marked != len(fresh):
                raise _Raced
        keys = [claims[k].key for k in startable]
        started = rows.words[State.STARTED]
        # A write that changes nothing would still fire the user's triggers.
        changing = [claims[k].key for k in startable if not _same(found[k], started)]
        if changing:
            connection.execute(update(rows.table).where(rows.keyed(changing)).values({rows.status: started}))
        values = self._read(connection, keys, columns)
        return [StartedRow(claims[k], *values[k]) for k in startable if k in values]

    def _may_start(self) -> Any:
        c = self._attempts.c
        return c.open_key.is_not(None) & c.started_at.is_(None) & or_(c.due_at.is_(None), c.due_at <= Now())

    def _heads(self, connection: Connection, claim_ids: Sequence[int]) -> Sequence[Any]:
        c = self._attempts.c
        # A job names source and claims: that they belong together is known here alone.
        query = select(c.id, c.row_key, c.rq_id, c.attempt, c.failures, c.tries, c.run)
        query = query.where(c.source == self._desk.source.name)
        # What this very run started, in a transaction whose answer was lost, is still its own.
        ours = (c.run == self._run) & c.finished_at.is_(None)
        return connection.execute(query.where(c.id.in_(claim_ids), or_(self._may_start(), ours))).all()

    def _mark(self, connection: Connection, claim_ids: Sequence[int]) -> int:
        started = {"started_at": Now(), "run": self._run, "worker": self._worker, "due_at": None}
        statement = update(self._attempts).where(self._attempts.c.id.in_(claim_ids), self._may_start())
        return connection.execute(statement.values(started)).rowcount

    def _lock_rows(self, connection: Connection, keys: Sequence[Key]) -> dict[str, Any]:
        rows = self._desk.rows
        query = select(*rows.keys, rows.status.label("nih_sched_status")).where(rows.keyed(keys))
        result = connection.execute(self._desk.dialect.lock(query, rows.table))
        return {encode_key(tuple(row)[:-1]): row[-1] for row in result}

    def _expects(self, word: Any, *, again: bool) -> bool:
        words = self._desk.rows.words
        expected = {words[State.QUEUED], words[State.RETRYING]} | ({words[State.STARTED]} if again else set())
        return any(_same(word, one) for one in expected)

    def _cancel(self, connection: Connection, claims: Sequence[Claim]) -> None:
        attempts = self._attempts
        for claim in claims:
            closed = connection.execute(
                update(attempts)
                .where(attempts.c.id == claim.id, attempts.c.open_key.is_not(None), attempts.c.started_at.is_(None))
                .values(
                    open_key=None,
                    due_at=None,
                    finished_at=Now(),
                    outcome=Outcome.CANCELLED.value,
                    reason="its owner changed or deleted the row before it began",
                )
            ).rowcount
            if closed:
                telemetry.emit("cancelled", key=show_key(claim.key), expected=self._desk.rows.words[State.QUEUED])

    def _read(
        self, connection: Connection, keys: Sequence[Key], columns: Sequence[str]
    ) -> dict[str, tuple[dict[str, Any], str | None]]:
        """{row_key: (values, why they can't be read)}; one row's unreadable value harms no other row."""
        rows = self._desk.rows
        if not columns:
            return {encode_key(key): ({}, None) for key in keys}
        wanted: list[Column[Any]] = [rows.table.columns[name] for name in columns]
        query = select(*rows.keys, *(column.label(f"nih_sched_{i}") for i, column in enumerate(wanted)))
        width = len(rows.keys)
        try:
            result = connection.execute(query.where(rows.keyed(keys))).all()
        except Exception as error:  # a value that SQLAlchemy or the driver can't turn into Python: user data, any error
            if isinstance(error, DBAPIError) and not self._desk.dialect.is_about_a_value(error):
                raise
            if len(keys) == 1:
                return {encode_key(keys[0]): ({}, f"a column's value can't be read: {reason(error)}")}
            return {k: v for key in keys for k, v in self._read(connection, [key], columns).items()}
        return {
            encode_key(tuple(row)[:width]): (dict(zip(columns, tuple(row)[width:], strict=True)), None)
            for row in result
        }

    def finish(self, ended: Sequence[Ended]) -> list[Fate | None]:
        """Write how attempts ended, each with its row's new state; None where a newer word stands against it.

        A row whose state its owner changed meanwhile keeps the owner's. When the database refuses a row's new state,
        the outcome is kept in the ledger all the same.
        """
        stretch = random.random()  # noqa: S311 - spreads retries, hides nothing
        try:
            return self._desk.transact(
                lambda c: [self._finish(c, one, stretch, with_row=True) for one in ended], patience=FOREVER
            )
        except DBAPIError as error:
            if len(ended) > 1:
                return [fate for one in ended for fate in self.finish([one])]
            telemetry.emit("state_refused", key=show_key(ended[0].claim.key), reason=reason(error))
            return [self._desk.transact(lambda c: self._finish(c, ended[0], stretch, with_row=False), patience=FOREVER)]

    def _finish(self, connection: Connection, ended: Ended, stretch: float, *, with_row: bool) -> Fate | None:
        fate = decide(ended, self._desk.source.backoff, stretch)
        write = self._go_on if fate.claim_goes_on else self._close
        if not write(connection, ended, fate):
            if self._is_written(connection, ended.claim.id):
                return fate
            telemetry.emit("stale", key=show_key(ended.claim.key))
            return None
        if with_row:
            self._set_word(connection, ended.claim.key, fate.state)
        return fate

    def _set_word(self, connection: Connection, key: Key, state: State) -> None:
        # Only over words of ours: what the owner wrote meanwhile stays. The ledger's token has been checked before.
        rows = self._desk.rows
        ours = {rows.words[one] for one in (State.STARTED, State.QUEUED, State.RETRYING)} - {rows.words[state]}
        if ours:
            over = or_(*(self._desk.dialect.is_word(rows.status, word) for word in ours))
            statement = update(rows.table).where(rows.keyed([key]), over)
            connection.execute(statement.values({rows.status: rows.words[state]}))

    def _mine(self, claim_id: int) -> Any:
        attempts = self._attempts
        return (attempts.c.id == claim_id) & (attempts.c.run == self._run) & attempts.c.finished_at.is_(None)

    def _close(self, connection: Connection, ended: Ended, fate: Fate) -> bool:
        statement = update(self._attempts).where(self._mine(ended.claim.id))
        values = {"open_key": None, "failures": fate.failures, "finished_at": Now(), **_told(ended)}
        return bool(connection.execute(statement.values(values)).rowcount)

    def _go_on(self, connection: Connection, ended: Ended, fate: Fate) -> bool:
        attempts = self._attempts
        query = select(attempts).where(self._mine(ended.claim.id))
        head = connection.execute(self._desk.dialect.lock(query, attempts)).mappings().one_or_none()
        if head is None:
            return False
        past = {name: value for name, value in head.items() if name != "id"}
        past |= {"of_claim": head["id"], "open_key": None, "failures": fate.failures, **_told(ended)}
        connection.execute(insert(attempts).values({**past, "finished_at": Now()}))
        connection.execute(
            update(attempts)
            .where(attempts.c.id == head["id"])
            .values(
                attempt=head["attempt"] + 1,
                failures=fate.failures,
                due_at=After(fate.delay or 0.0),
                started_at=None,
                run=None,
                worker=None,
            )
        )
        return True

    def _is_written(self, connection: Connection, claim_id: int) -> bool:
        # We may be writing again what was committed although the answer got lost.
        attempts = self._attempts
        return (
            connection.execute(
                select(attempts.c.id)
                .where(or_(attempts.c.id == claim_id, attempts.c.of_claim == claim_id))
                .where(attempts.c.run == self._run, attempts.c.finished_at.is_not(None))
            ).first()
            is not None
        )


def running(desk: Desk, claim_ids: Sequence[int], worker: str) -> list[tuple[Claim, str]]:
    """Which of these claims are running under `worker`, each with the run that guards it."""
    attempts = desk.ledger.attempts
    query = (
        select(attempts)
        .where(attempts.c.id.in_(claim_ids), attempts.c.worker == worker[:190])
        .where(attempts.c.started_at.is_not(None), attempts.c.finished_at.is_(None))
    )
    look: Callable[[Connection], Any] = lambda c: c.execute(query).all()  # noqa: E731
    return [(_claim(r), r.run) for r in desk.transact(look, patience=FOREVER)]


def _claim(head: Any) -> Claim:
    return Claim(head.id, decode_key(head.row_key), head.rq_id, head.attempt, head.failures, head.tries)


def _told(ended: Ended) -> dict[str, Any]:
    return {
        "outcome": ended.outcome.value,
        "reason": clean_text(ended.reason),
        "traceback": clean_text(ended.traceback),
        "result": clean_text(ended.result),
        "seconds": ended.seconds,
    }


def _same(found: Any, word: Word) -> bool:
    # CHAR(n) comes back padded with blanks.
    return bool(found == word) or (isinstance(found, str) and isinstance(word, str) and found.rstrip(" ") == word)
