"""What Redis tells: whether it answers, and who listens to a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nih_sched import clock
from nih_sched.errors import NihError

PATIENCE = 1.0  # seconds for Redis to answer


@dataclass(frozen=True)
class RedisSeen:
    """Redis as a look has found it."""

    address: str
    error: str | None  # why it can't be used; None: it answers
    milliseconds: float | None
    workers: tuple[str, ...]  # RQ workers that serve the source's queue, stock ones too
    producers: int  # that listen for new rows of the source
    queued: int  # jobs that wait in the queue

    @property
    def answers(self) -> bool:
        """Whether it does."""
        return self.error is None

    @property
    def sentence(self) -> str:
        """In words."""
        if self.error is not None:
            return f"unreachable, {self.address}: {self.error}"
        return f"reachable, {self.address}"

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {
            "address": self.address,
            "reachable": self.answers,
            "error": self.error,
            "milliseconds": self.milliseconds,
            "workers": list(self.workers),
            "producers": self.producers,
            "queued": self.queued,
        }


def look(url: str | None, source: str) -> RedisSeen:
    """Ask Redis.

    Args:
        url: its address; None: no Redis is named, and no embedded one runs here.
        source: whose queue.
    """
    if url is None:
        return _lost("embedded", "no scheduler runs on this machine, and none is named by --redis-url")
    from redis.exceptions import RedisError  # noqa: PLC0415 - slow to import, and not needed to look at a row

    from nih_sched import redis_client  # noqa: PLC0415

    shown = redis_client.address(url)
    try:
        connection = redis_client.client(url, patience=PATIENCE)
    except NihError as error:
        return _lost(shown, str(error))
    try:
        began = clock.monotonic()
        connection.ping()
        took = (clock.monotonic() - began) * 1000
        workers = tuple(redis_client.worker_names(connection, source))
        ((_, producers),) = connection.pubsub_numsub(redis_client.channel(source))
        return RedisSeen(shown, None, took, workers, int(producers), redis_client.waiting(connection, source))
    except RedisError as error:
        return _lost(shown, redis_client.why(error))
    finally:
        connection.close()


def _lost(address: str, why: str) -> RedisSeen:
    return RedisSeen(address, why.rstrip("."), None, (), 0, 0)
