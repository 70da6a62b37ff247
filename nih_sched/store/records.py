"""The ledger's records of the claims that one run begins: which may, and that they have, under which lease."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Float,
    bindparam,
    cast,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import After, Now, quick
from nih_sched.dialects.base import HARD
from nih_sched.model import Claim, StartedRow, State, decode_key
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.leases import Hold
from nih_sched.store.pauses import unpaused

HEAD = 10  # columns of a record's head

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
        self._hold = hold
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
    def _may_start_as_known(self) -> ColumnElement[bool]:
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
        return self._by_key(quick.run(connection, query, self._given(claim_ids, known=True)).rows)

    def begin(self, connection: Connection, claim_ids: Sequence[int]) -> Found:
        """Mark those that may start as begun, and return them; for databases whose UPDATE can return.

        The lease is renewed as well: with the rest, where one statement can do both.

        Raises:
            StaleDesk: at the run's first start. LeaseLost. What was written is to be rolled back.
        """
        given, hold = self._given(claim_ids, known=True), self._hold
        if hold is None or not self._desk.dialect.writes_in_ctes:
            statement = self._desk.once("begin", lambda: self._make_begun().returning(*self._head(), null()))
            self.renew_lease(connection)
            return self._by_key(quick.run(connection, statement, given).rows)
        statement = self._desk.once("begin and renew", self._make_begin)
        heads = quick.run(connection, statement, given | _horse_of(hold)).rows
        if heads and not heads[0][-1]:
            raise LeaseLost
        return self._by_key(heads)

    def begin_with_rows(self, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
        """Begin those of these claims against which nothing stands, and their rows, in a transaction of its own.

        What isn't as it was claimed, what is locked, and all under a lost lease, is left alone. Where swift.fits().
        """
        if self._desk.dialect.writes_in_ctes:
            found = self._begin_in_one(claim_ids, columns)
        else:
            found = self._desk.transact(lambda c: self._begin_joined(c, claim_ids, columns), patience=PATIENCE)
        claims, *_ = self._by_key([(*row[:HEAD], None) for row in found])
        now = {name: self._desk.rows.words[State.STARTED] for name in columns if name == self._desk.rows.status.name}
        values = [dict(zip(columns, row[HEAD:], strict=True)) | now for row in found]
        return [StartedRow(*pair) for pair in zip(claims.values(), values, strict=True)]

    def _begin_in_one(self, claim_ids: Sequence[int], columns: Sequence[str]) -> Sequence[Any]:
        held = self._hold is not None
        statement = self._desk.once(f"begin with {columns}, {held}", lambda: self._make_begin_with(columns))
        given = self._given(claim_ids, known=True) | (_horse_of(self._hold) if self._hold else {})

        def begin() -> Sequence[Any]:
            try:
                return self._desk.read(lambda c: quick.run(c, statement, given).rows)
            except DBAPIError as error:
                if not self._desk.dialect.gave_up(error):
                    raise
                return ()  # a trigger of the owner's waits, say: then the lease is renewed last of all

        return self._desk.insist(begin, patience=PATIENCE)

    def _begin_joined(self, connection: Connection, claim_ids: Sequence[int], columns: Sequence[str]) -> Sequence[Any]:
        desk = self._desk
        fit = desk.once(f"fit with {columns}", lambda: self._make_fit(columns))
        found = quick.run(connection, fit, self._given(claim_ids, known=True)).rows
        if found:
            these = {"its_ids": [row[0] for row in found], **desk.given_keys([decode_key(row[1]) for row in found])}
            quick.run(connection, desk.once("begin joined", self._make_joined), {**self._ours, **these})
            self.renew_lease(connection)
        return found

    def _make_fit(self, columns: Sequence[str]) -> Any:
        rows = self._desk.rows
        *head, _ = self._head()
        queued = self._desk.dialect.is_word(rows.status, rows.words[State.QUEUED])
        facts = [*head, literal_column("1"), *rows.labelled(columns)]
        fit = select(*facts).select_from(self._attempts.join(rows.table, self._is_its_row))
        fit = fit.where(self._these(), self._may_start_as_known, queued)
        # Whatever it believes of a small table: what it reads, it locks.
        fit = fit.prefix_with("STRAIGHT_JOIN").with_hint(rows.table, "FORCE INDEX (PRIMARY)")
        return self._desk.dialect.lock(fit, rows.table, skip_locked=True)

    @property
    def _is_its_row(self) -> ColumnElement[bool]:
        (key,) = self._desk.rows.keys
        c = self._attempts.c
        return key == cast(func.substr(c.row_key, 2, func.char_length(c.row_key) - 2), BigInteger())

    def _make_joined(self) -> Any:
        rows = self._desk.rows
        mark = self._make_mark(self._these(), self._desk.given_rows, self._is_its_row)
        return mark.values({rows.status: rows.words[State.STARTED]})

    def _make_begin_with(self, columns: Sequence[str]) -> Any:
        rows, c, leases = self._desk.rows, self._attempts.c, self._desk.ledger.leases
        (key,) = rows.keys
        in_record = cast(func.btrim(c.row_key, literal_column("'[]'")), key.type)
        where = self._attempts.join(rows.table, key == in_record)
        of = [self._attempts, rows.table]
        if self._hold is not None:
            where = where.join(leases, (leases.c.id == bindparam("its_lease")) & leases.c.died.is_(None))
            of.append(leases)
        queued = self._desk.dialect.is_word(rows.status, rows.words[State.QUEUED])
        # The lease is among what is locked: its keeper mustn't wait while we do.
        hardly = func.set_config("lock_timeout", HARD, literal_column("true"))
        fit = select(c.id.label("claim"), key.label("its_key"), hardly.label("hardly")).select_from(where)
        fit = fit.where(self._these(), self._may_start_as_known, queued)
        these = fit.with_for_update(of=of, skip_locked=True, key_share=True).cte("fit")
        *head, _ = self._head()
        begun = self._make_mark(c.id == these.c.claim).returning(*head).cte("begun")
        wanted = rows.labelled(columns)
        started = (
            update(rows.table)
            .where(key == these.c.its_key)
            .values({rows.status: rows.words[State.STARTED]})
            .returning(these.c.claim.label("nih_sched_claim"), *wanted)
            .cte("started")
        )
        both = begun.join(started, started.c.nih_sched_claim == begun.c.id)
        facts = [*begun.c, literal_column("1"), *(started.c[one.name] for one in wanted)]
        statement = select(*facts).select_from(both)
        if self._hold is None:
            return statement
        return statement.add_cte(self._make_renew().where(exists(select(these.c.claim))).cte("renewed"))

    def mark(self, connection: Connection, claim_ids: Sequence[int]) -> int:
        """Mark claims as begun; return of how many that could be done."""
        statement = self._desk.once("mark", self._make_begun)
        return quick.run(connection, statement, self._given(claim_ids)).touched

    def renew_lease(self, connection: Connection) -> None:
        """Last of all where rows are waited for: the keeper mustn't wait for a lock that we hold meanwhile.

        Raises:
            LeaseLost: others have declared it dead.
        """
        hold = self._hold
        if hold is None:
            return
        statement = self._desk.once("renew", self._make_renew)
        if not quick.run(connection, statement, _horse_of(hold)).touched:
            raise LeaseLost

    def _make_renew(self) -> Any:
        leases = self._desk.ledger.leases
        statement = update(leases).where(leases.c.id == bindparam("its_lease"), leases.c.died.is_(None))
        return statement.values(
            beat=leases.c.beat + 1,
            horse=bindparam("its_horse"),
            horse_born=bindparam("its_born"),
            lease_until=After(bindparam("its_seconds", type_=Float())),
        )

    def _given(self, claim_ids: Sequence[int], *, known: bool = False) -> dict[str, Any]:
        facts = {"its_facts": self._desk.facts} if known else {}
        return {**self._ours, "its_ids": claim_ids, **facts}

    def _head(self) -> list[Any]:
        """What _by_key() needs of a record; the last column: whether this desk's facts are what is written down."""
        c, sources = self._attempts.c, self._desk.ledger.sources
        facts = select(sources.c.facts).where(sources.c.name == self._desk.source.name).scalar_subquery()
        current = (facts == bindparam("its_facts")).label("is_current")
        claim = [c.id, c.row_key, c.rq_id, c.attempt, c.failures, c.tries, c.interruptions, c.first_claim, c.earlier]
        return [*claim, current]

    def _these(self) -> ColumnElement[bool]:
        # A job names source and claims: that they belong together is known here alone.
        ids = self._desk.dialect.given(self._attempts.c.id, "its_ids")
        return ids & (self._attempts.c.source == self._desk.source.name)

    def _make_find(self) -> Any:
        c = self._attempts.c
        # What this very run started, in a transaction whose answer was lost, is still its own.
        ours = (c.run == bindparam("its_run")) & c.finished_at.is_(None)
        return select(*self._head(), c.run).where(self._these(), or_(self.may_start, ours))

    def _make_begin(self) -> Any:
        renewed = self._make_renew().returning(self._desk.ledger.leases.c.id).cte("renewed")
        times = select(func.count()).select_from(renewed).scalar_subquery().label("renewed")
        return self._make_begun().add_cte(renewed).returning(*self._head(), null(), times)

    def _make_begun(self) -> Any:
        return self._make_mark(self._these(), self.may_start)

    def _make_mark(self, *these: ColumnElement[bool]) -> Any:
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
