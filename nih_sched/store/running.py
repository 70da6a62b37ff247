"""Which attempts are running, under whom: what a worker's death, or a lease's end, leaves to be ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Table, or_, select

from nih_sched.model import Claim, decode_key
from nih_sched.store.desk import FOREVER, Desk


def running(
    desk: Desk, claim_ids: Sequence[int], worker: str, patience: float | None = None
) -> list[tuple[Claim, str]]:
    """Which of these claims are running under `worker`, each with the run that guards it.

    Args:
        desk: the source's.
        claim_ids: which.
        worker: its name.
        patience: seconds for which a database that is away is tried; None: until it is back.
    """
    attempts = desk.ledger.attempts
    query = (
        select(*heads(attempts))
        .where(desk.among(attempts.c.id, claim_ids), attempts.c.worker == worker[:190])
        .where(attempts.c.started_at.is_not(None), attempts.c.finished_at.is_(None))
    )
    look: Callable[[Connection], Any] = lambda c: c.execute(query).all()  # noqa: E731
    return [(claim_of(r), r.run) for r in desk.transact(look, patience=FOREVER if patience is None else patience)]


def orphaned(desk: Desk, dead: Sequence[str], limit: int) -> list[tuple[Claim, str, str]]:
    """Attempts of this source that began under these leases, or under one that is gone, and haven't ended.

    Returns:
        of each the claim, the run that guards it, and its lease.
    """
    attempts, leases = desk.ledger.attempts, desk.ledger.leases
    there = select(leases.c.id).where(leases.c.id == attempts.c.lease).exists()
    query = (
        select(*heads(attempts))
        .where(attempts.c.source == desk.source.name, attempts.c.open_key > "")  # not NULL, said for SQLite's index
        .where(attempts.c.started_at.is_not(None), attempts.c.lease.is_not(None))
        .where(or_(attempts.c.lease.in_(dead), ~there))
        .limit(limit)
    )
    return [(claim_of(r), r.run, r.lease) for r in desk.read(lambda c: c.execute(query).all())]


def heads(attempts: Table) -> list[Any]:
    """What claim_of() needs of a record, and what guards it: the texts of a record may be long."""
    names = ("id", "row_key", "rq_id", "attempt", "failures", "tries", "interruptions", "first_claim", "earlier")
    return [attempts.c[name] for name in (*names, "run", "lease")]


def claim_of(head: Any) -> Claim:
    """The claim that a record of the ledger stands for."""
    key = decode_key(head.row_key)
    counts = (head.attempt, head.failures, head.tries, head.interruptions or 0)
    return Claim(head.id, key, head.rq_id, *counts, head.first_claim, head.earlier or 0)
