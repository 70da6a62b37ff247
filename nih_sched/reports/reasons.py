"""Why a row isn't running: one true sentence, then the facts.

Each situation has a function of its own in SENTENCES, from what stands in the way most to what does least; the first
one that has a sentence says it. A later feature adds its own at its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nih_sched.model import Key, Outcome, State, show_key
from nih_sched.reports import words
from nih_sched.reports.overall import leader_words, pause_words
from nih_sched.reports.situation import Situation, situation
from nih_sched.store import Desk
from nih_sched.store.history import last_failure

IN_LINE = 10_000  # rows before it that are counted
UNSERVED = 2  # minutes for which a worker's refusal is news


@dataclass(frozen=True)
class Why:
    """The answer."""

    key: str
    sentence: str
    facts: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """These facts for a program."""
        return {"key": self.key, "sentence": self.sentence, "facts": dict(self.facts)}


Sentence = Callable[[Situation], str | None]


def running(it: Situation) -> str | None:
    """It runs."""
    head = it.head
    if head is None or not head.is_running:
        return None
    attempt = f"attempt {head.attempt} of {1 + head.tries}"
    if died := it.leases.get(head.lease or ""):
        return (
            f"its worker {head.worker} is dead ({words.first_line(died)}): it moves again as soon as a "
            "producer rescues it"
        )
    if head.lease and head.lease not in it.leases:
        return f"its worker {head.worker} is gone: it moves again as soon as a producer rescues it"
    if it.is_in(State.CANCELLED) and not it.is_in(State.FAILED):
        return f"cancelled; it still runs on {head.worker}, {attempt}, and is being stopped"
    if it.is_in(State.READY):
        return (
            f"ready again, while it still runs on {head.worker} for {it.since(head.started_at)}: "
            "it is claimed again once that attempt has ended"
        )
    return f"running for {it.since(head.started_at)} on {head.worker}, {attempt}"


def done(it: Situation) -> str | None:
    """It is done."""
    if not it.is_in(State.DONE):
        return None
    if it.last is None or it.last.outcome != Outcome.DONE.value:
        return f"{it.word}, and not by us: the ledger has no attempt of it that was done"
    took = f" in {words.duration(it.last.seconds)}" if it.last.seconds is not None else ""
    return f"{it.word} at {it.at(it.last.finished_at)}{took}, by attempt {it.last.attempt} on {it.last.worker}"


def cancelled(it: Situation) -> str | None:
    """It was cancelled."""
    if not it.is_in(State.CANCELLED) or it.is_in(State.FAILED):
        return None
    if it.last is not None and it.last.outcome == Outcome.CANCELLED.value:
        why = f": {words.first_line(it.last.reason)}" if it.last.reason else ""
        return f"{it.word} at {it.at(it.last.finished_at)}{why}"
    return f"{it.word} by its owner: `scheduler requeue` makes it ready again"


def failed(it: Situation) -> str | None:
    """It failed for good."""
    if not it.is_in(State.FAILED):
        return None
    failure = last_failure(it.records)
    if failure is None:
        return f"{it.word}, and not by us: the ledger has no attempt of it that failed"
    return (
        f"{it.word} for good at {it.at(failure.finished_at)} after attempt {failure.attempt} of {1 + failure.tries}, "
        f"with {it.failure(failure)}"
    )


def foreign(it: Situation) -> str | None:
    """Its word is nobody's."""
    if it.is_in(*State):
        return None
    return f"not ready: its state is {it.word!r}, and only {it.desk.rows.words[State.READY]!r} is run"


def unclaimed(it: Situation) -> str | None:
    """It looks as if it were on its way, and isn't."""
    if it.head is not None or it.is_in(State.READY):
        return None
    return f"{it.word}, but with no open claim behind it, so nobody will run it. Type: scheduler doctor --fix"


def left_out(it: Situation) -> str | None:
    """--where leaves it out."""
    if not it.is_in(State.READY) or not it.desk.rows.conditions or it.overview.is_claimable(it.key):
        return None
    return f"ready, but left out by --where {it.where!r}"


def paused(it: Situation) -> str | None:
    """Its source is paused."""
    pause = it.pause
    return None if pause is None else f"waiting, because {pause_words(pause, it.now)}"


