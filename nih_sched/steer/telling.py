"""What Redis is told of a change: a help, not needed. Imported only where there is something to tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis import Redis


def ring(connection: Redis, source: str) -> None:
    """Have the source's producers look at once; without it they look by themselves, some seconds later."""
    from nih_sched import redis_client  # noqa: PLC0415 - see above

    with contextlib.suppress(*redis_client.OUTAGES):
        connection.publish(redis_client.channel(source), "1")


def withdraw(connection: Redis, source: str, rq_ids: Callable[[], Iterable[str]]) -> None:
    """Take RQ jobs that carry nothing any more; without it they are refused later."""
    from nih_sched import broker  # noqa: PLC0415 - RQ takes as long to import as all the rest of a command

    with contextlib.suppress(*broker.OUTAGES):
        broker.withdraw(broker.queue_of(connection, source), rq_ids())
