"""Connecting to Redis, and what a look tells of a queue: without RQ, which takes longer to import than to look."""

from __future__ import annotations

import contextlib
from typing import Any

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry as ConnectionRetry

from nih_sched.errors import BadSetting, UnreachableRedis

SCHEMES = ("redis://", "rediss://", "unix://")
OUTAGES = (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError)  # all of them pass
# As RQ names them: a queue's list of jobs, the set of its workers, and the start of a worker's name in that.
QUEUE, WORKERS, WORKER = "rq:queue:", "rq:workers:", "rq:worker:"


def connect(url: str) -> Redis:
    """A Redis connection that has answered once.

    Raises:
        BadSetting: not a Redis address. UnreachableRedis: with the address, without its password.
    """
    connection = client(url)
    try:
        connection.ping()
    except RedisError as error:
        raise UnreachableRedis(address=address(url), reason=why(error)) from error
    return connection


def client(url: str, patience: float | None = None) -> Redis:
    """A Redis connection that hasn't been tried yet.

    Args:
        url: the address.
        patience: seconds for an answer, for those who only look; by default what a scheduler has.
    """
    if not url.startswith(SCHEMES):
        raise BadSetting(
            name="--redis-url", value="…", origin="not shown", expected=f"an URL with {', '.join(SCHEMES)}"
        )
    tcp: dict[str, Any] = {} if url.startswith("unix://") else {"socket_keepalive": True}
    try:
        return Redis.from_url(
            url,
            socket_connect_timeout=patience or 5,
            socket_timeout=patience or 10,  # a server that is frozen must not keep us from stopping
            **tcp,
            health_check_interval=30,
            retry=ConnectionRetry(ExponentialBackoff(cap=0.5, base=0.05), 0 if patience else 2),
        )
    except ValueError:
        # The error's text may quote a piece of the password.
        raise BadSetting(
            name="--redis-url", value="…", origin="not shown", expected="a Redis URL such as redis://host:6379/0"
        ) from None


def why(error: RedisError) -> str:
    """What a person may be told of an error of Redis."""
    # What a server says may quote what it was sent, AUTH's arguments too; what a socket says doesn't.
    if isinstance(error, OUTAGES) and not isinstance(error, AuthenticationError):
        return str(error)
    return f"it answered with {type(error).__name__}"


def address(url: str) -> str:
    """A Redis address that may be shown: without user, password and query."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def server_facts(connection: Redis) -> dict[str, Any]:
    """What the server says of its version, memory and persistence; of a managed one, as far as it does."""
    facts: dict[str, Any] = {}
    for section in ("server", "memory", "persistence"):
        with contextlib.suppress(ResponseError):
            facts |= connection.info(section)
    return facts


def worker_names(connection: Redis, source: str) -> list[str]:
    """The names of the RQ workers, ours or stock ones, that serve a source's queue."""
    members: Any = connection.smembers(WORKERS + source)
    found = [member.decode() if isinstance(member, bytes) else str(member) for member in members]
    return sorted(name.rpartition(WORKER)[2] for name in found)


def waiting(connection: Redis, source: str) -> int:
    """How many jobs wait in a source's queue."""
    return int(connection.llen(QUEUE + source))


def channel(source: str) -> str:
    """The Redis channel on which `PUBLISH channel 1`, by anybody, has the producers of a source look at once."""
    return f"nih_sched:bell:{source}"
