"""A client of Redis that can only look: RQ forgets vanished jobs and dead workers while it lists the others."""

from __future__ import annotations

from typing import Any

import redis
from redis.client import Pipeline

# A list of what reads, not of what writes: a command that RQ takes up one day is off.
READS = frozenset(
    {
        *("PING", "TYPE", "EXISTS", "TTL", "PTTL", "TIME", "INFO", "WATCH", "UNWATCH"),
        *("GET", "MGET", "STRLEN", "HGET", "HMGET", "HGETALL", "HEXISTS", "HKEYS", "HVALS", "HLEN"),
        *("LLEN", "LRANGE", "LINDEX", "LPOS", "SMEMBERS", "SCARD", "SISMEMBER", "SMISMEMBER", "SSCAN", "SCAN"),
        *("ZCARD", "ZCOUNT", "ZRANGE", "ZREVRANGE", "ZRANGEBYSCORE", "ZREVRANGEBYSCORE", "ZSCORE", "ZMSCORE", "ZRANK"),
        *("ZSCAN", "HSCAN", "XLEN", "XRANGE", "XREVRANGE"),
    }
)
NOTHING = ("EXISTS", "")  # answers 0, as a write does that found nothing to do


class Looking(redis.Redis):
    """Sends what reads; of the rest it says that nothing was to be done."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Ask Redis, if it is a question."""
        return super().execute_command(*args, **options) if _reads(args) else 0  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        """One that can only look, too."""
        return _LookingTogether(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _LookingTogether(Pipeline):
    def execute_command(self, *args: Any, **options: Any) -> Any:
        its, options = (args, options) if _reads(args) else (NOTHING, {})  # each answer is found by its number
        return super().execute_command(*its, **options)  # type: ignore[no-untyped-call]


def _reads(args: tuple[Any, ...]) -> bool:
    return str(args[0]).upper() in READS
