"""The ledger's records of the claims that one run begins: which may, and that they have, under which lease."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Float, bindparam, func, null, or_, select, update
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import After, Now, quick
from nih_sched.model import Claim, StartedRow, State, decode_key
from nih_sched.store.desk import Desk
from nih_sched.store.leases import Hold
from nih_sched.store.pauses import unpaused

HEAD = 9  # columns of a record's head

Found = tuple[dict[str, Claim], set[str], set[str]]  # claims by row_key; this run's already; whose rows may be begun


class LeaseLost(Exception):
    """Others take this horse for dead: it may begin nothing."""


class StaleDesk(Exception):
    """Since this desk was made its source's producer has written other facts down, other words perhaps."""


class Records:
    """Their statements, each made once for a source.

    Args:
        desk: the source's.
        run: made up for this start; it guards what it begins.
        worker: who begins them.
        hold: the horse's on its lease, if it has one.
    """

    def __init__(self, desk: Desk, run: str, worker: str, hold: Hold | None) -> None:
        self._desk = desk
        self._attempts = desk.ledger.attempts
        self.hold = hold
        lease = hold.lease if hold else None
        self._ours = {"its_run": run, "its_worker": worker, "its_lease": lease}
        self._run = run
        self._is_current = False  # whether the desk's facts have been held against what is written down

    @property
    def may_start(self) -> ColumnElement[bool]:
        """Of a record: its attempt hasn't begun, and needn't wait; its source isn't paused."""
        return self._waits_for_none & unpaused(self._desk.ledger, self._desk.source.name)

    @property
    def _waits_for_none(self) -> ColumnElement[bool]:
        c = self._attempts.c
        return c.open_key.is_not(None) & c.started_at.is_(None) & or_(c.due_at.is_(None), c.due_at <= Now())

    @property
    def may_start_as_known(self) -> ColumnElement[bool]:
        """The same, and this desk's facts are what is written down: in one look."""
        if not self._desk.facts:
            return self.may_start
        c = self._desk.ledger.sources.c
        facts = select(c.facts).where(c.name == self._desk.source.name, c.paused_at.is_(None)).scalar_subquery()
        return self._waits_for_none & (facts == bindparam("its_facts"))

    def find(self, connection: Connection, claim_ids: Sequence[int]) -> Found:
        """Those of these claims that may start, or that this run has started.

        Raises:
            StaleDesk: at the run's first start.
        """
        query = self._desk.once("heads", self._make_find)
        return self._by_key(quick.run(connection, query, self.given(claim_ids, known=True)).rows)

    def begin(self, connection: Connection, claim_ids: Sequence[int]) -> Found:
        """Mark those that may start as begun, and return them; for databases whose UPDATE can return.

        The lease is renewed as well: with the rest, where one statement can do both.

        Raises:
            StaleDesk: at the run's first start. LeaseLost. What was written is to be rolled back.
        """
        if self.hold is None or not self._desk.dialect.writes_in_ctes:
            statement = self._desk.once(
                "begin", lambda: self._make_begun().returning(*self._head_and_current(), null())
            )
            self.renew_lease(connection)
            return self._by_key(quick.run(connection, statement, self.given(claim_ids, known=True)).rows)
        statement = self._desk.once("begin and renew", self._make_begin)
        heads = quick.run(connection, statement, self.given(claim_ids, known=True, leased=True)).rows
        if heads and not heads[0][-1]:
            raise LeaseLost
        return self._by_key(heads)

    def begun(self, found: Sequence[Any], columns: Sequence[str]) -> list[StartedRow]:
        """What has begun, from a record's head and its row's columns each; for what has seen that all is as known."""
        claims, *_ = self._by_key([(*row[:HEAD], True, None) for row in found])
        now = {name: self._desk.rows.words[State.STARTED] for name in columns if name == self._desk.rows.status.name}
        values = [dict(zip(columns, row[HEAD:], strict=True)) | now for row in found]
        return [StartedRow(*pair) for pair in zip(claims.values(), values, strict=True)]

    def mark(self, connection: Connection, claim_ids: Sequence[int]) -> int:
        """Mark claims as begun; return of how many that could be done."""
        statement = self._desk.once("mark", self._make_begun)
        return quick.run(connection, statement, self.given(claim_ids)).touched

    def renew_lease(self, connection: Connection) -> None:
        """Last of all where rows are waited for: the keeper mustn't wait for a lock that we hold meanwhile.

        Raises:
            LeaseLost: others have declared it dead.
        """
        hold = self.hold
        if hold is None:
            return
        statement = self._desk.once("renew", self.make_renew)
        if not quick.run(connection, statement, _horse_of(hold)).touched:
            raise LeaseLost

    def make_renew(self) -> Any:
        """The statement that renews the lease; its parameters are in given(..., leased=True)."""
        return update(self._desk.ledger.leases).where(self.holds_lease).values(self.renewed)

    @property
    def holds_lease(self) -> ColumnElement[bool]:
        """Of a lease: it is this run's, and alive."""
        c = self._desk.ledger.leases.c
        return (c.id == bindparam("its_lease")) & c.died.is_(None)

    @property
    def renewed(self) -> dict[Any, Any]:
        """What is written into it."""
        c = self._desk.ledger.leases.c
        return {
            c.beat: c.beat + 1,
            c.horse: bindparam("its_horse"),
            c.horse_born: bindparam("its_born"),
            c.lease_until: After(bindparam("its_seconds", type_=Float())),
        }

    def given(self, claim_ids: Sequence[int], *, known: bool = False, leased: bool = False) -> dict[str, Any]:
        """Parameters of statements on these claims.

        Args:
            claim_ids: which.
            known: with the facts that this desk knows.
            leased: with those of make_renew(), where there is a lease.
        """
        facts = {"its_facts": self._desk.facts} if known else {}
        return {**self._ours, "its_ids": claim_ids, **facts, **(_horse_of(self.hold) if leased and self.hold else {})}

    @property
    def head(self) -> list[Any]:
        """What a claim is made from."""
        c = self._attempts.c
        return [c.id, c.row_key, c.rq_id, c.attempt, c.failures, c.tries, c.interruptions, c.first_claim, c.earlier]

    def _head_and_current(self) -> list[Any]:
        """What _by_key() needs of a record; the last column: whether this desk's facts are what is written down."""
        sources = self._desk.ledger.sources
        facts = select(sources.c.facts).where(sources.c.name == self._desk.source.name).scalar_subquery()
        return [*self.head, (facts == bindparam("its_facts")).label("is_current")]

    @property
    def these(self) -> ColumnElement[bool]:
        """The records of given() that are this source's."""
        # A job names source and claims: that they belong together is known here alone.
        ids = self._desk.dialect.given(self._attempts.c.id, "its_ids")
        return ids & (self._attempts.c.source == self._desk.source.name)

    def _make_find(self) -> Any:
        c = self._attempts.c
        # What this very run started, in a transaction whose answer was lost, is still its own.
        ours = (c.run == bindparam("its_run")) & c.finished_at.is_(None)
        return select(*self._head_and_current(), c.run).where(self.these, or_(self.may_start, ours))

    def _make_begin(self) -> Any:
        renewed = self.make_renew().returning(self._desk.ledger.leases.c.id).cte("renewed")
        times = select(func.count()).select_from(renewed).scalar_subquery().label("renewed")
        return self._make_begun().add_cte(renewed).returning(*self._head_and_current(), null(), times)

    def _make_begun(self) -> Any:
        return self.make_mark(self.these, self.may_start)

    def make_mark(self, *these: ColumnElement[bool]) -> Any:
        """The statement that marks records as begun; all its parameters but those of `these` are in given()."""
        given: dict[str, Any] = {name: bindparam(f"its_{name}") for name in ("run", "worker", "lease")}
        return update(self._attempts).where(*these).values(started_at=Now(), due_at=None, **given)

    def _by_key(self, heads: Sequence[Any]) -> Found:
        if heads and self._desk.facts and not self._is_current:
            if not heads[0][9]:
                raise StaleDesk
            self._is_current = True  # a job goes on by the words by which it began
        claims: dict[str, Claim] = {}
        ours_already, again = set[str](), set[str]()
        for claim_id, row_key, rq_id, attempt, failures, tries, interruptions, first, earlier, _, its_run, *_ in heads:
            key, times = decode_key(row_key), interruptions or 0
            claims[row_key] = Claim(claim_id, key, rq_id, attempt, failures, tries, times, first, earlier or 0)
            if its_run == self._run:
                ours_already.add(row_key)
            elif attempt > 1:  # before a retry the row is still Started where the database refused to set it back
                again.add(row_key)
        return claims, ours_already, ours_already | again


def _horse_of(hold: Hold) -> dict[str, Any]:
    return {
        "its_lease": hold.lease,
        "its_horse": hold.horse,
        "its_born": hold.horse_born,
        "its_seconds": hold.seconds,
    }
