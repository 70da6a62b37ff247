"""What --preload breaks in a scheduler, to show that the checker sees it. Nothing but tests imports this."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import true, update

from nih_sched import broker
from nih_sched.model import State
from nih_sched.reconciler import watch
from nih_sched.store import attempts, finishes, records


def no_fence_in_finish() -> None:
    """Outcomes are written whoever brings them, over whatever the row's owner has written."""

    def set_word(self: Any, connection: Any, keys: Any, state: State) -> None:
        rows = self._desk.rows
        connection.execute(update(rows.table).where(rows.keyed(keys)).values({rows.status: rows.words[state]}))

    def mine(self: Any, claim_id: int) -> Any:
        return self._attempts.c.id == claim_id

    write = finishes.Finishes.write

    def late(self: Any, ended: Any, **options: Any) -> Any:
        time.sleep(1.0)  # so that owners find rows that are about to end: with the fence that is harmless
        return write(self, ended, **options)

    finishes.Finishes.write = late  # type: ignore[method-assign]
    finishes.Finishes._set_word = set_word  # type: ignore[method-assign]
    finishes.Finishes._mine = mine  # type: ignore[method-assign]


def sent_twice() -> None:
    """Redis delivers every job twice: harmless, as long as the start has its fence."""
    send = broker.send

    def twice(queue: Any, sends: Any) -> None:
        send(queue, sends)
        send(queue, [broker.Send(broker.new_rq_id(), one.claim_ids, one.intervals, one.timeout) for one in sends])

    broker.send = twice


def no_fence_in_start() -> None:
    """Each job twice, and whoever gets one begins it."""
    sent_twice()
    records.Records.may_start = property(lambda self: true())  # type: ignore[assignment,method-assign]
    attempts._is_one = lambda found, words: True


def no_lease_check() -> None:
    """Whoever holds a lease is taken for dead, without waiting for its end."""
    see = watch.Standstill.see

    def impatient(self: Any, now: float, things: Any, longest_gap: float) -> dict[Any, float]:
        return {thing: seconds + 3600.0 for thing, seconds in see(self, now, things, longest_gap).items()}

    watch.Standstill.see = impatient  # type: ignore[method-assign]
