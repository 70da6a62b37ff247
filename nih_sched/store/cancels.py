"""Whether a row that runs, or is about to, has been cancelled: asked by whoever can stop it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import case, func, literal, select

from nih_sched.model import Claim, State, encode_key
from nih_sched.store.desk import Desk
from nih_sched.store.running import claim_of, heads


class Cancels:
    """Short statements, each by primary keys."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @property
    def can_be(self) -> bool:
        """Whether the cancelled word tells a cancelled row from one on its way."""
        words = self._desk.rows.words
        return words[State.CANCELLED] not in {words[one] for one in (State.QUEUED, State.STARTED, State.RETRYING)}

    def running(self, claim_id: int) -> tuple[Claim, str] | None:
        """A claim whose attempt runs, with the run that guards it; None when it doesn't."""
        attempts = self._desk.ledger.attempts
        begun = attempts.c.started_at.is_not(None) & attempts.c.finished_at.is_(None)
        query = select(*heads(attempts)).where(attempts.c.id == claim_id, begun)
        head = self._desk.read(lambda c: c.execute(query).first())
        return None if head is None else (claim_of(head), head.run)

    def is_cancelled(self, claim: Claim) -> bool:
        """Whether the claim's row has the cancelled word now, whoever wrote it."""
        rows = self._desk.rows
        word = self._desk.dialect.is_word(rows.status, rows.words[State.CANCELLED])
        statement = self._desk.once("is cancelled", lambda: select(rows.keys[0]).where(self._desk.given_rows, word))
        given = self._desk.given_keys([claim.key])
        return self._desk.read(lambda c: c.execute(statement, given).first()) is not None

    def unwanted(self, claims: Sequence[Claim]) -> set[int]:
        """The ids of those of these claims whose rows have the cancelled word now, or are gone."""
        count, statement = self._desk.once("unwanted", self._make_wanted)
        given = self._desk.given_keys([claim.key for claim in claims])
        if self._desk.read(lambda c: c.execute(count, given).scalar_one()) == len(claims):
            return set()  # nearly always
        found = {encode_key(claim.key): claim.id for claim in claims}
        wanted = self._desk.read(lambda c: c.execute(statement, given).all())
        return set(found.values()) - {
            found.get(encode_key(tuple(key)), 0) for *key, cancelled in wanted if not cancelled
        }

    def _make_wanted(self) -> tuple[Any, Any]:
        rows = self._desk.rows
        word = self._desk.dialect.is_word(rows.status, rows.words[State.CANCELLED])
        cancelled = case((word, literal(1)), else_=literal(0)) if self.can_be else literal(0)
        these = self._desk.given_rows
        count = select(func.count()).select_from(rows.table).where(these, cancelled == literal(0))
        return count, select(*rows.keys, cancelled).where(these)
