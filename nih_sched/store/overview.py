"""What a source looks like as a whole: counts within a time, samples, who works on what. All of it is quick."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Select, and_, case, func, literal_column, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ColumnElement

from nih_sched import clock
from nih_sched.dialects import Between, Now
from nih_sched.errors import NoSuchRow
from nih_sched.model import Key, decode_key, show_key
from nih_sched.store.desk import Desk
from nih_sched.store.history import minute_now, utc
from nih_sched.store.marks import UNSERVED
from nih_sched.store.order import beyond, in_key_order
from nih_sched.store.retries import sent, waiting

AT_ONCE = 0.1  # seconds in which all rows may be counted; then only as many as there is time for
WALK = 0.05  # seconds for that
STEP = 20_000
SAMPLE = 1000  # ended attempts that run and waiting times are told from
NEAR = 20_000  # records of the ledger's end, of all sources, among which they are looked for
DUE = 10_000  # claims that wait for their time, of all sources, which are counted in the index's order
NAMED = 1000  # running attempts that are told one by one
BOUND = 1_000_000  # rows that are counted by an index at most


@dataclass(frozen=True)
class Count:
    """How many; `more` if there are at least so many, `about` if that is told from a part of the table."""

    rows: int
    more: bool = False
    about: bool = False

    def __str__(self) -> str:
        return f"{'about ' if self.about else ''}{self.rows:,}{'+' if self.more else ''}"


class Counts(NamedTuple):
    """How many rows there are of each word."""

    by_word: dict[Any, int]
    whole: bool  # whether every row was counted; if not, there are at least so many
    about: bool = False  # or about so many: a part of the table was read

    def beside(self, word: Any, rows: int) -> Counts:
        """The same, corrected by how many rows have this word: they may lie together, beside the part that was read."""
        total = sum(self.by_word.values())
        rest = total - self.by_word.get(word, 0)
        factor = max(0, total - rows) / rest if rest else 1.0
        return self._replace(by_word={one: round(n * factor) for one, n in self.by_word.items()} | {word: rows})


class Ended(NamedTuple):
    """One of the newest attempts that have ended; its times as the database has reckoned them: instants cost thrice."""

    outcome: str
    seconds: float | None
    waited: float | None  # from its claim to its start; of first attempts
    age: float  # seconds since it ended


@dataclass(frozen=True)
class Running:
    """An attempt that runs."""

    key: Key
    attempt: int
    worker: str
    lease: str | None
    seconds: float  # since it began


@dataclass(frozen=True)
class LeaderSeen:
    """Which producer leads a source, or did."""

    name: str
    host: str
    pid: int
    holds: bool


@dataclass(frozen=True)
class Waiting:
    """Claims that wait for their next attempt."""

    count: int
    next_in: float | None  # seconds until the first of them is due; negative when it is overdue


class Overview:
    """Counts and samples of one source."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._rows = desk.rows
        self._attempts = desk.ledger.attempts

    def by_word(self) -> Counts:
        """How many rows there are of each word, as far as it can be told at once."""
        table, status = self._rows.table, self._rows.status
        try:
            with self._desk.looking_to_show(AT_ONCE) as connection:
                # Else each look would cost a large table's database as much as it may: with --watch, every 2 s.
                if part := self._desk.dialect.part_to_sample(connection, table):
                    some = table.tablesample(func.system(part), seed=literal_column("0")).c[status.name]
                    found = connection.execute(select(some, func.count()).group_by(some)).all()
                    return Counts({row[0]: round(row[1] * 100 / part) for row in found}, whole=False, about=True)
                whole = select(status, func.count()).group_by(status)
                return Counts({row[0]: row[1] for row in connection.execute(whole).all()}, whole=True)
        except DBAPIError as error:
            if not self._desk.dialect.is_overdue(error):
                raise
        return self._newest_by_word()

    def _newest_by_word(self) -> Counts:
        keys, status = self._rows.keys, self._rows.status
        counts: dict[Any, int] = {}
        after: Key | None = None
        until = clock.monotonic() + WALK
        while (left := until - clock.monotonic()) > 0:
            query = select(*keys, status.label("nih_sched_word")).order_by(*in_key_order(keys, True)).limit(STEP)
            if after is not None:
                query = query.where(beyond(keys, after, True))
            step = query.subquery()
            word = step.c.nih_sched_word
            some = [step.c[key.name] for key in keys]
            last = select(*some).order_by(*some).limit(1)
            try:
                with self._desk.looking_to_show(left) as connection:
                    found = connection.execute(select(word, func.count()).group_by(word)).all()
                    end = connection.execute(last).one_or_none()
            except DBAPIError as error:
                if not self._desk.dialect.is_overdue(error):
                    raise
                return Counts(counts, whole=False)
            for row in found:
                counts[row[0]] = counts.get(row[0], 0) + row[1]
            if end is None or sum(row[1] for row in found) < STEP:
                return Counts(counts, whole=True)
            after = tuple(end)
        return Counts(counts, whole=False)

    def ready(self, bound: int = BOUND, seconds: float = AT_ONCE) -> Count:
        """How many rows are ready for this source, counted by the recommended index."""
        return self._bounded(select(self._rows.keys[0]).where(self._desk.is_ready), bound, seconds)

    def ready_before(self, key: Key, bound: int, seconds: float = AT_ONCE) -> Count:
        """How many ready rows come before this one."""
        earlier = beyond(self._rows.keys, key, True)
        return self._bounded(select(self._rows.keys[0]).where(self._desk.is_ready, earlier), bound, seconds)

    def _bounded(self, rows: Select[Any], bound: int, seconds: float) -> Count:
        # Where time runs out, fewer of them: that there is none would be wrong.
        for most, patience in ((bound, seconds), (min(bound, STEP), WALK)):
            some = rows.limit(most + 1).subquery()
            try:
                with self._desk.dialect.looking(self._desk.engine, patience) as connection:
                    count = int(connection.execute(select(func.count()).select_from(some)).scalar_one())
            except DBAPIError as error:
                if not self._desk.dialect.is_overdue(error):
                    raise
            else:
                return Count(min(count, most), more=count > most)
        return Count(0, more=True)

    def is_claimable(self, key: Key) -> bool:
        """Whether a row is ready, and not left out by --where."""
        query = select(self._rows.keys[0]).where(self._rows.keyed([key]), self._desk.is_ready)
        return self._desk.read(lambda c: c.execute(query).first()) is not None

    def row(self, key: Key) -> dict[str, Any]:
        """The row's values by column.

        Raises:
            NoSuchRow.
        """
        query = select(*self._rows.table.columns).where(self._rows.keyed([key]))
        found = self._desk.read_to_show(lambda c: c.execute(query).first())
        if found is None:
            raise NoSuchRow(table=self._rows.name, key=show_key(key))
        return dict(zip(self._rows.columns, tuple(found), strict=True))

    def first_ready(self, created: str | None) -> tuple[Key, float | None] | None:
        """The key of the ready row that is first in line, and for how many seconds it has been there.

        Args:
            created: the column that says when a row was added: an instant, or seconds since 1970.
        """
        age: Any = literal_column("NULL")
        if created is not None:
            age = self._rows.table.columns[created]
        query = select(*self._rows.keys, age.label("created"), *self._instants()).where(self._desk.is_ready)
        query = query.order_by(*self._rows.keys).limit(1)
        found = self._desk.read_to_show(lambda c: c.execute(query).first())
        if found is None:
            return None
        *key, since, local, now = found
        return tuple(key), _age(since, local, utc(now))

    def _instants(self) -> list[Any]:
        # Texts and plain instants are in the session's own time, as what CURRENT_TIMESTAMP has put there.
        name = self._desk.dialect.name
        return [func.localtimestamp() if name == "postgresql" else func.current_timestamp(), Now()]

    def ended(self) -> list[Ended]:
        """The newest attempts that ended, newest first."""
        c = self._attempts.c
        first = and_(c.attempt == 1, c.started_at.is_not(None))
        waited = case((first, Between(c.claimed_at, c.started_at)))
        newest = select(func.max(c.id)).scalar_subquery()
        query = (
            select(c.outcome, c.seconds, waited, Between(c.finished_at, Now()))
            .where(c.id > newest - NEAR, c.source == self._desk.source.name, c.finished_at.is_not(None))
            .order_by(c.id.desc())
            .limit(SAMPLE)
        )
        return [
            Ended(outcome, seconds, None if waited is None else max(0.0, waited), age)
            for outcome, seconds, waited, age in self._desk.read(lambda x: x.execute(query).all())
        ]

    def running(self, limit: int = NAMED) -> list[Running]:
        """What has begun and not ended, longest first."""
        c = self._attempts.c
        query = (
            select(c.row_key, c.attempt, c.worker, c.lease, c.started_at, Now())
            .where(self._has_begun)
            .order_by(c.started_at)
            .limit(limit)
        )
        found = self._desk.read(lambda x: x.execute(query).all())
        return [
            Running(decode_key(k), attempt, worker or "", lease, (utc(now) - utc(began)).total_seconds())
            for k, attempt, worker, lease, began, now in found
        ]

    def begun(self) -> int:
        """How many there are of these: a batch of short rows begins as a whole."""
        query = select(func.count()).where(self._has_begun)
        return int(self._desk.read(lambda x: x.execute(query).scalar_one()))

    @property
    def _has_begun(self) -> ColumnElement[bool]:
        c = self._attempts.c
        open_ = (c.open_key > "") & c.started_at.is_not(None) & c.finished_at.is_(None)
        return open_ & (c.source == self._desk.source.name)

    def claimed(self) -> int:
        """How many claims were sent and haven't begun."""
        return int(self._desk.read(lambda x: x.execute(self._unbegun()).scalar_one()))

    def claimed_before(self, claim: int) -> int:
        """How many of them were opened before this one."""
        query = self._unbegun().where(self._attempts.c.id < claim)
        return int(self._desk.read(lambda x: x.execute(query).scalar_one()))

    def _unbegun(self) -> Any:
        c = self._attempts.c
        ours = (c.open_key > "") & (c.source == self._desk.source.name) & c.started_at.is_(None)
        return select(func.count()).where(ours, sent(self._attempts))

    def retries(self) -> Waiting:
        """What waits for its next attempt."""
        # By order and limit PostgreSQL uses the index also on a table that it hasn't analyzed.
        c = self._attempts.c
        ours = case((waiting(self._attempts, self._desk.source.name), c.due_at))
        some = select(ours.label("due_at")).where(c.due_at.is_not(None)).order_by(c.due_at).limit(DUE).subquery()
        query = select(func.count(some.c.due_at), func.min(some.c.due_at), func.count(), Now())
        count, due, seen, now = self._desk.read(lambda x: x.execute(query.select_from(some)).one())
        if seen == DUE:
            exact = select(func.count(), func.min(c.due_at), Now())
            exact = exact.where(waiting(self._attempts, self._desk.source.name))
            count, due, now = self._desk.read(lambda x: x.execute(exact).one())
        return Waiting(count, None if due is None else (utc(due) - utc(now)).total_seconds())

    def leader(self) -> LeaderSeen | None:
        """Who leads, or did last."""
        c = self._desk.ledger.sources.c
        holds = case((c.leader_until > Now(), 1), else_=0)
        query = select(c.leader, holds).where(c.name == self._desk.source.name)
        found = self._desk.read(lambda x: x.execute(query).one_or_none())
        if found is None or found[0] is None:
            return None
        name, host, pid, _ = json.loads(found[0])
        return LeaderSeen(name, host.partition(" ")[0], pid, bool(found[1]))

    def redis_lost_at(self) -> datetime | None:
        """Since when producers of this source have found Redis away."""
        c = self._desk.ledger.sources.c
        query = select(c.redis_lost_at).where(c.name == self._desk.source.name)
        lost: datetime | None = utc(self._desk.read(lambda x: x.execute(query).scalar()))
        return lost

    def unserved_since(self, minutes: int) -> int:
        """How many claims workers gave back in these last minutes because they don't serve the source."""
        c = self._desk.ledger.counts.c
        first = self._desk.read(minute_now) - minutes
        query = select(func.sum(c.value)).where(c.source == self._desk.source.name, c.name == UNSERVED)
        return int(self._desk.read(lambda x: x.execute(query.where(c.minute >= first)).scalar()) or 0)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which this share of them lies; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _age(since: Any, local: Any, now: datetime) -> float | None:
    if since is None or isinstance(since, bool):
        return None
    if not isinstance(since, str | datetime):
        try:
            return now.timestamp() - float(since)
        except (TypeError, ValueError):
            return None
    try:
        at = datetime.fromisoformat(since) if isinstance(since, str) else since
        here = datetime.fromisoformat(local) if isinstance(local, str) else local
    except ValueError:
        return None
    if at.tzinfo is not None:
        return (now - at).total_seconds()
    return float((here.replace(tzinfo=None) - at).total_seconds())
