"""scheduler pause, resume."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
from typing import TYPE_CHECKING

import click

from nih_sched import steer
from nih_sched.cli import listen
from nih_sched.cli.look import redis_url_of
from nih_sched.cli.options import TABLE, settings_options
from nih_sched.errors import UnreachableRedis
from nih_sched.settings import Settings
from nih_sched.store import open_desk

if TYPE_CHECKING:
    from redis import Redis

STEER = (*TABLE, "redis_url", "log_format", "quiet")
_source = click.option("--source", metavar="NAME", help="Another source's name, or all.  [default: the settings' own]")


@click.command()
@settings_options(STEER)
@_source
@click.option("--reason", metavar="TEXT", help="Why, for those who wonder.")
def pause(settings: Settings, source: str | None, reason: str | None) -> None:
    """Start no more rows anywhere until `scheduler resume`; running rows finish. It survives restarts."""
    listen(settings)
    desk = open_desk(settings)
    names = steer.pause(desk, who(), reason, source=source, connection=redis_of(settings))
    click.echo("\n".join(f"Paused {name}. Type: scheduler resume" for name in names) or "It was paused before.")
    desk.close()


@click.command()
@settings_options(STEER)
@_source
def resume(settings: Settings, source: str | None) -> None:
    """End a pause."""
    listen(settings)
    desk = open_desk(settings)
    names = steer.resume(desk, who(), source=source, connection=redis_of(settings))
    click.echo("\n".join(f"Resumed {name}." for name in names) or "Nothing was paused.")
    desk.close()


def who() -> str:
    """Who types this command."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def redis_of(settings: Settings) -> Redis | None:
    """The scheduler's Redis, as far as it can be reached: what is told there is a help, not needed."""
    url = redis_url_of(settings)
    if url is None:
        return None
    from nih_sched import redis_client  # noqa: PLC0415 - slow to import

    with contextlib.suppress(UnreachableRedis):
        return redis_client.connect(url)
    return None
