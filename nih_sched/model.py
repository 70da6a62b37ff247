"""The words and rules of a row's way, as pure values: no clock, no database, no Redis."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

from nih_sched.errors import UsageError

Word = str | int
Key = tuple[Any, ...]

SURROGATES = re.compile("[\ud800-\udfff]")  # what no encoding has
_PLAIN = struct.Struct("=qdd")  # shorter than any list that told() makes

OPEN_KEY_LENGTH = 40  # hexadecimal digits; as our tables' columns hold them
TEXT_LIMIT = 64 * 1024 - 64  # bytes; 64 KB with the mark, so that one long traceback can't swell the ledger


class State(StrEnum):
    """Where a row stands; the word for each in the user's column is the user's."""

    READY = "ready"
    QUEUED = "queued"
    STARTED = "started"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    RETRYING = "retrying"


class Outcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    CRASHED = "crashed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"
    LOST = "lost"
    POSTPONED = "postponed"


DONE = Outcome.DONE  # for what each row passes: to look a member up takes Python 3.11 as long as to call a function
FAILURES = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.CRASHED})


@dataclass(frozen=True)
class Backoff:
    """When a failed row runs again: delay * backoff**n seconds after failure n, capped, then stretched by jitter."""

    delay: float = 2.0
    backoff: float = 2.0
    max_delay: float = 86400.0
    jitter: float = 0.0

    def interval(self, n: int, stretch: float = 0.0) -> float:
        """Seconds to wait after the n-th failure, counted from 0.

        Args:
            n: how many failures came before this one.
            stretch: 0 to 1, how much of the jitter to add; jitter only ever lengthens.
        """
        try:
            seconds = self.delay * self.backoff**n
        except OverflowError:
            seconds = self.max_delay
        return min(seconds, self.max_delay) * (1 + self.jitter * stretch)

    def intervals(self, tries: int, random: Callable[[], float], *, spent: int = 0) -> list[float]:
        """The waits that are left, for RQ's Retry: exactly one for each try not yet spent."""
        return [self.interval(n, random()) for n in range(spent, tries)]


@dataclass(frozen=True)
class Source:
    """What one scheduler serves: a table, its status column, the ready word and the --where.

    `name` also names the RQ queue. Everything a worker needs to write a row's fate travels in here, by way of our
    table nih_sched_sources; which code runs never does.
    """

    name: str
    table: str
    status_key: str
    key_columns: tuple[str, ...]
    states: Mapping[State, Word]
    backoff: Backoff
    timeout: float
    lease: float = 120.0  # seconds for which a worker that can't be seen is presumed alive
    max_interruptions: int = 10  # in a row, then the row fails

    def to_json(self) -> str:
        """This source as kept in our table."""
        return json.dumps(
            {
                "table": self.table,
                "status_key": self.status_key,
                "key_columns": list(self.key_columns),
                "states": {state.value: word for state, word in self.states.items()},
                "backoff": [self.backoff.delay, self.backoff.backoff, self.backoff.max_delay, self.backoff.jitter],
                "timeout": self.timeout,
                "lease": self.lease,
                "max_interruptions": self.max_interruptions,
            }
        )

    @classmethod
    def from_json(cls, name: str, text: str) -> Source:
        """The inverse of to_json."""
        facts = json.loads(text)
        return cls(
            name=name,
            table=facts["table"],
            status_key=facts["status_key"],
            key_columns=tuple(facts["key_columns"]),
            states={State(state): word for state, word in facts["states"].items()},
            backoff=Backoff(*facts["backoff"]),
            timeout=facts["timeout"],
            **{name: facts[name] for name in ("lease", "max_interruptions") if name in facts},  # not in older ones
        )


