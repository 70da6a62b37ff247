"""Pause and resume: nothing new starts anywhere, what runs ends as it would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nih_sched import telemetry
from nih_sched.errors import BadLedger, NoSuchSource
from nih_sched.steer.telling import ring, withdraw
from nih_sched.store import Claims, Desk, source_desk, source_facts
from nih_sched.store.desk import register
from nih_sched.store.pauses import Pauses

if TYPE_CHECKING:
    from redis import Redis

ALL = "all"


def pause(
    desk: Desk, by: str, reason: str | None = None, *, source: str | None = None, connection: Redis | None = None
) -> list[str]:
    """Let no row start until resume(); what was claimed and hasn't begun goes back to ready.

    Args:
        desk: a source's.
        by: who asks for it, for those who wonder later.
        reason: why.
        source: another source's name, or "all"; by default the desk's own.
        connection: Redis, from which the jobs of what is given back are taken; without it they are refused later.

    Returns:
        the names of the sources that weren't paused before.

    Raises:
        NoSuchSource: no scheduler has ever served one of this name.
    """
    names = _chosen(desk, source)
    if source is None and desk.source.name not in Pauses(desk).sources():
        register(desk)  # paused before it was ever served
    fresh = Pauses(desk).pause(names, by, reason)
    for name in fresh:
        telemetry.emit("paused", source=name, by=by, reason=reason or "no reason given")
    for name in names:  # of one that was paused already, too: a claim may have been on its way
        _give_back(desk, name, connection)
    return fresh


def resume(desk: Desk, by: str, *, source: str | None = None, connection: Redis | None = None) -> list[str]:
    """End the pause; return the names of the sources that had one. Arguments and errors as of pause()."""
    names = Pauses(desk).resume(_chosen(desk, source))
    for name in names:
        telemetry.emit("resumed", source=name, by=by)
        if connection is not None:
            ring(connection, name)
    return names


def _chosen(desk: Desk, source: str | None) -> Sequence[str]:
    if source is None:
        return [desk.source.name]
    known = Pauses(desk).sources()
    if source == ALL:
        return known
    if source not in known:
        hint = f" There are: {', '.join(known)}." if known else " No scheduler has run here yet."
        raise NoSuchSource(source=source, hint=hint)
    return [source]


def _give_back(desk: Desk, name: str, connection: Redis | None) -> None:
    if name != desk.source.name:
        try:
            desk = source_desk(desk.engine, desk.ledger, name, source_facts(desk.engine, desk.ledger, name) or "{}")
        except BadLedger:
            return  # its table is gone: nothing is left to give back
    void = Claims(desk, "", 0).give_all_back()
    if connection is not None and void:
        withdraw(connection, name, lambda: void)
