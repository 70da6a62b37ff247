"""Marks for those who ask why nothing moves: that Redis is away, that workers don't serve a source."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from nih_sched import clock
from nih_sched.dialects import Now
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.history import utc

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
    counts = desk.ledger.counts
    c = counts.c

    def write(connection: Connection) -> None:
        minute = int(utc(connection.execute(select(Now())).scalar_one()).timestamp()) // 60
        its = {"source": desk.source.name, "minute": minute, "name": UNSERVED}
        same = (c.source == desk.source.name) & (c.minute == minute) & (c.name == UNSERVED)
        if not connection.execute(update(counts).where(same).values(value=c.value + count)).rowcount:
            connection.execute(insert(counts).values(**its, value=count))

    until = clock.monotonic() + PATIENCE
    while True:
        try:
            desk.transact(write)
            return
        except IntegrityError:  # another worker was first in this minute
            if clock.monotonic() > until:
                raise
