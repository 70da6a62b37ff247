"""emit("claimed", …): what happened, as facts. Only the subscribers here word it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Protocol

from nih_sched import clock

Subscriber = Callable[[str, dict[str, Any]], None]

# Each event's sentence; facts that it doesn't name are for the JSON form only.
SENTENCES: dict[str, str] = {
    "run_started": "{summary}",
    "ledger_created": "created our tables nih_sched_* in {address}",
    "claimed": "claimed {count} rows",
    "started": "row {key} started (attempt {attempt})",
    "done": "row {key} done in {seconds:.3f} s",
    "started_together": "{count} rows started",
    "done_together": "{count} rows done, in {seconds:.3f} s of work",
    "retrying": "row {key} {outcome} (attempt {attempt}), again in {delay:g} s: {reason}",
    "failed": "row {key} {outcome} for good (attempt {attempt}): {reason}",
    "cancelled": "row {key} not run: it left {expected} before it started",
    "interrupted": "row {key} interrupted (attempt {attempt}), released",
    "stale": "row {key}: an outcome came too late and changed nothing",
    "state_refused": "row {key} stays as it is, the database refused its new state: {reason}",
    "left_alone": "row with {row} of {table} is left alone: its key is no text in its encoding",
    "leading": "this producer now looks after what is lost of source {source}",
    "lease_ended": "worker {worker} is taken for dead: its lease of {seconds:g} s ran out",
    "rescued": "row {key} rescued, now {state}: {reason}",
    "sent_again": "sent {count} claimed rows again: no worker had them",
    "outcome_refused": "row {key}: the ledger refuses its outcome, which is kept and tried again: {reason}",
    "given_back": "gave {count} claimed rows back",
    "paused": "source {source} paused by {by}: {reason}",
    "resumed": "source {source} resumed by {by}",
    "heeds_pause": "source {source} is paused by {by}, no row of it starts: {reason}",
    "goes_on": "source {source} isn't paused any more",
    "requeued": "{by} set {count} rows back to ready: {keys}",
    "cancelled_rows": "{by} cancelled {count} rows, {running} of them running: {keys}",
    "cancelled_running": "row {key} cancelled while it ran, and stopped (attempt {attempt})",
    "withdrawn": "row {key} not run: cancelled or deleted before its turn in its batch (attempt {attempt})",
    "unserved": "gave {count} rows of source {source} back: this worker doesn't serve it",
    "refused_job": "refused RQ job {rq_id}: {reason}",
    "job_failed": "a job of source {source} failed, not by its rows: {reason}",
    "retries_sent": "sent {count} due retries",
    "database_lost": "database unreachable, trying again: {reason}",
    "database_back": "database reachable again",
    "redis_lost": "Redis unreachable, trying again: {reason}",
    "redis_back": "Redis reachable again",
    "worker_started": "worker {name} started, pid {pid}",
    "worker_died": "worker {name} ended unexpectedly ({status}), starting another",
    "producer_died": "producer ended unexpectedly ({status}), starting another",
    "keeper_died": "keeper ended unexpectedly ({status}), starting another",
    "stopping": "stopping: running rows get {grace:g} s; press Ctrl-C again to stop at once",
    "stopping_now": "stopping at once",
    "stopped": "stopped",
    "finished": "nothing left to do: {summary}",
}
QUIET_SHOWS = frozenset(
    {
        "failed",
        "job_failed",
        "state_refused",
        "outcome_refused",
        "refused_job",
        "unserved",
        "database_lost",
        "redis_lost",
        "heeds_pause",
        "left_alone",
        "worker_died",
        "producer_died",
        "keeper_died",
        "lease_ended",
        "rescued",
    }
)
VIEW_SHOWS = QUIET_SHOWS | {"stopping", "stopping_now", "finished"}

_subscribers: list[Subscriber] = []


def subscribe(subscriber: Subscriber) -> None:
    """Have `subscriber(event, facts)` called at each emit, in this process and those forked from it."""
    _subscribers.append(subscriber)


def unsubscribe(subscriber: Subscriber) -> None:
    """Forget this one, if it is known."""
    if subscriber in _subscribers:
        _subscribers.remove(subscriber)


def unsubscribe_all() -> None:
    """Forget every subscriber."""
    _subscribers.clear()


def emit(event: str, **facts: Any) -> None:
    """Say that `event`, a key of SENTENCES, happened."""
    for subscriber in _subscribers:
        subscriber(event, facts)


class Stream(Protocol):
    """What a line is written to."""

    def write(self, text: str, /) -> Any:
        """Write a text."""

    def flush(self) -> Any:
        """Have it written now."""


class LogLines:
    """A subscriber that writes one line for each event, as text or as JSON.

    Args:
        form: "text" or "json".
        only: the events to log; all by default.
        stream: where to; standard error by default, looked up at each line.
    """

    def __init__(self, form: str = "text", only: frozenset[str] | None = None, stream: Stream | None = None) -> None:
        self._form = form
        self._only = only
        self._stream = stream

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        """Write the line, in one write so that processes don't mix theirs."""
        if self._only is not None and event not in self._only:
            return
        instant = clock.now()
        if self._form == "json":
            line = json.dumps({"at": instant.isoformat(), "event": event, **facts}, default=str)
        else:
            sentence = SENTENCES[event].format_map(facts)
            line = f"{instant:%H:%M:%S} {one_line(sentence)}"
        try:
            stream: Stream = self._stream or sys.stderr
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # a terminal that is closed, full or taken away must not stop a row


def one_line(text: str) -> str:
    """Text that can't forge a line or steer the terminal, whatever row it came from."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
