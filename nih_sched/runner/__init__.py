"""Inside the horse: start, perform, finish. `run` is the one function that our RQ jobs name."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from nih_sched import broker, clock, host, telemetry
from nih_sched.dialects.base import reason
from nih_sched.errors import AttemptFailed, NihError
from nih_sched.keeper import vouched_until
from nih_sched.model import Ended, Fate, Outcome, State, show_key
from nih_sched.runner.command import signal_name
from nih_sched.runner.handler import Handler, load
from nih_sched.runner.kept import hold_of, kept
from nih_sched.runner.perform import INTERRUPT, install_interrupts, interrupt_asked, perform, share_hand, silence_alarm
from nih_sched.runner.site import Site, clear, handler_for, here, made, prepare
from nih_sched.store import Attempts, Claims, Desk, Retries
from nih_sched.store.attempts import LeaseLost
from nih_sched.store.running import running

__all__ = [
    "INTERRUPT",
    "Handler",
    "Site",
    "Unwritten",
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
    "write_again",
]


LEAST_WAIT = 1.0  # seconds until a job that failed before its rows ran is sent again
REFUSED = 76  # a horse's exit code: the ledger refuses an outcome, which the worker has been told


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
        flush()


def flush() -> None:
    """Let out what the handler printed: RQ ends a horse without that. Nobody may be reading it any more."""
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
    with kept(site):
        return _go(site, desk, claim_ids)


def _go(site: Site, desk: Desk, claim_ids: Sequence[int]) -> dict[str, int]:
    run_token, hand, sent = secrets.token_hex(8), share_hand(), clock.boot()
    hold = hold_of(site)
    attempts = Attempts(desk, run_token, site.worker or _own_name(), hold)
    counts: dict[str, int] = {}
    last: tuple[Ended, Fate | None] | None = None
    try:
        rows = attempts.start(claim_ids, site.handler.columns)
    except LeaseLost:
        if site.slot:
            site.slot.lose()  # the worker takes a new one
        raise
    if hold and site.slot:
        site.slot.mount(hold.horse, hold.horse_born or 0, vouched_until(sent, hold.seconds))
    for row in rows:
        if site.slot and site.slot.lapsed:  # frozen until now: nobody vouches for us
            site.slot.kill_noted()
            os._exit(75)
        if hold:
            host.mark(hold.lease, row.claim.id)
        telemetry.emit("started", key=show_key(row.claim.key), attempt=row.claim.attempt)
        pid = os.getpid()
        try:
            ended = perform(row, partial(_call, site), desk.source.timeout)
        except BaseException as error:  # user code that defies being looked at: its row must end all the same
            ended = Ended(row.claim, Outcome.FAILED, reason=f"what it raised can't be looked at ({type(error)!r:.200})")
        if os.getpid() != pid:
            os._exit(0)  # user code forked, and both returned: the row is the first one's
        if site.owns_process:
            silence_alarm()  # RQ's: the outcome is written, however long the database is away
        if hold and ended.outcome in (Outcome.TIMED_OUT, Outcome.INTERRUPTED):
            host.end_all([hold.lease], claims=[row.claim.id])  # what it started must not run beside its next attempt
        hand.tell(run_token, ended)
        (fate,) = _write(site, attempts, ended)
        hand.forget()
        report(ended, fate)
        counts[ended.outcome.value] = counts.get(ended.outcome.value, 0) + 1
        last = ended, fate
    if last is not None and len(claim_ids) == 1:
        _settle(desk, *last)
    return counts


def _write(site: Site, attempts: Attempts, ended: Ended) -> list[Fate | None]:
    try:
        return attempts.finish([ended])
    except DBAPIError as error:
        telemetry.emit("outcome_refused", key=show_key(ended.claim.key), reason=reason(error))
        if site.slot is None or site.slot.worker == os.getpid():
            raise  # nobody to keep it: the lease ends with us, and the row is interrupted
        flush()
        os._exit(REFUSED)  # our worker keeps what it was told, and goes on trying while other rows run


@dataclass(frozen=True)
class Unwritten:
    """An outcome that the ledger refuses."""

    source: str
    run: str
    ended: Ended


def write_again(site: Site, unwritten: Unwritten) -> bool:
    """In the worker: try to write a refused outcome; whether it is written, or void, now."""
    desk = site.desk_for(unwritten.source)
    if desk is None:
        return True
    try:
        (fate,) = Attempts(desk, unwritten.run, site.worker).finish([unwritten.ended], patience=0.0)
    except DBAPIError:
        return False
    report(unwritten.ended, fate)
    return True


def crashed(
    site: Site, source: str, claim_ids: Sequence[int], rq_id: str, *, outcome: Outcome, how: str
) -> Unwritten | None:
    """In the worker, whose horse died: end what the horse had in hand, which it can't do any more.

    Args:
        site: the worker's.
        source: the job's source.
        claim_ids: the job's claims.
        rq_id: the job's id.
        outcome: crashed; interrupted if the worker stopped the horse, which spends no try; timed out if it had to.
        how: the horse's end in words.

    Returns:
        the outcome that the horse had reached, if the ledger refuses it.
    """
    desk = site.desk_for(source)
    if desk is None:
        return None
    told, unwritten = share_hand().told, None
    if told is not None:  # it had ended the row, and died before it could write that down
        run_token, ended = told
        try:
            (fate,) = Attempts(desk, run_token, site.worker).finish([ended])
            report(ended, fate)
        except DBAPIError:
            unwritten = Unwritten(source, run_token, ended)
    for claim, run_token in running(desk, claim_ids, site.worker):
        if unwritten is not None and claim.id == unwritten.ended.claim.id:
            continue
        ended = Ended(claim, outcome, reason=how)
        (fate,) = Attempts(desk, run_token, site.worker).finish([ended])
        report(ended, fate)
    Retries(desk).put_off(claim_ids, 0.0, rq_id)
    return unwritten


def _settle(desk: Desk, ended: Ended, fate: Fate | None) -> None:
    """Have RQ show what the ledger says, once a job's only row has ended."""
    if fate is None:
        return
    if ended.outcome is Outcome.POSTPONED:
        # No try is spent, so RQ's Retry must not count one: a new job carries the claim.
        queue = broker.current_queue()
        rq_id = broker.new_rq_id()
        if queue is not None and Retries(desk).carry(ended.claim.id, rq_id):
            claim = replace(ended.claim, failures=fate.failures)
            broker.send_later(queue, broker.job_for(desk.source, claim, rq_id), fate.delay or 0.0)
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


def report(ended: Ended, fate: Fate | None) -> None:
    """Say how an attempt ended, and what follows."""
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
