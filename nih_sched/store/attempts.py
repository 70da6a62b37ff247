"""The start of attempts, ledger and row together, guarded by the token; and what can still be taken back of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, or_, select, update
from sqlalchemy.exc import DBAPIError

from nih_sched import telemetry
from nih_sched.dialects import After, Now, quick
from nih_sched.dialects.base import reason
from nih_sched.model import Claim, Ended, Fate, Key, Outcome, StartedRow, State, Word, encode_key, show_key
from nih_sched.store import swift
from nih_sched.store.desk import FOREVER, PATIENCE, Desk
from nih_sched.store.finishes import Finishes
from nih_sched.store.leases import Hold
from nih_sched.store.records import Records

Values = dict[str, tuple[dict[str, Any], str | None]]  # by row_key: the values, or why they can't be read

FEW = 4  # claims in one job up to which they begin by one statement, where that can be done
BUSY_WAIT = 1.0  # seconds until a row that its owner has locked is tried again


class _Raced(Exception):
    """Another process started some of these claims between our look and our write."""


class _NotAtOnce(Exception):
    """Some of these claims need a closer look."""


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
        self.run = run
        self._worker = worker[:190]
        self._finishes = Finishes(desk, run, worker)
        self._records = Records(desk, run, self._worker, hold)
        self._attempts = desk.ledger.attempts

    def start(self, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        """Begin the attempts of these claims, row and ledger in one transaction; drop what may not begin.

        Dropped are claims that ended, run elsewhere or are not yet due, and rows that their owner changed or deleted.

        Raises:
            LeaseLost: nothing began.
            StaleDesk: nothing began, at this run's first start: another desk is needed.
        """
        swiftly = len(claim_ids) <= FEW and swift.fits(self._desk)
        if swiftly and (begun := self._start_swiftly(claim_ids, columns)):
            had = {row.claim.id for row in begun}
            rest = [claim_id for claim_id in dict.fromkeys(claim_ids) if claim_id not in had]
            return begun + (self._start_carefully(rest, columns) if rest else [])
        return self._start_carefully(claim_ids, columns)

    def _start_swiftly(self, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        try:
            return swift.begin(self._desk, self._records, claim_ids, columns)
        except Exception as error:  # whatever the user's table may refuse, a value that can't be read
            if isinstance(error, DBAPIError) and self._desk.dialect.is_transient(error):
                raise
            return []  # if it has begun all the same, it is this run's

    def start_together(
        self, claim_ids: Sequence[int], columns: Sequence[str], *, patience: float = PATIENCE
    ) -> list[StartedRow] | None:
        """As start(), in one transaction; None where that can't be done, and nothing began.

        Args:
            claim_ids: which.
            columns: what is read of their rows.
            patience: seconds for which a database that is away is tried.

        Raises:
            DBAPIError: as of a row that the database refuses to start; LeaseLost, StaleDesk.
        """
        words = self._desk.rows.words
        if self._desk.dialect.returns_updates and words[State.QUEUED] != words[State.STARTED]:
            with contextlib.suppress(_NotAtOnce):
                return self._desk.transact(
                    lambda c: self._start_at_once(c, claim_ids, columns), patience=patience, hardly=True
                )
        with contextlib.suppress(_Raced):
            return self._desk.transact(lambda c: self._start(c, claim_ids, columns), patience=patience)
        return None

    def _start_carefully(self, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        try:
            if (begun := self.start_together(claim_ids, columns)) is not None:
                return begun
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
        claims, ours_already, _ = self._records.find(connection, [claim_id])
        if not claims or (not ours_already and not self._records.mark(connection, [claim_id])):
            return []
        (claim,) = claims.values()
        self._records.renew_lease(connection)
        return [StartedRow(claim, {}, refused=f"the database refused to start the row: {why}")]

    def _start_at_once(
        self, connection: Connection, claim_ids: Sequence[int], columns: Sequence[str]
    ) -> list[StartedRow]:
        """Nearly always all is as it was left by the claim: each record is written once, and nothing looked at twice.

        Raises:
            _NotAtOnce: some rows aren't as they were claimed, or are locked; what was written is to be rolled back.
        """
        desk, rows = self._desk, self._desk.rows
        queued, started = rows.words[State.QUEUED], rows.words[State.STARTED]
        # Ledger before rows, as nobody else: who holds a row that we wait for, and waits for us, sees us give up first.
        claims, _, begun = self._records.begin(connection, claim_ids)
        if begun or len(claims) < len(claim_ids):
            raise _NotAtOnce
        statement = desk.once(
            f"start {columns}",
            lambda: (
                update(rows.table)
                .where(desk.given_rows, desk.dialect.is_word(rows.status, queued))
                .values({rows.status: started})
                .returning(*rows.keys, *rows.labelled(columns))
            ),
        )
        these = desk.given_keys([claim.key for claim in claims.values()])
        try:
            found = quick.run(connection, statement, these).rows
        except Exception as error:  # an owner's lock, a value that can't be read, whatever the user's table may refuse
            raise _NotAtOnce from error
        width = len(rows.keys)
        values = {encode_key(tuple(row[:width])): dict(zip(columns, row[width:], strict=True)) for row in found}
        if values.keys() != claims.keys() or len(found) != len(claims):
            raise _NotAtOnce
        return [StartedRow(claim, values[k]) for k, claim in claims.items()]

    def _start(self, connection: Connection, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        rows = self._desk.rows
        claims, ours_already, begun = self._records.find(connection, claim_ids)
        if not claims:
            return []
        found, busy, values = self._lock_rows(connection, {k: claim.key for k, claim in claims.items()}, columns)
        resumed = busy & ours_already  # begun before its owner took the lock, in a transaction whose answer was lost
        busy -= resumed
        self._put_off(connection, [claims[k].id for k in busy])
        startable = self._startable(claims, found, resumed, begun)
        if len(startable) < len(claims):
            fit = busy.union(startable)
            self._cancel(connection, [claim for k, claim in claims.items() if k not in fit])
        if not startable:
            return []
        fresh = [claims[k].id for k in startable if k not in ours_already]
        if fresh and self._records.mark(connection, fresh) != len(fresh):
            raise _Raced
        started = rows.words[State.STARTED]
        # A write that changes nothing would still fire the user's triggers.
        unchanged = {word for word in set(found.values()) if _same(word, started)}
        changing = [k for k in startable if k not in resumed and found[k] not in unchanged]
        if changing:
            these = self._desk.keyed([claims[k].key for k in changing])
            connection.execute(update(rows.table).where(these).values({rows.status: started}))
        if values and rows.status.name in columns:  # the row is given as it is now
            for k in changing:
                values[k][0][rows.status.name] = started
        if values is None or resumed:
            values = self._read(connection, [claims[k].key for k in startable], columns)
        self._records.renew_lease(connection)
        gone: tuple[dict[str, Any], str] = {}, "its owner has deleted the row"  # only one that was resumed can be
        return [StartedRow(claims[k], *values.get(k, gone)) for k in startable]

    def _startable(
        self, claims: dict[str, Claim], found: dict[str, Any], resumed: set[str], begun: set[str]
    ) -> Sequence[str]:
        first, again = self._expected(again=False), self._expected(again=True)
        fit = {word for word in set(found.values()) if _is_one(word, first)}
        fit_again = fit | {word for word in set(found.values()) if _is_one(word, again)}
        nothing = object()
        return [k for k in claims if k in resumed or found.get(k, nothing) in (fit_again if k in begun else fit)]

    def _lock_rows(
        self, connection: Connection, keys: dict[str, Key], columns: Sequence[str]
    ) -> tuple[dict[str, Any], set[str], Values | None]:
        """Lock rows, and read them at once where that can be done.

        Returns:
            {row_key: word} of those that are ours now; which ones somebody else has locked; and what was read of them,
            None if it must be read anew, row by row.
        """
        rows = self._desk.rows
        query = select(*rows.keys, rows.status.label("nih_sched_status"), *rows.labelled(columns))
        query = self._desk.dialect.lock(query.where(self._desk.keyed(keys.values())), rows.table, skip_locked=True)
        width = len(rows.keys)
        values: Values | None = {}
        try:
            result = connection.execute(query).all()
        except Exception as error:  # as in _read()
            if isinstance(error, DBAPIError) and not self._desk.dialect.is_about_a_value(error):
                raise
            plain, values = query.with_only_columns(*rows.keys, rows.status), None
            result = connection.execute(self._desk.dialect.lock(plain, rows.table, skip_locked=True)).all()
        row_keys = [encode_key(tuple(row[:width])) for row in result]
        found = {k: row[width] for k, row in zip(row_keys, result, strict=True)}
        if values is not None:
            for k, row in zip(row_keys, result, strict=True):
                values[k] = dict(zip(columns, row[width + 1 :], strict=True)), None
        if found.keys() >= keys.keys():
            return found, set(), values
        missing = [key for k, key in keys.items() if k not in found]
        there = connection.execute(select(*rows.keys).where(self._desk.keyed(missing)))
        return found, {encode_key(tuple(row)) for row in there}, values

    def _put_off(self, connection: Connection, claim_ids: Sequence[int]) -> None:
        # A worker must not wait for an owner's transaction: the rows behind would wait with it.
        if claim_ids:
            statement = update(self._attempts).where(self._attempts.c.id.in_(claim_ids), self._records.may_start)
            connection.execute(statement.values(due_at=After(BUSY_WAIT), sent_at=None))

    def _expected(self, *, again: bool) -> set[Word]:
        words = self._desk.rows.words
        return {words[State.QUEUED], words[State.RETRYING]} | ({words[State.STARTED]} if again else set())

    def _cancel(self, connection: Connection, claims: Sequence[Claim]) -> None:
        attempts = self._attempts
        for claim in claims:
            closed = connection.execute(
                update(attempts)
                .where(attempts.c.id == claim.id, attempts.c.open_key.is_not(None), attempts.c.finished_at.is_(None))
                # One of this run's has begun unheard: its row hasn't run.
                .where(or_(attempts.c.started_at.is_(None), attempts.c.run == self.run))
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

    def _read(self, connection: Connection, keys: Sequence[Key], columns: Sequence[str]) -> Values:
        """One row's unreadable value harms no other row."""
        rows = self._desk.rows
        if not columns:
            return {encode_key(key): ({}, None) for key in keys}
        query = select(*rows.keys, *rows.labelled(columns)).where(self._desk.keyed(keys))
        width = len(rows.keys)
        try:
            result = connection.execute(query).all()
        except Exception as error:  # a value that SQLAlchemy or the driver can't turn into Python: user data, any error
            if isinstance(error, DBAPIError) and not self._desk.dialect.is_about_a_value(error):
                raise
            if len(keys) == 1:
                why = re.sub(r"\bnih_sched_(\d+)\b", lambda label: columns[int(label[1])], reason(error), count=1)
                return {encode_key(keys[0]): ({}, f"a column's value can't be read: {why}")}
            return {k: v for key in keys for k, v in self._read(connection, [key], columns).items()}
        return {encode_key(tuple(row[:width])): (dict(zip(columns, row[width:], strict=True)), None) for row in result}

    def take_back(self, claims: Sequence[Claim], *, patience: float = FOREVER) -> list[int]:
        """Have claims of this run not have begun, after all: those whose rows nobody has begun to run.

        Args:
            claims: which.
            patience: seconds for which a database that is away, or a locked row, is waited for.

        Returns:
            the ids of those that were still this run's.
        """
        return self._desk.transact(lambda c: self._take_back(c, claims), patience=patience)

    def _take_back(self, connection: Connection, claims: Sequence[Claim]) -> list[int]:
        attempts, rows = self._attempts, self._desk.rows
        mine = self._desk.among(attempts.c.id, [claim.id for claim in claims])
        mine &= (attempts.c.run == self.run) & attempts.c.finished_at.is_(None)
        ids = connection.execute(self._desk.dialect.lock(select(attempts.c.id).where(mine), attempts)).scalars().all()
        ours = set(ids)
        if not ours:
            return []
        nobody = {"started_at": None, "run": None, "worker": None, "lease": None}
        connection.execute(update(attempts).where(mine).values(nobody))
        for state, again in ((State.QUEUED, False), (State.RETRYING, True)):
            keys = [claim.key for claim in claims if claim.id in ours and (claim.attempt > 1) == again]
            if keys and rows.words[state] != rows.words[State.STARTED]:
                begun = self._desk.dialect.is_word(rows.status, rows.words[State.STARTED])
                statement = update(rows.table).where(self._desk.keyed(keys), begun)
                connection.execute(statement.values({rows.status: rows.words[state]}))
        return list(ids)

    def finish(self, ended: Sequence[Ended], *, patience: float = FOREVER) -> list[Fate | None]:
        """Write how attempts ended, as Finishes does."""
        return self._finishes.write(ended, patience=patience)


def _same(found: Any, word: Word) -> bool:
    # CHAR(n) comes back padded with blanks.
    return bool(found == word) or (isinstance(found, str) and isinstance(word, str) and found.rstrip(" ") == word)


def _is_one(found: Any, words: set[Word]) -> bool:
    return found in words or any(_same(found, word) for word in words)
