"""ring(): have the producers look at once, from a program that has just committed a row."""

from __future__ import annotations

import functools
import os
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from nih_sched import embedded
from nih_sched.dialects.connect import identity
from nih_sched.errors import BadSetting
from nih_sched.redis_client import channel
from nih_sched.settings import Settings, load
from nih_sched.store import open_desk

PATIENCE = 1.0  # seconds: whoever rings has something else to do

# What a source's name depends on.
NAMING = ("database_url", "table", "status_key", "primary_key", "ready_val", "where", "ledger_schema")
_names: dict[tuple[Any, ...], str] = {}


def ring(settings: Settings | None = None, *, source: str | None = None) -> bool:
    """Have the producers of a source look for ready rows at once. Call it after the COMMIT, not before.

    It is a hint: the row runs without it, at the next poll. Where no Redis answers it does nothing.

    Args:
        settings: what the scheduler has; by default what it would read from environment and config file here.
        source: what `scheduler source` prints; else the database is asked, once for each process.

    Returns:
        whether a producer has heard it.

    Raises:
        NihError: the settings name no table that could be served.
    """
    chosen = settings or load({}, os.environ)
    url = chosen.redis_url or embedded.find(identity(chosen.database_url))
    if url is None:
        return False
    name = source or _name(chosen)
    try:
        return name is not None and bool(_client(url).publish(channel(name), "1"))
    except RedisError:
        return False


def _name(settings: Settings) -> str | None:
    facts = tuple(getattr(settings, name) for name in NAMING)
    if facts not in _names:
        desk = open_desk(settings, create_ledger=False)
        try:
            if not desk.is_made:
                return None  # no scheduler has been here yet
            _names[facts] = desk.source.name
        finally:
            desk.close()
    return _names[facts]


@functools.lru_cache(maxsize=16)
def _client(url: str) -> Redis:
    # Once more for a connection that has died meanwhile; its pool is safe in threads, and notices a fork.
    retry = Retry(NoBackoff(), 1)
    try:
        return Redis.from_url(url, socket_connect_timeout=PATIENCE, socket_timeout=PATIENCE, retry=retry)
    except ValueError:  # its text may quote a piece of the password
        expected = "a Redis URL such as redis://host:6379/0"
        raise BadSetting(name="--redis-url", value="…", origin="not shown", expected=expected) from None
