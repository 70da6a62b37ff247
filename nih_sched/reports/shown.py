"""A row with all that the ledger knows of it: what `scheduler show` and the row's page show."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from nih_sched.model import Key, show_key
from nih_sched.reports import words
from nih_sched.store import Desk
from nih_sched.store.history import History, Record, Texts
from nih_sched.store.overview import Overview
from nih_sched.telemetry import one_line

MOST = 50  # attempts whose long texts are read


@dataclass(frozen=True)
class Attempt:
    """One attempt, past or to come."""

    record: Record
    texts: Texts
    now: datetime

    @property
    def heading(self) -> str:
        """Which, and how it ended, in words."""
        one = self.record
        name = f"attempt {one.attempt} of {1 + one.tries}, claim {one.claim}"
        if one.outcome is not None:
            took = f" after {words.duration(one.seconds)}" if one.seconds is not None and one.started_at else ""
            return f"{name}: {one.outcome}{took}"
        if one.is_running and one.started_at is not None:
            return f"{name}: running for {words.duration((self.now - one.started_at).total_seconds())}"
        if one.is_waiting and one.due_at is not None:
            return f"{name}: waiting, due at {words.instant(one.due_at, self.now)}"
        return f"{name}: {'claimed' if one.is_open else 'given back'}"

    def facts(self) -> list[tuple[str, str]]:
        """What there is to say of it, a name and a value each; the long texts are apart."""
        one, texts = self.record, self.texts
        known: list[tuple[str, Any]] = [
            ("claimed", f"{words.instant(one.claimed_at, self.now)} by {one.claimed_by}"),
            ("started", one.started_at and words.instant(one.started_at, self.now)),
            ("ended", one.finished_at and words.instant(one.finished_at, self.now)),
            ("worker", one.worker),
            ("ended by", one.ended_by if one.ended_by != one.worker else None),
            ("late outcome", one.late and f"{one.late}, refused: it came too late"),
            ("interruptions before", one.interruptions or None),
            ("CPU time", None if texts.cpu_seconds is None else words.duration(texts.cpu_seconds)),
            ("peak memory", None if texts.peak_memory is None else words.size(texts.peak_memory)),
            ("error", one.error),
            ("reason", one.reason and words.first_line(one.reason)),
            ("result", texts.result and words.first_line(texts.result)),
        ]
        return [(name, one_line(str(value))) for name, value in known if value is not None]

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        facts = {name: plain(value) for name, value in vars(self.record).items() if name not in ("is_head", "rq_id")}
        return {**facts, "rq_id": self.record.rq_id, **vars(self.texts)}


@dataclass(frozen=True)
class Shown:
    """A row and its attempts, the newest first."""

    key: str
    state: str  # what its word means; "" if it isn't ours
    values: dict[str, Any]
    attempts: tuple[Attempt, ...]

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {
            "key": self.key,
            "state": self.state,
            "row": {name: plain(value) for name, value in self.values.items()},
            "attempts": [attempt.as_json() for attempt in self.attempts],
        }


def show(desk: Desk, key: Key) -> Shown:
    """A row, and each attempt of it with everything.

    Raises:
        NoSuchRow.
    """
    values = Overview(desk).row(key)
    history = History(desk)
    records, now = history.of(key), history.now()
    texts = history.texts(records[:MOST])
    none = Texts(None, None, None, None, None)
    attempts = tuple(Attempt(record, texts.get(record.id, none), now) for record in records)
    state = state_of(desk, values[desk.rows.status.name], records)
    return Shown(show_key(key), state, values, attempts)


def state_of(desk: Desk, word: Any, records: list[Record]) -> str:
    """What a row's word means; of two states with one word, the one that the ledger tells."""
    shown = word.rstrip(" ") if isinstance(word, str) else word
    states = [state.value for state, its in desk.rows.words.items() if its == shown]
    if len(states) < 2:
        return "".join(states)
    head = next((record for record in records if record.is_open and record.is_head), None)
    if head is not None and head.is_waiting and "retrying" in states:
        return "retrying"
    if head is not None and head.is_running and "started" in states:
        return "started"
    return next((state for state in ("queued", "failed", *states) if state in states), "")


def plain(value: Any) -> Any:
    """A value as JSON has it; what JSON hasn't becomes a text."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    return str(value)
