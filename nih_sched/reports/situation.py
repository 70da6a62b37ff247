"""What is known of a row, for whoever words it: its records, its source, Redis, and who is up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from nih_sched.model import Key, State
from nih_sched.reports import words
from nih_sched.reports.servers import RedisSeen, look
from nih_sched.store import Desk, Leases
from nih_sched.store.history import History, Record
from nih_sched.store.overview import Overview
from nih_sched.store.pauses import Pause, Pauses


@dataclass(frozen=True)
class Situation:
    """What is known of a row; what costs a statement is asked for when a sentence needs it."""

    desk: Desk
    key: Key
    word: Any
    records: Sequence[Record]
    now: datetime
    where: str | None
    redis_url: str | None

    @cached_property
    def overview(self) -> Overview:
        """Of its source."""
        return Overview(self.desk)

    @cached_property
    def redis(self) -> RedisSeen:
        """As it is now."""
        return look(self.redis_url, self.desk.source.name)

    @cached_property
    def pause(self) -> Pause | None:
        """The source's."""
        return Pauses(self.desk).of(self.desk.source.name)

    @cached_property
    def leases(self) -> dict[str, str | None]:
        """Every lease there is, and of what it died if it is dead."""
        return {one.id: one.died for one in Leases(self.desk.engine, self.desk.ledger).all()}

    @cached_property
    def redis_lost(self) -> str:
        """Since when Redis is away, as a part of a sentence; nothing where it answers."""
        if self.redis.answers:
            return ""
        if self.redis_url is None:
            return "no scheduler runs on this machine, and no Redis is named by --redis-url"
        lost = self.overview.redis_lost_at()
        since = f" since {words.instant(lost, self.now)}" if lost else ""
        return f"Redis is unreachable{since} ({self.redis.error})"

    @cached_property
    def nobody(self) -> str:
        """Who is missing, as a part of a sentence: no producer, no worker; nothing if both are there."""
        if self.redis.answers:
            no_producer = not self.redis.producers and not self.leads
            if no_producer and not self.redis.workers:
                return "no producer and no worker of its source is up"
            if no_producer:
                return "no producer of its source is up"
            return "" if self.redis.workers else "no worker of its source is up"
        return ""

    @cached_property
    def leads(self) -> bool:
        """Whether a producer of the source leads it."""
        leader = self.overview.leader()
        return leader is not None and leader.holds

    @property
    def head(self) -> Record | None:
        """The open claim's record."""
        return next((record for record in self.records if record.is_open and record.is_head), None)

    @property
    def last(self) -> Record | None:
        """The newest attempt that has ended."""
        return next((record for record in self.records if record.finished_at is not None), None)

    def is_in(self, *states: State) -> bool:
        """Whether the row's word is one of these."""
        shown = self.word.rstrip(" ") if isinstance(self.word, str) else self.word
        return shown in {self.desk.rows.words[state] for state in states}

    def at(self, instant: datetime | None) -> str:
        """An instant in words."""
        return "an unknown time" if instant is None else words.instant(instant, self.now)

    def since(self, instant: datetime | None) -> str:
        """How long ago in words."""
        return "unknown" if instant is None else words.duration(max(0.0, (self.now - instant).total_seconds()))

    def failure(self, record: Record | None) -> str:
        """What it failed with."""
        return words.first_line(record.reason if record else None) or "an error that gave no reason"


def situation(desk: Desk, key: Key, redis_url: str | None, *, where: str | None = None) -> Situation:
    """What is known of a row.

    Raises:
        NoSuchRow.
    """
    values = Overview(desk).row(key)
    history = History(desk)
    return Situation(desk, key, values[desk.rows.status.name], history.of(key), history.now(), where, redis_url)