class Claim(NamedTuple):
    """A row taken for a source. `id` is the token that guards every later write."""

    id: int
    key: Key
    rq_id: str
    attempt: int = 1
    failures: int = 0
    tries: int = 0
    interruptions: int = 0  # how many interrupted attempts of the row came just before
    first: int | None = None  # the claim from which the row was interrupted into this one
    earlier: int = 0  # attempts since then, before this claim's

    @property
    def for_handler(self) -> tuple[int, int]:
        """What a handler gets as claim_id and attempt.

        The first stays the same however often the row is interrupted and claimed again; the second counts on.
        """
        return self.first or self.id, self.earlier + self.attempt


class StartedRow(NamedTuple):
    """A claim whose attempt has begun: what the handler gets, or why it can't be given."""

    claim: Claim
    values: Mapping[str, Any]
    unreadable: str | None = None
    refused: str | None = None  # why the database wouldn't have the row in its started state


class Trail(NamedTuple):
    """What an attempt has written and used, as far as it was looked at."""

    output: str | None = None  # the last lines
    cpu_seconds: float | None = None  # its own and its ended programs'
    peak_memory: int | None = None  # bytes


class Ended(NamedTuple):
    """How one attempt of a claim ended, as the horse (or the horse's parent) tells it."""

    claim: Claim
    outcome: Outcome
    reason: str | None = None
    traceback: str | None = None
    result: str | None = None
    seconds: float = 0.0
    final: bool = False  # the handler raised Fail: whatever tries are left are not for this row
    postpone: float = 0.0  # for Outcome.POSTPONED: seconds until the next attempt
    at: float | None = None  # when it ended, by the boot clock; None: just now
    trail: Trail | None = None
    error: str | None = None  # the failure's kind and place, by which failures are grouped

    def told(self) -> bytes:
        """What a horse tells its worker, in case that it dies before it has written it down: all but the claim."""
        if self.outcome is DONE and self.result is None and self.trail is None and self.at is not None:
            return _PLAIN.pack(self.claim.id, self.seconds, self.at)  # most of all
        texts = [clean_text(text) for text in (self.reason, self.traceback, self.result)]
        facts = [
            self.claim.id,
            self.outcome.value,
            self.seconds,
            self.at,
            *texts,
            self.final,
            self.postpone,
            self.trail,
            clean_text(self.error),
        ]
        return json.dumps(facts).encode()

    @staticmethod
    def claim_told(text: bytes) -> int:
        """Which claim it is about."""
        return int((_PLAIN.unpack(text) if len(text) == _PLAIN.size else json.loads(text))[0])

    @classmethod
    def from_told(cls, text: bytes, claim: Claim) -> Ended:
        """The inverse of told()."""
        if len(text) == _PLAIN.size:
            _, seconds, at = _PLAIN.unpack(text)
            return cls(claim, Outcome.DONE, seconds=seconds, at=at)
        _, outcome, seconds, at, reason, traceback, result, final, postpone, trail, error = json.loads(text)
        kept = None if trail is None else Trail(*trail)
        return cls(claim, Outcome(outcome), reason, traceback, result, seconds, final, postpone, at, kept, error)


class Fate(NamedTuple):
    """What follows from an ended attempt: the row's next state, and when it runs again if it does."""

    state: State
    failures: int
    delay: float | None = None  # None: the claim is over; else seconds until the claim's next attempt
    interruptions: int = 0  # how many interrupted attempts in a row there have been now

    @property
    def claim_goes_on(self) -> bool:
        """Whether the claim stays open for another attempt."""
        return self.delay is not None


_DONE_AT_ONCE = Fate(State.DONE, 0)


