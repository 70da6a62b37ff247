"""Pauses: while a source has one, no row of it starts anywhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, not_, select, update

from nih_sched.dialects import Now
from nih_sched.ledger import Ledger
from nih_sched.model import clean_text
from nih_sched.store.desk import Desk


@dataclass(frozen=True)
class Pause:
    """Who has paused a source, why, and since when by the database's clock."""

    source: str
    at: datetime
    by: str
    reason: str | None


def unpaused(ledger: Ledger, source: str) -> ColumnElement[bool]:
    """A source isn't paused: part of the very statements that claim and start."""
    c = ledger.sources.c
    return not_(exists(select(c.name).where(c.name == source, c.paused_at.is_not(None))))


class Pauses:
    """Statements on the sources of a desk's ledger, its own and others."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._sources = desk.ledger.sources

    def sources(self) -> list[str]:
        """The names of all sources that a scheduler has ever served."""
        query = select(self._sources.c.name).order_by(self._sources.c.name)
        return list(self._desk.read(lambda c: c.execute(query).scalars().all()))

    def all(self) -> list[Pause]:
        """Every pause there is, by the source's name."""
        c = self._sources.c
        query = select(c.name, c.paused_at, c.paused_by, c.pause_reason).where(c.paused_at.is_not(None))
        return [Pause(*row) for row in self._desk.read(lambda x: x.execute(query.order_by(c.name)).all())]

    def of(self, source: str) -> Pause | None:
        """A source's pause, if it has one."""
        c = self._sources.c
        query = select(c.name, c.paused_at, c.paused_by, c.pause_reason)
        row = self._desk.read(lambda x: x.execute(query.where(c.name == source, c.paused_at.is_not(None))).first())
        return Pause(*row) if row else None

    def pause(self, sources: Collection[str], by: str, reason: str | None) -> list[str]:
        """Pause these; return which of them weren't paused before. One that was keeps the pause that it has."""
        values = {"paused_at": Now(), "paused_by": by[:190], "pause_reason": clean_text(reason)}
        return self._change(sources, values, self._sources.c.paused_at.is_(None))

    def resume(self, sources: Collection[str]) -> list[str]:
        """End the pauses of these; return which of them had one."""
        nothing = dict.fromkeys(("paused_at", "paused_by", "pause_reason"))
        return self._change(sources, nothing, self._sources.c.paused_at.is_not(None))

    def _change(self, sources: Collection[str], values: dict[str, Any], fit: ColumnElement[bool]) -> list[str]:
        chosen = self._sources.c.name.in_(sources) & fit
        query = self._desk.dialect.lock(select(self._sources.c.name).where(chosen), self._sources)

        def work(connection: Connection) -> Sequence[str]:
            names = connection.execute(query).scalars().all()
            connection.execute(update(self._sources).where(self._sources.c.name.in_(names)).values(values))
            return names

        return sorted(self._desk.transact(work))