def retrying(it: Situation) -> str | None:
    """It waits for its next attempt."""
    head = it.head
    if head is None or not head.is_waiting or head.due_at is None:
        return None
    if not it.redis.answers:
        return f"{it.redis_lost}; then retry {head.failures} of {head.tries} is sent"
    late = (it.now - head.due_at).total_seconds()
    when = f"at {it.at(head.due_at)}" if late <= 0 else f"overdue for {words.duration(late)}"
    missing = f"; {it.nobody}" if it.nobody else ""
    last = it.last
    if last is None or not last.has_failed:
        why = f" after {last.outcome}: {it.failure(last)}" if last is not None and last.claim == head.claim else ""
        return f"waiting for its next start {when}{why}{missing}"
    return f"retry {head.failures} of {head.tries} {when} after {it.failure(last)}{missing}"


def claimed(it: Situation) -> str | None:
    """It is claimed, and hasn't begun."""
    head = it.head
    if head is None or it.is_in(State.READY):
        return None
    words_ = f"claimed {it.since(head.claimed_at)} ago by {head.claimed_by}"
    if not it.redis.answers:
        return f"{words_}; {it.redis_lost}"
    if it.nobody:
        return f"{words_}, and {it.nobody}"
    ahead = it.overview.claimed_before(head.claim)
    return f"{words_} and queued behind {ahead:,}" if ahead else f"{words_} and first in the queue"


def no_redis(it: Situation) -> str | None:
    """It is ready, and Redis is away."""
    return f"ready, but {it.redis_lost}" if it.redis_lost and it.is_in(State.READY) else None


def unserved(it: Situation) -> str | None:
    """Workers give it back."""
    if not it.overview.unserved_since(UNSERVED) or it.overview.running(1):
        return None
    if any(one.age < UNSERVED * 60 for one in it.overview.ended()):
        return None  # some worker does
    stands = "ready" if it.is_in(State.READY) else "claimed"
    name = it.desk.source.name
    return f"{stands}, and released because no worker serves its source {name}: start one with this source's settings"


def nobody(it: Situation) -> str | None:
    """It is ready, and nobody is there."""
    return f"ready, but {it.nobody}. Type: scheduler run" if it.nobody and it.is_in(State.READY) else None


def in_line(it: Situation) -> str | None:
    """It is ready, and others come first."""
    if not it.is_in(State.READY):
        return None
    before = it.overview.ready_before(it.key, IN_LINE)
    return f"ready and {'beyond ' if before.more else ''}{_ordinal(before.rows + (not before.more))} in line"


SENTENCES: list[Sentence] = [
    running,
    foreign,
    done,
    cancelled,
    failed,
    unclaimed,
    left_out,
    paused,
    retrying,
    no_redis,
    unserved,
    claimed,
    nobody,
    in_line,
]


def why(desk: Desk, key: Key, redis_url: str | None, *, where: str | None = None) -> Why:
    """Why a row isn't running.

    Args:
        desk: the source's.
        key: the row's.
        redis_url: where Redis is; None: nowhere known.
        where: the source's --where, to be quoted.

    Raises:
        NoSuchRow.
    """
    it = situation(desk, key, redis_url, where=where)
    said = next(text for sentence in SENTENCES if (text := sentence(it)) is not None)
    end = "" if said.endswith("…") else "."
    return Why(show_key(key), f"Row {words.first_line(show_key(key))}: {said}{end}", tuple(_facts(it)))


def _facts(it: Situation) -> list[tuple[str, str]]:
    facts = [("state", f"{words.first_line(str(it.word))}"), ("source", it.desk.source.name)]
    if it.head is not None:
        head = it.head
        facts.append(("claim", f"{head.claim}, {it.since(head.claimed_at)} ago by {head.claimed_by}"))
        facts.append(("attempt", f"{head.attempt}; {head.failures} of {head.tries} retries spent"))
    elif it.is_in(State.READY):
        facts.append(("claim", "none is open"))
    if it.head is not None and it.head.source != it.desk.source.name:
        facts.append(("claimed for", f"source {it.head.source}"))
    ended = [one for one in it.records if one.outcome is not None]
    facts.append(("attempts so far", str(len(ended))))
    if ended:
        facts.append(("last attempt", f"{ended[0].outcome} at {it.at(ended[0].finished_at)}"))
    failure = last_failure(it.records)
    if failure is not None:
        facts.append(("last error", it.failure(failure)))
        if failure.error:
            facts.append(("where", words.first_line(failure.error)))
    if not it.is_in(State.DONE, State.FAILED, State.CANCELLED):
        facts.append(("Redis", it.redis.sentence))
        facts.append(("producers listening", str(it.redis.producers) if it.redis.answers else "unknown"))
        facts.append(("workers", words.listed(it.redis.workers) or ("none" if it.redis.answers else "unknown")))
        facts.append(("leader", leader_words(it.overview.leader())))
    return facts


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number:,}th"
    return f"{number:,}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
