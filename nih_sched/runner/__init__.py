"""Inside the horse: start, perform, finish. `run` is the one function that our RQ jobs name."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import broker, clock, host, telemetry
from nih_sched.dialects.base import reason
from nih_sched.errors import AttemptFailed, NihError
from nih_sched.model import DONE, Ended, Outcome, StartedRow, show_key
from nih_sched.runner.cancelling import Waiting
from nih_sched.runner.command import signal_name
from nih_sched.runner.hand import new_hand, share_hand
from nih_sched.runner.handler import Handler, load
from nih_sched.runner.kept import hold_of, kept
from nih_sched.runner.meter import Meter
from nih_sched.runner.outcomes import MANY, Outcomes
from nih_sched.runner.parent import Steward, Unwritten, crashed, give_back, write_again
from nih_sched.runner.perform import CANCELLED, INTERRUPT, alarms, install_interrupts, interrupt_asked, perform
from nih_sched.runner.site import Site, clear, handler_for, here, made, prepare
from nih_sched.runner.starts import Starts
from nih_sched.runner.streams import keep_streams
from nih_sched.runner.traces import Growth, Traces
from nih_sched.store import Attempts, Desk, Hold, Retries
from nih_sched.store.records import StaleDesk
from nih_sched.store.running import running

__all__ = [
    "CANCELLED",
    "INTERRUPT",
    "Growth",
    "Handler",
    "Site",
    "Steward",
    "Unwritten",
    "clear",
    "crashed",
    "give_back",
    "handler_for",
    "here",
    "install_interrupts",
    "interrupt_asked",
    "made",
    "new_hand",
    "prepare",
    "run",
    "share_hand",
    "signal_name",
    "write_again",
]


CUT_OFF = (Outcome.TIMED_OUT, Outcome.INTERRUPTED, Outcome.CANCELLED)  # in the middle of user code
BROKEN = 80  # a horse's exit code
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
        here().flush()
        _tell_counts()


def _tell_counts() -> None:
    counts = here().counts
    if counts is not None and (counted := counts.take()) and (queue := broker.current_queue()):
        broker.tell_counts(queue, counted)


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
    if site.owns_process:
        keep_streams(share_hand().tail)
    if not site.serves(source) or interrupt_asked():
        give_back(site, source, claim_ids)
        return {"given back": len(claim_ids)}
    with kept(site, source):
        desk = site.known_desk(source) or site.desk_for(source)
        while desk is not None:
            try:
                return _go(site, desk, claim_ids)
            except StaleDesk:
                desk = site.desk_for(source)
    return {}


def _go(site: Site, desk: Desk, claim_ids: Sequence[int]) -> dict[str, int]:
    hold = hold_of(site)
    attempts = Attempts(desk, secrets.token_hex(8), site.worker or _own_name(), hold)
    outcomes = Outcomes(site, desk, attempts, share_hand(), len(claim_ids))
    starts = Starts(site, desk, attempts, hold, claim_ids)
    with alarms(give_back=not site.owns_process):
        site.look_before_rows()
        begun = starts.begin()
        with _to_the_end(site, desk, starts), _none_left(site, desk, attempts, claim_ids):
            while begun:
                starts.go_ahead(begun)
                if left := _run_rows(site, desk, begun, outcomes, hold):
                    attempts.take_back([row.claim for row in (*left, *starts.begun_in_vain())])
                    give_back(site, desk.source.name, [*(row.claim.id for row in left), *starts.waiting])
                    break
                begun = starts.begin()
            outcomes.write()
        site.tired = site.tired or site.traces.left(thoroughly=True)
    outcomes.settle()
    return dict(outcomes.counts)


@contextlib.contextmanager
def _to_the_end(site: Site, desk: Desk, starts: Starts) -> Iterator[None]:
    """Let no failure of ours, or of what user code has broken, leave rows behind that have begun."""
    try:
        yield
    except Exception as error:  # a horse's outermost frame, as long as rows are in its care
        if site.is_watched and (starts.have_begun or not isinstance(error, StaleDesk)):
            telemetry.emit("job_failed", source=desk.source.name, reason=reason(error))
            site.flush()
            os._exit(BROKEN)  # our worker ends what is in hand, writes what it was told, and takes back the rest
        raise


@contextlib.contextmanager
def _none_left(site: Site, desk: Desk, attempts: Attempts, claim_ids: Sequence[int]) -> Iterator[None]:
    """In somebody else's process nobody looks after rows that have begun: what cuts us short, Ctrl-C say, lets go."""
    try:
        yield
    except BaseException:
        if not site.owns_process:
            with contextlib.suppress(SQLAlchemyError):
                found = running(desk, claim_ids, site.worker or _own_name(), patience=LEAST_WAIT)
                attempts.take_back([claim for claim, _ in found], patience=LEAST_WAIT)
        raise


def _run_rows(site: Site, desk: Desk, waiting: Waiting, outcomes: Outcomes, hold: Hold | None) -> Sequence[StartedRow]:
    """Run rows that have begun, one after the other; return those that should run elsewhere."""
    hand, call, timeout = share_hand(), partial(_call, site), desk.source.timeout
    rows, meter = waiting.rows, Meter(hand.tail)
    singly, slot, pid = len(rows) < MANY, site.slot, os.getpid()
    for number, row in enumerate(rows):
        claim_id = row.claim.id
        if slot and slot.expired:  # frozen until now: nobody vouches for us
            slot.kill_noted()
            os._exit(75)
        if withdrawn := waiting.withdrawn(number):
            outcomes.add(withdrawn)
            continue
        # A process that nobody replaces goes on: the next job would find it as this row does.
        if (site.tired and site.owns_process) or interrupt_asked() or not hand.take(claim_id):
            meter.end()
            return rows[number:]
        if hold:
            host.mark(hold.lease, claim_id)
        if singly:
            telemetry.emit("started", key=show_key(row.claim.key), attempt=row.claim.attempt)
        meter.begin()
        try:
            ended = perform(row, call, timeout)
        except BaseException as error:  # user code that defies being looked at: its row must end all the same
            why = f"what it raised can't be looked at ({type(error)!r:.200})"
            ended = Ended(row.claim, Outcome.FAILED, reason=why, at=clock.boot())
        if os.getpid() != pid:
            os._exit(0)  # user code forked, and both returned: the row is the first one's
        ended = meter.note(ended)
        cut_off = ended.outcome is not DONE and ended.outcome in CUT_OFF
        if hold and cut_off:
            host.end_all([hold.lease], claims=[claim_id])  # what it started must not run beside its next attempt
        # A handler that was cut off may have left anything half done.
        site.tired = cut_off or site.traces.left(closely=False)
        outcomes.add(ended)
    meter.end()
    return []


def _call(site: Site, values: Mapping[str, Any], claim_id: int, attempt: int) -> Any:
    # The hook is user code too: when it raises, the row fails with its traceback.
    if not site.horse_started:
        if site.settings.on_horse_start:
            load(site.settings.on_horse_start)()
            site.traces = Traces()  # what the hook has started is for all rows
        site.horse_started = True
    return site.handler(values, claim_id, attempt)


def _own_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"
