"""Marks for those who ask why nothing moves: that Redis is away, that workers don't serve a source."""

from __future__ import annotations

from sqlalchemy import update

from nih_sched.dialects import Now
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.tally import Tally

UNSERVED = "unserved"  # in nih_sched_counts: claims given back by workers that don't serve their source


def note_redis(desk: Desk, *, away: bool) -> None:
    """Note since when a producer of the source finds Redis away; or that it is there."""
    c = desk.ledger.sources.c
    statement = update(desk.ledger.sources).where(c.name == desk.source.name)
    if away:
        statement = statement.where(c.redis_lost_at.is_(None)).values(redis_lost_at=Now())
    else:
        statement = statement.where(c.redis_lost_at.is_not(None)).values(redis_lost_at=None)
    desk.transact(lambda connection: connection.execute(statement), patience=1.0)


def note_unserved(desk: Desk, count: int) -> None:
    """Count claims that a worker has given back because it doesn't serve their source."""
    Tally(desk).add({UNSERVED: count}, patience=PATIENCE)
