"""The start and the finish of attempts: ledger and row together, guarded by the token."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
    encode_key,
    open_key,
    show_key,
)
from nih_sched.store.desk import FOREVER, Desk
from nih_sched.store.leases import Hold
from nih_sched.store.running import claim_of

BUSY_WAIT = 1.0  # seconds until a row that its owner has locked is tried again


class LeaseLost(Exception):
    """Others take this horse for dead: it may begin nothing."""


class _Raced(Exception):
    """Another process started some of these claims between our look and our write."""


class Attempts:
    """The statements that begin and end attempts.

    Args:
        desk: the source's.
        run: made up at each start; it guards what that start began.
        worker: who writes.
        hold: the horse's on its lease; without one, as in a test's own process, nobody can tell that it died.
    """

    def __init__(self, desk: Desk, run: str, worker: str, hold: Hold | None = None) -> None:
        self._desk = desk
        self._run = run
        self._worker = worker[:190]
        self._hold = hold
        self._attempts = desk.ledger.attempts

    def start(self, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        """Begin the attempts of these claims, row and ledger in one transaction; drop what may not begin.

        Dropped are claims that ended, run elsewhere or are not yet due, and rows that their owner changed or deleted.

        Raises:
            LeaseLost: nothing began.
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
        self._renew_lease(connection)
        return [StartedRow(claim_of(head[0]), {}, refused=f"the database refused to start the row: {why}")]

    def _start(self, connection: Connection, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        rows = self._desk.rows
        heads = self._heads(connection, claim_ids)
        claims = {head.row_key: claim_of(head) for head in heads}
        if not claims:
            return []
        ours_already = {head.row_key for head in heads if head.run == self._run}
        # Before a retry the row is still Started where the database refused to set it back.
        begun = ours_already | {head.row_key for head in heads if head.attempt > 1}
        found, busy = self._lock_rows(connection, {k: claim.key for k, claim in claims.items()})
        resumed = busy & ours_already  # begun before its owner took the lock, in a transaction whose answer was lost
        busy -= resumed
        self._put_off(connection, [claims[k].id for k in busy])
        startable = [k for k in claims if k in resumed or (k in found and self._expects(found[k], again=k in begun))]
        self._cancel(connection, [claim for k, claim in claims.items() if k not in startable and k not in busy])
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
        changing = [claims[k].key for k in startable if k not in resumed and not _same(found[k], started)]
        if changing:
            connection.execute(update(rows.table).where(rows.keyed(changing)).values({rows.status: started}))
        values = self._read(connection, keys, columns)
        self._renew_lease(connection)
        gone: tuple[dict[str, Any], str] = {}, "its owner has deleted the row"  # only one that was resumed can be
        return [StartedRow(claims[k], *values.get(k, gone)) for k in startable]

    def _renew_lease(self, connection: Connection) -> None:
        # Last of all: the keeper mustn't wait for a lock that we hold while we wait for a row.
        hold = self._hold
        if hold is None:
            return
        leases = self._desk.ledger.leases
        statement = update(leases).where(leases.c.id == hold.lease, leases.c.died.is_(None))
        values = {"beat": leases.c.beat + 1, "horse": hold.horse, "horse_born": hold.horse_born}
        if not connection.execute(statement.values(values | {"lease_until": After(hold.seconds)})).rowcount:
            raise LeaseLost

    def _may_start(self) -> Any:
        c = self._attempts.c
        return c.open_key.is_not(None) & c.started_at.is_(None) & or_(c.due_at.is_(None), c.due_at <= Now())

    def _heads(self, connection: Connection, claim_ids: Sequence[int]) -> Sequence[Any]:
        c = self._attempts.c
        # A job names source and claims: that they belong together is known here alone.
        query = select(c.id, c.row_key, c.rq_id, c.attempt, c.failures, c.tries, c.interruptions)
        query = query.add_columns(c.first_claim, c.earlier, c.run)
        query = query.where(c.source == self._desk.source.name)
        # What this very run started, in a transaction whose answer was lost, is still its own.
        ours = (c.run == self._run) & c.finished_at.is_(None)
        return connection.execute(query.where(c.id.in_(claim_ids), or_(self._may_start(), ours))).all()

    def _mark(self, connection: Connection, claim_ids: Sequence[int]) -> int:
        started = {"started_at": Now(), "run": self._run, "worker": self._worker, "due_at": None}
        started["lease"] = self._hold.lease if self._hold else None
        statement = update(self._attempts).where(self._attempts.c.id.in_(claim_ids), self._may_start())
        return connection.execute(statement.values(started)).rowcount

    def _lock_rows(self, connection: Connection, keys: dict[str, Key]) -> tuple[dict[str, Any], set[str]]:
        """{row_key: word} of those that are ours now, and which ones somebody else has locked."""
        rows = self._desk.rows
        query = select(*rows.keys, rows.status.label("nih_sched_status")).where(rows.keyed(list(keys.values())))
        result = connection.execute(self._desk.dialect.lock(query, rows.table, skip_locked=True))
        found = {encode_key(tuple(row)[:-1]): row[-1] for row in result}
        missing = [key for k, key in keys.items() if k not in found]
        if not missing:
            return found, set()
        there = connection.execute(select(*rows.keys).where(rows.keyed(missing)))
        return found, {encode_key(tuple(row)) for row in there}

    def _put_off(self, connection: Connection, claim_ids: Sequence[int]) -> None:
        # A worker must not wait for an owner's transaction: the rows behind would wait with it.
        if claim_ids:
            statement = update(self._attempts).where(self._attempts.c.id.in_(claim_ids), self._may_start())
            connection.execute(statement.values(due_at=After(BUSY_WAIT), sent_at=None))

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

    def finish(self, ended: Sequence[Ended], *, patience: float = FOREVER, again: bool = False) -> list[Fate | None]:
        """Write how attempts ended, each with its row's new state; None where a newer word stands against it.

        A row whose state its owner changed meanwhile keeps the owner's. When the database refuses a row's new state,
        the outcome is kept in the ledger all the same.

        Args:
            ended: the attempts.
            patience: seconds for which a database that is away, or a locked row, is waited for.
            again: whether this is a second try on a new connection.

        Raises:
            DBAPIError: the ledger itself refuses the outcome: it must be kept elsewhere.
        """
        stretch = random.random()  # noqa: S311 - spreads retries, hides nothing
        try:
            return self._desk.transact(
                lambda c: [self._finish(c, one, stretch, with_row=True) for one in ended], patience=patience
            )
        except DBAPIError as error:
            if self._desk.dialect.is_transient(error):
                raise
            if len(ended) > 1:
                return [fate for one in ended for fate in self.finish([one], patience=patience)]
            if not self._desk.dialect.is_refusal(error) and not again:
                # User code may have broken our connection: what a new one says, counts.
                self._desk.dialect.forget_connections(self._desk.engine)
                return self.finish(ended, patience=patience, again=True)
            telemetry.emit("state_refused", key=show_key(ended[0].claim.key), reason=reason(error))
            return [
                self._desk.transact(lambda c: self._finish(c, ended[0], stretch, with_row=False), patience=patience)
            ]

    def _finish(self, connection: Connection, ended: Ended, stretch: float, *, with_row: bool) -> Fate | None:
        fate = decide(ended, self._desk.source, stretch)
        kept = (fate.interruptions > 0 and fate.state is State.READY) or not with_row
        written = (
            self._go_on(connection, ended, fate)
            if fate.claim_goes_on
            else self._close(connection, ended, fate, self._kept_key(ended) if kept else None)
        )
        if not written:
            if self._is_written(connection, ended.claim.id):
                return fate
            self._note_late(connection, ended)
            telemetry.emit("stale", key=show_key(ended.claim.key))
            return None
        if ended.claim.interruptions:
            self._forget_earlier(connection, ended)
        if with_row:
            self._set_word(connection, ended.claim.key, fate.state)
        return fate

    def _kept_key(self, ended: Ended) -> str:
        return open_key(self._desk.rows.name, ended.claim.key)

    def _forget_earlier(self, connection: Connection, ended: Ended) -> None:
        # The interruptions before this claim: it has counted them, or its end has broken their row.
        attempts = self._attempts
        earlier = (attempts.c.kept_key == self._kept_key(ended)) & (attempts.c.id != ended.claim.id)
        connection.execute(update(attempts).where(earlier).values(kept_key=None))

    def _note_late(self, connection: Connection, ended: Ended) -> None:
        connection.execute(
            update(self._attempts)
            .where(self._run_of(ended.claim.id), self._attempts.c.finished_at.is_not(None))
            .where(self._attempts.c.worker == self._worker)  # a rescuer that comes too late brings nothing
            .values(late=ended.outcome.value)
        )

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

    def _run_of(self, claim_id: int) -> Any:
        attempts = self._attempts
        return or_(attempts.c.id == claim_id, attempts.c.of_claim == claim_id) & (attempts.c.run == self._run)

    def _close(self, connection: Connection, ended: Ended, fate: Fate, kept_key: str | None) -> bool:
        statement = update(self._attempts).where(self._mine(ended.claim.id))
        values = {"open_key": None, "kept_key": kept_key, "finished_at": Now(), **self._told(ended, fate)}
        return bool(connection.execute(statement.values(values)).rowcount)

    def _told(self, ended: Ended, fate: Fate) -> dict[str, Any]:
        last = fate.state is State.FAILED and ended.outcome in (Outcome.INTERRUPTED, Outcome.LOST)
        why = f"interrupted {fate.interruptions} times in a row (--max-interruptions); at last: " if last else ""
        return {
            "outcome": (Outcome.FAILED if last else ended.outcome).value,
            "reason": clean_text(f"{why}{ended.reason or 'no reason was given'}" if why else ended.reason),
            "traceback": clean_text(ended.traceback),
            "result": clean_text(ended.result),
            "seconds": ended.seconds,
            "failures": fate.failures,
            "interruptions": fate.interruptions,
            "ended_by": self._worker,
        }

    def _go_on(self, connection: Connection, ended: Ended, fate: Fate) -> bool:
        attempts = self._attempts
        query = select(attempts).where(self._mine(ended.claim.id))
        head = connection.execute(self._desk.dialect.lock(query, attempts)).mappings().one_or_none()
        if head is None:
            return False
        past = {name: value for name, value in head.items() if name != "id"}
        past |= {"of_claim": head["id"], "open_key": None, **self._told(ended, fate)}
        connection.execute(insert(attempts).values({**past, "finished_at": Now()}))
        connection.execute(
            update(attempts)
            .where(attempts.c.id == head["id"])
            .values(
                attempt=head["attempt"] + 1,
                failures=fate.failures,
                interruptions=fate.interruptions,
                due_at=After(fate.delay or 0.0),
                sent_at=None,
                started_at=None,
                run=None,
                worker=None,
                lease=None,
            )
        )
        return True

    def _is_written(self, connection: Connection, claim_id: int) -> bool:
        # We may be writing again what was committed although the answer got lost.
        c = self._attempts.c
        ours = self._run_of(claim_id) & c.finished_at.is_not(None) & (c.ended_by == self._worker)
        return connection.execute(select(c.id).where(ours)).first() is not None


def _same(found: Any, word: Word) -> bool:
    # CHAR(n) comes back padded with blanks.
    return bool(found == word) or (isinstance(found, str) and isinstance(word, str) and found.rstrip(" ") == word)
