"""Claiming ready rows, and giving back what was claimed and not begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, not_, or_, select, update
from sqlalchemy.exc import DBAPIError

from nih_sched.dialects import After, Now, quick
from nih_sched.dialects.base import Opened
from nih_sched.errors import KeysDontMatch
from nih_sched.model import Claim, Key, Outcome, State, decode_key, encode_key, open_keys_of
from nih_sched.store import swift
from nih_sched.store.desk import PATIENCE, Desk
from nih_sched.store.pauses import unpaused
from nih_sched.store.unreadable import Unreadable

CHUNK = 1000  # rows in one statement
TAKEN = 2000  # rows in one claim: so many may travel in one job
PARAMETERS = 32_000  # in one statement; https://www.sqlite.org/limits.html, the least of our databases


class Claims:
    """The producer's statements."""

    def __init__(self, desk: Desk, producer: str, tries: int) -> None:
        self._desk = desk
        self._producer = producer
        self._tries = tries
        self._most = min(TAKEN, PARAMETERS // len(desk.rows.keys))
        self.finds_many = True  # more than a few, that is to be expected
        self._void: list[str] = []  # RQ ids of claims that a claim of ours has closed

    def select_ready(self, limit: int | None, without: Sequence[Key] = ()) -> Select[Any]:
        """The keys of ready rows, oldest key first."""
        rows = self._desk.rows
        query = select(*rows.keys).where(self._desk.is_ready)
        if without:
            query = query.where(not_(rows.keyed(without)))
        query = query.order_by(*rows.keys)
        return query if limit is None else query.limit(bindparam("ready_limit", limit))

    def claim(self, limit: int, rq_ids: Callable[[int], Sequence[str]], few: int = 1) -> list[Claim]:
        """Take up to `limit` ready rows: open their claims in the ledger and set just those rows Queued.

        A row whose earlier claim is still running stays ready until that claim has ended.

        Args:
            limit: how many at most.
            rq_ids: gives the RQ ids for so many claims; those with the same one travel together.
            few: how many at most are claimed by one statement, where that can be done, while rows come by so few.
        """
        claims: list[Claim] = []
        if few and limit and not self.finds_many and not self._desk.aside.found and swift.fits(self._desk):
            claims, more = self._claim_swiftly(min(limit, few), rq_ids)
            if not more:
                return claims
        try:
            claims += self._claim_together(limit - len(claims), rq_ids)
        except DBAPIError:
            if not claims:
                raise
        self.finds_many = len(claims) > few
        return claims

    def _claim_together(self, limit: int, rq_ids: Callable[[int], Sequence[str]]) -> list[Claim]:
        claims: list[Claim] = []
        held: list[Key] = []
        while len(claims) < limit:
            wanted = min(limit - len(claims), self._most)
            work = partial(self._claim_chunk, limit=wanted, held=held, rq_ids=rq_ids)
            # If the server crashes before it is on the disk, the rows are ready again, and their jobs carry nothing:
            # nothing of them has begun, for a start that commits after it takes it along.
            taken, passed = self._desk.transact(work, lasting=False)
            claims += taken
            held += passed
            # Rows that must wait are passed over: those behind them needn't.
            if len(taken) + len(passed) < wanted or len(held) > CHUNK:
                break
        return claims

    def _claim_swiftly(self, count: int, rq_ids: Callable[[int], Sequence[str]]) -> swift.Taken:
        try:
            return swift.claim(self._desk, count, rq_ids, self._producer, self._tries)
        except DBAPIError as error:
            if self._desk.dialect.is_transient(error):
                raise
            return swift.Taken([], more=True)  # what is wrong is said with more care

    def _claim_chunk(
        self, connection: Connection, limit: int, held: list[Key], rq_ids: Callable[[int], Sequence[str]]
    ) -> tuple[list[Claim], list[Key]]:
        rows = self._desk.rows
        wanted = {"ready_limit": limit}
        if held or self._desk.aside.found:
            found = list(map(tuple, connection.execute(self._lock_ready(held), wanted).all()))
        else:
            found = list(map(tuple, quick.run(connection, self._desk.once("ready", self._lock_ready), wanted).rows))
        if not found:
            return [], []
        keys: dict[str, Key] = {}
        own: dict[str, Opened] = {}
        row_keys = [encode_key(key) for key in found]
        hashes = open_keys_of(rows.name, row_keys)
        for key, row_key, hashed, rq_id in zip(found, row_keys, hashes, rq_ids(len(found)), strict=True):
            keys[hashed], own[hashed] = key, Opened(row_key, hashed, rq_id)
        ids, any_kept = self._open(connection, list(own.values()))
        refused = [hashed for hashed in own if hashed not in ids]
        if refused and (closed := self._close_unstarted(connection, refused)):
            self._void += closed
            more, kept_since = self._open(connection, [own[h] for h in refused])
            ids, any_kept = ids | more, any_kept or kept_since
        claims = [Claim(ids[h], keys[h], one.rq_id, 1, 0, self._tries) for h, one in own.items() if h in ids]
        if claims:
            statement = self._desk.once(
                "claim",
                lambda: update(rows.table).where(self._desk.given_rows).values({rows.status: rows.words[State.QUEUED]}),
            )
            taken = quick.run(connection, statement, self._desk.given_keys([claim.key for claim in claims])).touched
            if taken != len(claims):
                # Keys that name two rows, or that don't equal themselves (floats, NULLs): never run the wrong row.
                raise KeysDontMatch(
                    table=rows.name, columns=", ".join(c.name for c in rows.keys), wanted=len(claims), taken=taken
                )
            if any_kept:
                alone = self._take_over(connection, {ids[h]: h for h in keys if h in ids}, rq_ids)
                claims = [one._replace(rq_id=alone[one.id]) if one.id in alone else one for one in claims]
        return claims, [keys[h] for h in keys if h not in ids]

    def _lock_ready(self, held: Sequence[Key] = ()) -> Any:
        query = self.select_ready(self._most, held).where(unpaused(self._desk.ledger, self._desk.source.name))
        return self._desk.dialect.lock(query, self._desk.rows.table, skip_locked=True)

    def set_aside(self, error: DBAPIError) -> list[Unreadable]:
        """Pass over ready rows from now on whose keys can't be read, if that is why a claim has failed; return them."""
        if not self._desk.dialect.is_about_a_value(error):
            return []
        query = self.select_ready(self._most)
        return self._desk.read(lambda connection: self._desk.aside.learn(connection, query))

    def _take_over(
        self, connection: Connection, open_keys: dict[int, str], rq_ids: Callable[[int], Sequence[str]]
    ) -> dict[int, str]:
        # How often these rows were interrupted just before, so that it is counted on. It may be the row's own doing, so
        # it travels alone: {claim id: its RQ id}.
        attempts = self._desk.ledger.attempts
        c = attempts.c
        query = select(c.id, c.kept_key, c.interruptions, c.first_claim, c.earlier, c.attempt, c.outcome)
        kept = {
            row.kept_key: row
            for row in connection.execute(query.where(self._desk.among(c.kept_key, list(open_keys.values()))))
            if row.outcome == Outcome.INTERRUPTED.value
        }
        alone: dict[int, str] = {}
        for claim_id, hashed in open_keys.items():
            if before := kept.get(hashed):
                (alone[claim_id],) = rq_ids(1)
                values = {
                    "rq_id": alone[claim_id],
                    "interruptions": before.interruptions,
                    "first_claim": before.first_claim or before.id,
                    "earlier": (before.earlier or 0) + before.attempt,
                }
                connection.execute(update(attempts).where(c.id == claim_id).values(values))
        return alone

    def _open(self, connection: Connection, own: Sequence[Opened]) -> tuple[dict[str, int], bool]:
        values = {
            "source": self._desk.source.name,
            "attempt": 1,
            "failures": 0,
            "tries": self._tries,
            "claimed_by": self._producer,
        }
        return self._desk.dialect.open_claims(connection, self._desk.ledger.attempts, own, values)

    def _close_unstarted(self, connection: Connection, open_keys: Sequence[str]) -> list[str]:
        # The owner made the row ready again before its claim had begun: that claim is void, and so is its RQ job.
        attempts = self._desk.ledger.attempts
        unstarted = self._desk.among(attempts.c.open_key, open_keys) & attempts.c.started_at.is_(None)
        query = self._desk.dialect.lock(select(attempts.c.rq_id).where(unstarted), attempts)
        rq_ids = list(connection.execute(query).scalars())
        connection.execute(
            update(attempts)
            .where(unstarted)
            .values(
                open_key=None,
                due_at=None,
                finished_at=Now(),
                outcome=Outcome.CANCELLED.value,
                reason="its owner made the row ready again",
            )
        )
        return rq_ids

    def take_void(self) -> list[str]:
        """The RQ ids of jobs that carry nothing any more since a claim of ours closed their claims; each told once."""
        void, self._void = self._void, []
        return self.carrying_nothing(void)

    def carrying_nothing(self, rq_ids: Sequence[str]) -> list[str]:
        """Of these RQ ids, those of jobs without an open claim."""
        c = self._desk.ledger.attempts.c
        full = set[str]()
        for first in range(0, len(rq_ids), CHUNK):
            some = c.rq_id.in_(rq_ids[first : first + CHUNK])
            query = select(c.rq_id).where(c.source == self._desk.source.name, c.open_key > "", some)
            full |= set(self._desk.read(partial(_column, query)))
        return [rq_id for rq_id in dict.fromkeys(rq_ids) if rq_id not in full]

    def give_back(self, ids: Sequence[int] | None = None, *, patience: float = PATIENCE) -> list[str]:
        """Give back what this producer (or anyone, of the claims `ids`) has claimed and no worker has begun.

        A first attempt goes back to ready as if it had never been claimed. A claim that has spent tries keeps them: it
        stays open, due at once, for the next scheduler to send.

        Args:
            ids: whose.
            patience: seconds for which a database that is away, or a locked row, is waited for.

        Returns:
            the RQ ids of the jobs that carry nothing any more.
        """
        attempts = self._desk.ledger.attempts
        void: list[str] = []
        while True:
            mine = (
                attempts.c.claimed_by == self._producer if ids is None else self._desk.among(attempts.c.id, list(ids))
            )
            chosen = (attempts.c.source == self._desk.source.name) & mine
            query = (
                select(attempts.c.id, attempts.c.row_key, attempts.c.rq_id)
                .where(chosen, attempts.c.open_key.is_not(None), attempts.c.started_at.is_(None))
                .where(attempts.c.attempt == 1)
                .limit(CHUNK)
            )
            looked, given = self._desk.transact(partial(self._give_back_chunk, query=query), patience=patience)
            void += given
            if not looked:
                break
        self._desk.transact(lambda c: self._make_due(c, chosen), patience=patience)
        return self.carrying_nothing(void)

    def give_all_back(self) -> list[str]:
        """As give_back(), of whatever anybody has claimed for this source."""
        void: list[str] = []
        after: str | None = ""
        while after is not None:
            ids, after = self._unbegun(after)
            if ids:
                void += self.give_back(ids)
        return void

    def _unbegun(self, after: str) -> tuple[list[int], str | None]:
        # By the order of the index on open claims, as Retries.carriers(): the ledger may be large.
        c = self._desk.ledger.attempts.c
        query = select(c.id, c.open_key, c.source, c.started_at).where(c.open_key > after)
        page = self._desk.read(partial(_rows, query.order_by(c.open_key).limit(CHUNK)))
        ids = [row.id for row in page if row.source == self._desk.source.name and row.started_at is None]
        return ids, page[-1].open_key if len(page) == CHUNK else None

    def _give_back_chunk(self, connection: Connection, query: Select[Any]) -> tuple[int, list[str]]:
        rows, attempts = self._desk.rows, self._desk.ledger.attempts
        found = connection.execute(query).all()
        if not found:
            return 0, []
        keys = [decode_key(record.row_key) for record in found]
        # Rows before ledger, as a start locks them: whoever has the row decides, the other finds nothing left.
        connection.execute(self._desk.dialect.lock(select(*rows.keys).where(self._desk.keyed(keys)), rows.table)).all()
        still = connection.execute(
            self._desk.dialect.lock(
                query.where(self._desk.among(attempts.c.id, [record.id for record in found])), attempts
            )
        ).all()
        if still:
            connection.execute(delete(attempts).where(self._desk.among(attempts.c.id, [record.id for record in still])))
            connection.execute(
                update(rows.table)
                .where(self._desk.keyed([decode_key(record.row_key) for record in still]))
                .where(self._desk.dialect.is_word(rows.status, rows.words[State.QUEUED]))
                .values({rows.status: rows.words[State.READY]})
            )
        return len(found), [record.rq_id for record in still]

    def _make_due(self, connection: Connection, chosen: Any) -> None:
        attempts = self._desk.ledger.attempts
        connection.execute(
            update(attempts)
            .where(chosen, attempts.c.open_key.is_not(None), attempts.c.started_at.is_(None))
            # RQ's own scheduler sends without saying so.
            .where(attempts.c.attempt > 1, or_(attempts.c.sent_at.is_not(None), attempts.c.due_at.is_(None)))
            .values(due_at=After(0.0), sent_at=None)
        )


def _rows(query: Select[Any], connection: Connection) -> Sequence[Any]:
    return connection.execute(query).all()


def _column(query: Select[Any], connection: Connection) -> Sequence[Any]:
    return connection.execute(query).scalars().all()
