"""Inside the horse: start, perform, finish. `run` is the one function that our RQ jobs name."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import broker, telemetry
from nih_sched.broker import Send
from nih_sched.dialects.base import reason
from nih_sched.errors import AttemptFailed, NihError
from nih_sched.model import Ended, Fate, Outcome, State, show_key
from nih_sched.runner.command import signal_name
from nih_sched.runner.handler import Handler, load
from nih_sched.runner.perform import INTERRUPT, install_interrupts, interrupt_asked, perform, share_hand, silence_alarm
from nih_sched.runner.site import Site, clear, handler_for, here, made, prepare
from nih_sched.store import Attempts, Claims, Desk, Retries
from nih_sched.store.attempts import running

__all__ = [
    "INTERRUPT",
    "Handler",
    "Site",
    "clear",
    "crashed",
    "give_back",
    "handler_for",
    "here",
    "install_interrupts",
    "made",
    "prepare",
    "run",
    "share_hand",
    "signal_name",
]


LEAST_WAIT = 1.0  # seconds until a job that failed before its rows ran is sent again


def run(source: str, claim_ids: Sequence[int]) -> dict[str, int]:
    """Run these claims of `source`: begin them, call the handler row by row, write how each ended.

    Returns:
        counts by outcome, for rq-dashboard.

    Raises:
        AttemptFailed: the job's one row failed; RQ's Retry schedules its next attempt, or RQ's failed registry
            takes the job. The outcome is in the ledger by then.
    """
    try:
        return _run(source, claim_ids)
    except AttemptFailed:
        raise
    except Exception as error:  # nothing was started, or it is written by now: what waits is sent again
        telemetry.emit("job_failed", source=source, reason=reason(error))
        _put_off(source, claim_ids)
        # The error's own words may hold a row's; RQ keeps what is raised here in Redis.
        raise AttemptFailed(f"claims {list(claim_ids)}: {type(error).__name__} before they could run") from None
    finally:
        # RQ ends a horse without that, and what the handler printed would be lost. Nobody may be reading it any more.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()


def _put_off(source: str, claim_ids: Sequence[int]) -> None:
    with contextlib.suppress(SQLAlchemyError, NihError):
        desk = here().desk_for(source)
        if desk is not None:
            Retries(desk).put_off(claim_ids, max(desk.source.backoff.interval(0), LEAST_WAIT))


def _run(source: str, claim_ids: Sequence[int]) -> dict[str, int]:
    site = here()
    site.forked()
    if site.owns_process and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        install_interrupts()  # a horse, of a stock worker too; a worker that runs jobs itself must stay stoppable
    desk = site.desk_for(source)
    if desk is None:
        return {}
    if not site.serves(source) or interrupt_asked():
        give_back(site, source, claim_ids)
        return {"given back": len(claim_ids)}
    attempts = Attempts(desk, run=secrets.token_hex(8), worker=site.worker or _own_name())
    counts: dict[str, int] = {}
    last: tuple[Ended, Fate | None] | None = None
    for row in attempts.start(claim_ids, site.handler.columns):
        telemetry.emit("started", key=show_key(row.claim.key), attempt=row.claim.attempt)
        ended = perform(row, partial(_call, site), desk.source.timeout)
        if site.owns_process:
            silence_alarm()  # RQ's: the outcome is written, however long the database is away
        (fate,) = attempts.finish([ended])
        _report(ended, fate)
        counts[ended.outcome.value] = counts.get(ended.outcome.value, 0) + 1
        last = ended, fate
    if last is not None and len(claim_ids) == 1:
        _settle(desk, *last)
    return counts


def crashed(site: Site, source: str, claim_ids: Sequence[int], *, outcome: Outcome, how: str) -> None:
    """In the worker, whose horse died: end what the horse had in hand, which it can't do any more.

    Args:
        site: the worker's.
        source: the job's source.
        claim_ids: the job's claims.
        outcome: crashed; interrupted if the worker stopped the horse, which spends no try; timed out if it had to.
        how: the horse's end in words.
    """
    desk = site.desk_for(source)
    if desk is None:
        return
    for claim, run_token in running(desk, claim_ids, site.worker):
        ended = Ended(claim, outcome, reason=how)
        (fate,) = Attempts(desk, run_token, site.worker).finish([ended])
        _report(ended, fate)
    Retries(desk).put_off(claim_ids, 0.0)


def _settle(desk: Desk, ended: Ended, fate: Fate | None) -> None:
    """Have RQ show what the ledger says, once a job's only row has ended."""
    if fate is None:
        return
    if ended.outcome is Outcome.POSTPONED:
        # No try is spent, so RQ's Retry must not count one: a new job carries the claim.
        queue = broker.current_queue()
        rq_id = broker.new_rq_id()
        if queue is not None and Retries(desk).carry(ended.claim.id, rq_id):
            backoff, tries = desk.source.backoff, ended.claim.tries
            waits = tuple(backoff.intervals(tries, lambda: 0.0, spent=fate.failures))
            broker.send_later(queue, Send(rq_id, (ended.claim.id,), waits, desk.source.timeout), fate.delay or 0.0)
        return
    if fate.state is State.FAILED:
        broker.spend_retries()  # a handler that raised Fail may have some left
    elif not fate.claim_goes_on or ended.outcome is Outcome.INTERRUPTED:
        return
    raise AttemptFailed(f"claim {ended.claim.id}, attempt {ended.claim.attempt}: {ended.outcome.value}") from None


def give_back(site: Site, source: str, claim_ids: Sequence[int]) -> None:
    """Give claims that haven't begun back: this worker stops, or doesn't serve their source."""
    desk = site.desk_for(source)
    if desk is None:
        return
    if not site.serves(desk.source.name):
        telemetry.emit("unserved", count=len(claim_ids), source=desk.source.name)
    Claims(desk, "", 0).give_back(claim_ids)


def _call(site: Site, values: Mapping[str, Any], claim_id: int, attempt: int) -> Any:
    # The hook is user code too: when it raises, the row fails with its traceback.
    if site.settings.on_horse_start and not site.horse_started:
        load(site.settings.on_horse_start)()
    site.horse_started = True
    return site.handler(values, claim_id, attempt)


def _own_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _report(ended: Ended, fate: Fate | None) -> None:
    if fate is None:
        return
    facts = {
        "key": show_key(ended.claim.key),
        "attempt": ended.claim.attempt,
        "outcome": ended.outcome.value,
        "seconds": ended.seconds,
        "reason": _short(ended.reason),
        "claim_id": ended.claim.id,
    }
    if fate.state is State.DONE:
        telemetry.emit("done", **facts)
    elif ended.outcome is Outcome.INTERRUPTED:
        telemetry.emit("interrupted", **facts)
    elif fate.claim_goes_on:
        telemetry.emit("retrying", delay=fate.delay, **facts)
    else:
        telemetry.emit("failed", **facts)


def _short(text: str | None) -> str:
    line = (text or "").strip()
    return line if len(line) <= 300 else f"{line[:300]}…"
