"""What tells of new rows without being asked: this, the base, does nothing; each database's own is a subclass."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy import Column, Table

from nih_sched.model import Word


class Watch:
    """A database's own way to tell of new rows, on a connection of its own. It never raises: without it we poll."""

    live = False  # whether it has shown that it tells of each row that becomes ready
    sure = True  # whether it tells of rows of ours; False: of any change
    every: float | None = None  # seconds between two calls of rung(), where no file descriptor says when
    brisk = False  # set by who waits: whether that may be more often

    def fileno(self) -> int | None:
        """What becomes readable when it tells; None: nothing does."""
        return None

    def tend(self) -> None:
        """Begin, or begin again after a loss; called now and then, it keeps its own time."""

    def rung(self) -> bool:
        """Whether it has told of anything since the last call; also once after a loss, which may have swallowed it."""
        return False

    def close(self) -> None:
        """End it; tend() begins anew."""


def channel_of(schema: str | None, table: Table, status: Column[Any], ready: Word) -> str:
    """The name under which rows of this table that become ready are told of: the same wherever it is asked for."""
    facts = json.dumps([schema, table.schema, table.name, status.name, str(ready)])
    return f"nih_sched_{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