def decide(ended: Ended, source: Source, stretch: float = 0.0) -> Fate:
    """The transition out of Started. The ledger's counts decide, never RQ's."""
    failures = ended.claim.failures
    if ended.outcome is DONE and failures == 0:
        return _DONE_AT_ONCE
    match ended.outcome:
        case Outcome.DONE:
            return Fate(State.DONE, failures)
        case Outcome.CANCELLED:
            return Fate(State.CANCELLED, failures)
        case Outcome.POSTPONED:
            return Fate(State.RETRYING, failures, ended.postpone)
        case Outcome.INTERRUPTED | Outcome.LOST:
            times = ended.claim.interruptions + 1
            if times >= source.max_interruptions:
                return Fate(State.FAILED, failures, interruptions=times)
            # Back to ready, unless tries were spent: a new claim would forget them.
            delay = None if failures == 0 else 0.0
            return Fate(State.READY if failures == 0 else State.RETRYING, failures, delay, times)
        case Outcome.FAILED | Outcome.TIMED_OUT | Outcome.CRASHED:
            if ended.final or failures >= ended.claim.tries:
                return Fate(State.FAILED, failures + 1)
            return Fate(State.RETRYING, failures + 1, source.backoff.interval(failures, stretch))


def encode_key(key: Key) -> str:
    """A row's key as ASCII JSON, the same text for the same key on every database and machine."""
    if len(key) == 1 and type(key[0]) is int:
        return f"[{key[0]}]"  # as below, ten times as fast
    return json.dumps([_encode_part(part) for part in key], separators=(",", ":"))


def decode_key(text: str) -> Key:
    """The inverse of encode_key."""
    if (inner := text[1:-1]).isdecimal():
        return (int(inner),)
    return tuple(_decode_part(part) for part in json.loads(text))


def show_key(key: Key) -> str:
    """A key as a person would type it; parts of a composite key are joined by a comma."""
    return ",".join(part.hex() if isinstance(part, bytes) else str(part) for part in key)


def _encode_part(part: Any) -> Any:
    if part is None or isinstance(part, str | int | float | bool):
        return part
    if isinstance(part, uuid.UUID):
        return {"uuid": str(part)}
    if isinstance(part, bytes | bytearray | memoryview):
        return {"bytes": base64.b64encode(bytes(part)).decode()}
    if isinstance(part, Decimal):
        return {"decimal": str(part)}
    if isinstance(part, datetime):
        return {"datetime": part.isoformat()}
    if isinstance(part, date):
        return {"date": part.isoformat()}
    raise UsageError(reason=f"A key of type {type(part).__name__} can't be used; name other columns by --primary-key.")


def _decode_part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    ((kind, text),) = part.items()
    decoders: dict[str, Callable[[str], Any]] = {
        "uuid": uuid.UUID,
        "bytes": base64.b64decode,
        "decimal": Decimal,
        "datetime": datetime.fromisoformat,
        "date": date.fromisoformat,
    }
    return decoders[kind](text)


def open_key(table: str, key: Key) -> str:
    """What is unique while a claim on the row is open, whatever source took it.

    A hash, because databases disagree on how long, how cased and how padded an indexed text may be.
    """
    return open_keys_of(table, [encode_key(key)])[0]


def open_keys_of(table: str, row_keys: Iterable[str]) -> list[str]:
    """open_key() of several keys that are encoded already."""
    of_table = hashlib.sha256(f"{table}\0".encode())
    found: list[str] = []
    for row_key in row_keys:
        hashed = of_table.copy()
        hashed.update(row_key.encode())
        found.append(hashed.hexdigest()[:OPEN_KEY_LENGTH])
    return found


def clean_text(text: str | None, limit: int = TEXT_LIMIT) -> str | None:
    """Text that every database takes: no NUL, no lone surrogates, at most `limit` bytes with a mark where cut."""
    if text is None:
        return None
    clean = text.replace("\0", "\\x00").encode("utf-8", "backslashreplace")
    if len(clean) <= limit:
        return clean.decode()
    # The end says more than the middle: a traceback names its error last.
    head, tail = clean[: limit // 4], clean[-(limit * 3 // 4) :]
    cut = len(clean) - len(head) - len(tail)
    return f"{head.decode(errors='ignore')}\n[… {cut} bytes cut …]\n{tail.decode(errors='ignore')}"
