"""One attempt of one row: the handler, its timeout, and whatever it may raise."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nih_sched.errors import Fail, RetryLater, RowInterrupted, RowTimeout
from nih_sched.model import Ended, Outcome, StartedRow

Call = Callable[[Mapping[str, Any], int, int], Any]

INTERRUPT = signal.SIGUSR1
_interruptible = False
_interrupt_asked = False


def perform(row: StartedRow, handler: Call, timeout: float) -> Ended:
    """Run the handler for a started row; nothing that it raises gets out.

    Args:
        row: the row; one whose values can't be read fails at once.
        handler: what to run.
        timeout: seconds until RowTimeout is raised in it.
    """
    began = time.monotonic()

    def ended(outcome: Outcome, **facts: Any) -> Ended:
        return Ended(row.claim, outcome, seconds=time.monotonic() - began, **facts)

    if row.refused:
        return ended(Outcome.FAILED, reason=row.refused)
    if row.unreadable:
        return ended(Outcome.FAILED, reason=row.unreadable, final=True)
    try:
        with _interrupts(), _deadline(timeout):
            result = handler(row.values, row.claim.id, row.claim.attempt)
        return ended(Outcome.DONE, result=_as_text(result))
    except RowInterrupted:
        return ended(Outcome.INTERRUPTED, reason="its worker was told to stop")
    except RowTimeout:
        return ended(Outcome.TIMED_OUT, reason=f"ran longer than its timeout of {timeout:g} s", traceback=_trace())
    except RetryLater as asked:
        try:
            later = RetryLater(asked.seconds)
        except (AttributeError, TypeError, ValueError) as error:  # a subclass that went round our __init__
            return ended(Outcome.FAILED, reason=_say(error), traceback=_trace())
        return ended(Outcome.POSTPONED, reason=str(later), postpone=later.seconds)
    except Fail as error:
        return ended(Outcome.FAILED, reason=_say(error), traceback=_trace(), final=True)
    except BaseException as error:  # user code: sys.exit() and KeyboardInterrupt end the row, not its worker
        return ended(Outcome.FAILED, reason=_say(error), traceback=_trace())


def install_interrupts() -> None:
    """Let our worker end the row in hand by a signal, and let nobody else's SIGTERM or Ctrl-C do so.

    A deploy sends SIGTERM to every process of a container at once; the worker decides when the row must stop.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(INTERRUPT, _on_interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupt_asked() -> bool:
    """Whether the worker has asked this horse to stop: begin no further row."""
    return _interrupt_asked


def _on_interrupt(signum: int, frame: Any) -> None:
    global _interrupt_asked  # noqa: PLW0603 - a signal handler has no other place
    _interrupt_asked = True
    if _interruptible:
        raise RowInterrupted


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    # Only user code may be cut short; a write of ours is let through to its end.
    global _interruptible  # noqa: PLW0603
    _interruptible = True
    try:
        if _interrupt_asked:
            raise RowInterrupted
        yield
    finally:
        _interruptible = False


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise RowTimeout after `seconds`, and each second again, should the handler swallow it.

    RQ's own alarm on the same timer is put back afterwards, with the time that it had left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return

    armed = False  # an alarm that rings while we set or reset the clock must not keep us from doing so

    def on_alarm(signum: int, frame: Any) -> None:
        if armed:
            raise RowTimeout

    began = time.monotonic()
    old_delay, _ = signal.getitimer(signal.ITIMER_REAL)
    old_handler = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        armed = True
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
        if old_delay:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, old_delay - (time.monotonic() - began)))


def _as_text(result: Any) -> str | None:
    if result is None:
        return None
    try:
        return json.dumps(result, default=str, ensure_ascii=False)
    except Exception as error:  # user data: any error, from any __str__
        return json.dumps(f"a {type(result).__name__} that can't be kept ({type(error).__name__})")


def _say(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # user code: an exception whose own str() raises, whatever it likes
        text = "(its text can't be read)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trace() -> str:
    try:
        return traceback.format_exc()
    except Exception as error:  # user code again: __str__, __repr__, source files gone
        return f"(the traceback can't be formatted: {type(error).__name__})"
