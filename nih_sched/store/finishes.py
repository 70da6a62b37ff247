"""The finish of attempts: ledger and row together, guarded by the token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Float, bindparam, insert, or_, select, update
from sqlalchemy.exc import DBAPIError

from nih_sched import clock, telemetry
from nih_sched.dialects import After, Now
from nih_sched.dialects.base import End, reason
from nih_sched.model import (
    DONE,
    FAILURES,
    Ended,
    Fate,
    Key,
    Outcome,
    State,
    Trail,
    Word,
    clean_text,
    decide,
    open_key,
    show_key,
)
from nih_sched.store.desk import FOREVER, Desk


class Finishes:
    """The statements that end attempts.

    Args:
        desk: the source's.
        run: what the attempts were begun with.
        worker: who writes.
    """

    def __init__(self, desk: Desk, run: str, worker: str) -> None:
        self._desk = desk
        self._run = run
        self._worker = worker[:190]
        self._attempts = desk.ledger.attempts

    def write(self, ended: Sequence[Ended], *, patience: float = FOREVER, again: bool = False) -> list[Fate | None]:
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
            return self._desk.transact(lambda c: self._finish_all(c, ended, stretch), patience=patience)
        except DBAPIError as error:
            if self._desk.dialect.is_transient(error):
                raise
            if len(ended) > 1:
                return [fate for one in ended for fate in self.write([one], patience=patience)]
            if self._attempts.name in (error.statement or "") and self._desk.dialect.is_refusal(error):
                raise  # without the row's new state, too, it may be accepted by now: but the row has done nothing wrong
            if not self._desk.dialect.is_refusal(error) and not again:
                # User code may have broken our connection: what a new one says, counts.
                self._desk.dialect.forget_connections(self._desk.engine)
                return self.write(ended, patience=patience, again=True)
            telemetry.emit("state_refused", key=show_key(ended[0].claim.key), reason=reason(error))
            return [
                self._desk.transact(lambda c: self._finish(c, ended[0], stretch, with_row=False), patience=patience)
            ]

    def _finish_all(self, connection: Connection, ended: Sequence[Ended], stretch: float) -> list[Fate | None]:
        plain = [one for one in ended if one.outcome is DONE and not one.claim.interruptions]
        fates = self._finish_done(connection, plain) if len(plain) > 1 else {}
        return [fates.get(one.claim.id) or self._finish(connection, one, stretch, with_row=True) for one in ended]

    def _finish_done(self, connection: Connection, ended: Sequence[Ended]) -> dict[int, Fate | None]:
        """Rows that are simply done, all at once; {claim id: fate} of those that this run still had."""
        now = clock.boot()
        ends = [
            End(
                one.claim.id,
                one.seconds,
                _age(one, now) or 0.0,
                None if one.result is None else clean_text(one.result),
            )
            for one in ended
        ]
        nothing = dict.fromkeys(("open_key", "kept_key", "reason", "traceback"))
        values = {"outcome": Outcome.DONE.value, "ended_by": self._worker, "interruptions": 0, **nothing}
        closed = self._desk.dialect.close_claims(connection, self._attempts, self._run, values, ends)
        ours = [one for one in ended if one.claim.id in closed]
        if ours:
            self._set_word(connection, [one.claim.key for one in ours], State.DONE)
        if trails := [{"its_id": one.claim.id, **_trail(one, "new_")} for one in ours if one.trail is not None]:
            connection.execute(self._desk.once("trails", self._make_trails), trails)
        return {one.claim.id: decide(one, self._desk.source) for one in ours}

    def _make_trails(self) -> Any:
        given: dict[str, Any] = {name: bindparam(f"new_{name}") for name in Trail._fields}
        return update(self._attempts).where(self._attempts.c.id == bindparam("its_id")).values(**given)

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
            self._set_word(connection, [ended.claim.key], fate.state)
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

    def _set_word(self, connection: Connection, keys: Sequence[Key], state: State) -> None:
        # Only over words of ours: what the owner wrote meanwhile stays. The ledger's token has been checked before.
        rows = self._desk.rows
        ours = {rows.words[one] for one in (State.STARTED, State.QUEUED, State.RETRYING)} - {rows.words[state]}
        if ours:
            statement = self._desk.once(f"finish {state}", lambda: self._make_set_word(ours, rows.words[state]))
            connection.execute(statement, self._desk.given_keys(keys))

    def _make_set_word(self, ours: set[Word], word: Word) -> Any:
        rows = self._desk.rows
        over = or_(*(self._desk.dialect.is_word(rows.status, one) for one in ours))
        return update(rows.table).where(self._desk.given_rows, over).values({rows.status: word})

    def _mine(self, claim_id: int) -> Any:
        attempts = self._attempts
        return (attempts.c.id == claim_id) & (attempts.c.run == self._run) & attempts.c.finished_at.is_(None)

    def _run_of(self, claim_id: int) -> Any:
        attempts = self._attempts
        return or_(attempts.c.id == claim_id, attempts.c.of_claim == claim_id) & (attempts.c.run == self._run)

    def _close(self, connection: Connection, ended: Ended, fate: Fate, kept_key: str | None) -> bool:
        told = {"open_key": None, "kept_key": kept_key, **self._told(ended, fate)}
        values = {f"new_{name}": value for name, value in told.items()}
        values |= {"its_id": ended.claim.id, "its_run": self._run}
        age = _age(ended, clock.boot())
        timed = age is not None
        if timed:
            values |= {"its_age": age, "its_seconds": ended.seconds}
        statement = self._desk.once(f"close {timed}", lambda: self._make_close(list(told), timed=timed))
        return bool(connection.execute(statement, values).rowcount)

    def _make_close(self, names: Sequence[str], *, timed: bool) -> Any:
        c = self._attempts.c
        mine = (c.id == bindparam("its_id")) & (c.run == bindparam("its_run")) & c.finished_at.is_(None)
        age, seconds = bindparam("its_age", type_=Float()), bindparam("its_seconds", type_=Float())
        given: dict[str, Any] = {name: bindparam(f"new_{name}") for name in names}
        return update(self._attempts).where(mine).values(**given, **_times(age, seconds) if timed else _ended_now())

    def _told(self, ended: Ended, fate: Fate) -> dict[str, Any]:
        last = fate.state is State.FAILED and ended.outcome in (Outcome.INTERRUPTED, Outcome.LOST)
        why = f"interrupted {fate.interruptions} times in a row (--max-interruptions); at last: " if last else ""
        return {
            "outcome": (Outcome.FAILED if last else ended.outcome).value,
            "reason": clean_text(f"{why}{ended.reason or 'no reason was given'}" if why else ended.reason),
            "traceback": clean_text(ended.traceback),
            "error": _group(ended, last=last),
            "result": clean_text(ended.result),
            "seconds": ended.seconds,
            "failures": fate.failures,
            "interruptions": fate.interruptions,
            "ended_by": self._worker,
            **_trail(ended),
        }

    def _go_on(self, connection: Connection, ended: Ended, fate: Fate) -> bool:
        attempts = self._attempts
        query = select(attempts).where(self._mine(ended.claim.id))
        head = connection.execute(self._desk.dialect.lock(query, attempts)).mappings().one_or_none()
        if head is None:
            return False
        past = {name: value for name, value in head.items() if name != "id"}
        past |= {"of_claim": head["id"], "open_key": None, **self._told(ended, fate)}
        age = _age(ended, clock.boot())
        times = _ended_now() if age is None else _times(age, ended.seconds)
        connection.execute(insert(attempts).values({**past, **times}))
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


def _group(ended: Ended, *, last: bool) -> str | None:
    """By what a failure is grouped where the horse couldn't say: it died, or the database refused the row."""
    if last:
        return "interrupted too often"
    if ended.error is None and ended.outcome in FAILURES:
        text = f"{ended.outcome.value}: {(ended.reason or '').partition(',')[0]}"
    else:
        text = ended.error or ""
    return (clean_text(text) or "")[:190] or None


def _trail(ended: Ended, prefix: str = "") -> dict[str, Any]:
    trail = ended.trail or Trail()
    facts = {"output": clean_text(trail.output), "cpu_seconds": trail.cpu_seconds, "peak_memory": trail.peak_memory}
    return {f"{prefix}{name}": value for name, value in facts.items()}


def _age(ended: Ended, now: float) -> float | None:
    """Seconds since it ended, by the boot clock; None where nobody knows."""
    return None if ended.at is None else max(0.0, now - ended.at)


def _times(age: Any, seconds: Any) -> dict[str, Any]:
    """When an attempt began and ended, by the database's clock; both in seconds."""
    return {"started_at": After(-age - seconds), "finished_at": After(-age)}


def _ended_now() -> dict[str, Any]:
    """What died tells no times: it began with its batch."""
    return {"finished_at": Now()}
