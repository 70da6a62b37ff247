"""The bell of databases that have no NOTIFY: `nih_sched.ring`, if this version has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import servers
import sqlalchemy

import nih_sched


def found() -> Callable[..., Any] | None:
    """The function, or None."""
    ring = getattr(nih_sched, "ring", None)
    return ring if callable(ring) else None


def ringer(engine: sqlalchemy.Engine, database: servers.Database, redis_url: str) -> Callable[[], None]:
    """A call of it for the table jobs, whatever of these it wants to be told.

    Raises:
        TypeError: it wants something else.
    """
    ring = found()
    if ring is None:
        raise TypeError("nih_sched has no ring")
    known: dict[str, Any] = {
        "engine": engine,
        "bind": engine,
        "table": "jobs",
        "database_url": database.url,
        "url": database.url,
        "redis_url": redis_url,
        "settings": nih_sched.Settings(database_url=database.url, redis_url=redis_url, table="jobs"),
    }
    wanted = inspect.signature(ring).parameters.values()
    given = {one.name: known[one.name] for one in wanted if one.name in known and one.kind != one.POSITIONAL_ONLY}
    missing = [
        one.name
        for one in wanted
        if one.name not in given and one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if missing:
        raise TypeError(f"nih_sched.ring wants {', '.join(missing)}: teach bench/ring.py")
    return lambda: ring(**given)
