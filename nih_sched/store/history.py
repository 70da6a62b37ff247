"""A row's history: its records in the ledger, the newest first, and what they say together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, and_, bindparam, case, func, or_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ColumnElement

from nih_sched import clock
from nih_sched.dialects import Now
from nih_sched.ledger import of_row, of_rows
from nih_sched.model import Key, Outcome, Source, decode_key, encode_key
from nih_sched.store.desk import Desk
from nih_sched.store.looks import FINAL_FAILURES

MOST = 2000  # records of one row that are read: --tries has a limit, and requeues have none
STEP = 20_000  # records of the first step through the ledger
AT_ONCE = 500  # rows whose records are looked up by one statement
NOT_BY_US = "not by us"  # the group of failed rows of which the ledger knows no failure
NAMES = (
    *("id", "of_claim", "source", "attempt", "failures", "tries", "open_key", "rq_id", "claimed_by", "claimed_at"),
    *("due_at", "sent_at", "started_at", "finished_at", "worker", "lease", "outcome", "seconds", "reason", "error"),
    *("interruptions", "ended_by", "late"),
)


@dataclass(frozen=True)
class Record:
    """One attempt, or one that is to come; instants are in UTC."""

    id: int
    claim: int
    source: str
    attempt: int
    failures: int
    tries: int
    is_head: bool  # it stands for its claim's newest attempt
    is_open: bool  # its claim hasn't ended
    rq_id: str | None
    claimed_by: str | None
    claimed_at: datetime
    due_at: datetime | None
    sent_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    lease: str | None
    outcome: str | None
    seconds: float | None
    reason: str | None
    error: str | None
    interruptions: int
    ended_by: str | None
    late: str | None

    @property
    def is_running(self) -> bool:
        """It has begun and not ended."""
        return self.is_open and self.started_at is not None and self.finished_at is None

    @property
    def is_waiting(self) -> bool:
        """It waits for its time; version 1 leaves due_at once it has sent."""
        if not self.is_open or self.started_at is not None or self.due_at is None:
            return False
        return self.sent_at is None or self.sent_at < self.due_at

    @property
    def has_failed(self) -> bool:
        """It ended, and badly."""
        return self.outcome in FINAL_FAILURES


class Brief(NamedTuple):
    """What lists need of an attempt: a record has much more, and is read by the thousand there."""

    id: int
    claim: int
    attempt: int
    is_head: bool
    is_waiting: bool
    outcome: str | None
    error: str | None
    finished_at: datetime | None

    @property
    def has_failed(self) -> bool:
        """As a record's."""
        return self.outcome in FINAL_FAILURES


Either = TypeVar("Either", Record, Brief)


@dataclass(frozen=True)
class Texts:
    """The long texts of one attempt."""

    traceback: str | None
    result: str | None
    output: str | None
    cpu_seconds: float | None
    peak_memory: int | None  # bytes


def utc(instant: Any) -> Any:
    """An instant of the database's, with its time zone said; None stays None, a text becomes what it says."""
    if isinstance(instant, str):
        instant = datetime.fromisoformat(instant)
    if instant is None or not isinstance(instant, datetime):
        return None
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


def minute_now(connection: Connection) -> int:
    """The present minute by the database's clock, since 1970."""
    return int(utc(connection.execute(select(Now())).scalar_one()).timestamp()) // 60


