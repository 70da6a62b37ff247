"""Requeue and cancel: in chunks, all or none of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from nih_sched import telemetry
from nih_sched.dialects.base import reason
from nih_sched.errors import ChunkRefused
from nih_sched.model import Key, show_key
from nih_sched.steer.telling import ring, withdraw
from nih_sched.store import Claims, Desk
from nih_sched.store.claims import CHUNK
from nih_sched.store.steering import Steered, Steering

if TYPE_CHECKING:
    from redis import Redis

NAMED = 10  # rows of a chunk that its event names


@dataclass
class Result:
    """What became of the rows that were named."""

    changed: int = 0
    running: int = 0  # of those: they run, and are stopped by their workers within some seconds
    left: list[tuple[Key, Any]] = field(default_factory=list)  # the first ones not changed, with their words
    unfit: int = 0  # how many weren't changed, for the word that they have
    missing: list[Key] = field(default_factory=list)  # the first ones that aren't there
    absent: int = 0  # how many aren't there

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {
            "changed": self.changed,
            "running": self.running,
            "left": [{"key": show_key(key), "word": word} for key, word in self.left],
            "unfit": self.unfit,
            "missing": list(map(show_key, self.missing)),
            "absent": self.absent,
        }

    def note(self, one: Steered) -> None:
        """Count another chunk."""
        self.changed += len(one.changed)
        self.running += len(one.running)
        self.unfit += len(one.left)
        self.absent += len(one.missing)
        self.left += one.left[: NAMED - len(self.left)]
        self.missing += one.missing[: NAMED - len(self.missing)]


def requeue(desk: Desk, keys: Iterable[Key], by: str, *, connection: Redis | None = None) -> Result:
    """Set rows that are failed, cancelled or done back to ready: they run again, with all their tries.

    Args:
        desk: the source's.
        keys: which rows.
        by: who asks for it.
        connection: Redis, by which producers hear of it at once; without it they find the rows at their next look.

    Raises:
        ChunkRefused: the database refused a chunk, of which no row was changed; those before it were.
    """
    result = Result()
    for one in _chunks(keys, Steering(desk, by).requeue, result):
        if one.changed:
            telemetry.emit("requeued", by=by, count=len(one.changed), keys=_named(one.changed))
    if result.changed and connection is not None:
        ring(connection, desk.source.name)
    return result


def cancel(desk: Desk, keys: Iterable[Key], by: str, *, connection: Redis | None = None) -> Result:
    """Have rows that haven't begun never begin, and those that run be stopped within 5 s, with all their processes.

    Args:
        desk: the source's.
        keys: which rows; those that have ended are left alone.
        by: who asks for it.
        connection: Redis, from which jobs that carry nothing any more are taken; without it they are refused later.

    Raises:
        CantCancel: the cancelled word is also that of a row on its way.
        ChunkRefused: as of requeue().
    """
    result = Result()
    for one in _chunks(keys, Steering(desk, by).cancel, result):
        if one.changed:
            facts = {"count": len(one.changed), "running": len(one.running), "keys": _named(one.changed)}
            telemetry.emit("cancelled_rows", by=by, **facts)
        if one.void and connection is not None:
            withdraw(connection, desk.source.name, partial(Claims(desk, "", 0).carrying_nothing, one.void))
    return result


def _chunks(keys: Iterable[Key], change: Callable[[Sequence[Key]], Steered], result: Result) -> Iterator[Steered]:
    stream = iter(keys)
    while chunk := list(islice(stream, CHUNK)):
        try:
            one = change(chunk)
        except DBAPIError as error:
            raise ChunkRefused(count=len(chunk), done=result.changed, reason=reason(error)) from error
        result.note(one)
        yield one


def _named(keys: Sequence[Key]) -> str:
    return ", ".join(map(show_key, keys[:NAMED])) + (", …" if len(keys) > NAMED else "")