class History:
    """Reads the ledger of a source's table; claims of any source on the row count."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._attempts = desk.ledger.attempts

    @cached_property
    def _of_the_table(self) -> tuple[ColumnElement[bool], ...]:
        """A record says its row's key and its source alone: what sources of other tables have done is left out."""
        c = self._desk.ledger.sources.c
        sources = self._desk.read(lambda x: x.execute(select(c.name, c.facts)).all())
        others = [name for name, facts in sources if Source.from_json(name, facts).table != self._desk.rows.name]
        return (self._attempts.c.source.not_in(others),) if others else ()

    def now(self) -> datetime:
        """The database's clock."""
        instant: datetime = utc(self._desk.read(lambda c: c.execute(select(Now())).scalar_one()))
        return instant

    def of(self, key: Key) -> list[Record]:
        """A row's records: the newest attempt first, or the one that is to come."""
        c = self._attempts.c
        query = select(*self._columns()).where(of_row(self._attempts, encode_key(key)), *self._of_the_table)
        rows = self._desk.read(lambda x: x.execute(query.order_by(c.id.desc()).limit(MOST)).all())
        return in_order(map(_record, rows))

    def texts(self, records: Iterable[Record]) -> dict[int, Texts]:
        """The long texts of these, by the record's id."""
        c = self._attempts.c
        query = select(c.id, c.traceback, c.result, c.output, c.cpu_seconds, c.peak_memory)
        query = query.where(c.id.in_([record.id for record in records]))
        return {row[0]: Texts(*row[1:]) for row in self._desk.read(lambda x: x.execute(query).all())}

    def of_rows(self, keys: Sequence[Key]) -> dict[Key, list[Record]]:
        """The records of several rows, each as of() gives them; rows without any aren't there."""
        found: dict[Key, list[Record]] = {}
        for key, *facts in self._each(keys, self._columns()):
            found.setdefault(key, []).append(_record(facts))
        return {key: in_order(records) for key, records in found.items()}

    def briefs(self, keys: Sequence[Key], *only: ColumnElement[bool]) -> dict[Key, list[Brief]]:
        """As of_rows(), but what lists need of each record, and only records of which this is true."""
        c = self._attempts.c
        waits = and_(c.open_key.is_not(None), c.started_at.is_(None), c.due_at.is_not(None))
        waits = and_(waits, or_(c.sent_at.is_(None), c.sent_at < c.due_at))
        facts = [c.id, c.of_claim, c.attempt, case((waits, 1), else_=0), c.outcome, c.error, c.finished_at]
        found: dict[Key, list[Brief]] = {}
        for key, id_, of_claim, attempt, is_waiting, outcome, error, at in self._each(keys, facts, *only):
            claim, is_head = of_claim or id_, of_claim is None
            brief = Brief(id_, claim, attempt, is_head, bool(is_waiting), outcome, error, utc(at))
            found.setdefault(key, []).append(brief)
        return {key: in_order(records) for key, records in found.items()}

    def since(self, keys: Sequence[Key], instant: datetime) -> set[Key]:
        """To which of these rows something happened at or after an instant."""
        return {key for key, _ in self._each(keys, [self._attempts.c.id], self._since(instant))}

    def lately(self, instant: datetime, most: int, *, until: float, first: int | None = None) -> list[Key] | None:
        """The keys of all rows to which something happened at or after an instant, from the whole ledger.

        Args:
            instant: by the database's clock.
            most: how many at most.
            until: when time is over, by the boot clock.
            first: the id below which nothing has happened since; None: nobody knows.

        Returns:
            the keys; None if there are more, or time is over.
        """
        c, dialect = self._attempts.c, self._desk.dialect
        ends = select(*(select(one(c.id)).scalar_subquery() for one in (func.min, func.max)))
        least, last = self._desk.read(lambda x: x.execute(ends).one())
        first = max(first or 1, least or 1)
        query = select(c.row_key).where(c.id > bindparam("behind"), c.id <= bindparam("up_to"), self._since(instant))
        query = query.where(*self._of_the_table).limit(most + 1)
        found: set[str] = set()
        up_to, step = last or 0, STEP
        while up_to >= first:
            if (left := until - clock.monotonic()) <= 0:
                return None
            ids = {"behind": max(up_to - step, first - 1), "up_to": up_to}
            try:
                with dialect.looking(self._desk.engine, left) as connection:
                    found |= set(connection.execute(query, ids).scalars())
            except DBAPIError as error:
                if not dialect.is_overdue(error):
                    raise
                return None
            if len(found) > most:
                return None
            up_to, step = up_to - step, 2 * step
        return [decode_key(row_key) for row_key in found]

    def _since(self, instant: datetime) -> ColumnElement[bool]:
        c = self._attempts.c
        return or_(c.finished_at >= instant, c.started_at >= instant, c.claimed_at >= instant)

    def last_errors(self, keys: Sequence[Key]) -> dict[Key, str]:
        """The reason of each row's last failure, where it has one."""
        failures = self.briefs(keys, self._attempts.c.outcome.in_(FINAL_FAILURES))
        reasons = self.reasons([records[0].id for records in failures.values()])
        return {key: reasons.get(records[0].id) or "" for key, records in failures.items()}

    def reasons(self, ids: Collection[int]) -> dict[int, str | None]:
        """The reasons of these records."""
        c = self._attempts.c
        query = select(c.id, c.reason).where(self._desk.among(c.id, ids))
        return dict(map(tuple, self._desk.read(lambda x: x.execute(query).all()))) if ids else {}

    def _each(self, keys: Sequence[Key], facts: Sequence[Any], *only: ColumnElement[bool]) -> Iterator[Sequence[Any]]:
        """A row's key and these facts, for each record of these rows of which `only` is true."""
        by_text = {encode_key(key): key for key in keys}
        texts, only = list(by_text), (*only, *self._of_the_table)
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            query = of_rows(self._desk.dialect, self._attempts, [self._attempts.c.row_key, *facts], some, only)
            for row in self._desk.read(lambda x, q=query: x.execute(q).all()):  # type: ignore[misc]
                yield by_text[row[0]], *row[1:]

    def _columns(self) -> list[ColumnElement[Any]]:
        return [self._attempts.c[name] for name in NAMES]


def in_order(records: Iterable[Either]) -> list[Either]:
    """Newest claim first, and within it the newest attempt."""
    return sorted(records, key=lambda one: (one.claim, one.attempt, one.is_head), reverse=True)


def last_failure(records: Sequence[Either]) -> Either | None:
    """The newest attempt that ended badly."""
    return next((record for record in records if record.has_failed), None)


def group_of(records: Sequence[Brief]) -> str:
    """By which failed rows are grouped: the kind and place of the last failure, or how it ended where it has none."""
    failure = last_failure(records)
    if failure is None:  # too many interruptions fail a row as well
        ended = next((record for record in records if record.outcome is not None), None)
        interrupted = ended is not None and ended.outcome == Outcome.INTERRUPTED.value
        return Outcome.INTERRUPTED.value if interrupted else NOT_BY_US
    return group_name(failure.error or failure.outcome or "")


def group_name(error: str) -> str:
    """On one line: a form would change its line ends."""
    return " ".join(error.split())


def _record(row: Sequence[Any]) -> Record:
    facts: dict[str, Any] = dict(zip(NAMES, row, strict=True))
    of_claim, is_open = facts.pop("of_claim"), facts.pop("open_key") is not None
    facts |= {name: utc(facts[name]) for name in facts if name.endswith("_at")}
    facts["interruptions"] = facts["interruptions"] or 0
    head = of_claim is None
    return Record(claim=of_claim or facts["id"], is_head=head, is_open=head and is_open, **facts)
