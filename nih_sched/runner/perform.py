"""One attempt of one row: the handler, its timeout, and whatever it may raise."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from signal import ITIMER_REAL, getitimer
from typing import Any

from nih_sched import clock
from nih_sched.errors import Fail, RetryLater, RowInterrupted, RowTimeout
from nih_sched.model import DONE, Ended, Outcome, StartedRow
from nih_sched.runner.command import CommandFailed
from nih_sched.runner.hand import share_hand
from nih_sched.runner.place import place_of

Call = Callable[[Mapping[str, Any], int, int], Any]

INTERRUPT = signal.SIGUSR1
TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CANCELLED = "cancelled while it ran"
_interruptible = False
_interrupt_asked = False
_all_told = False  # SIGTERM or Ctrl-C reached this horse: it was sent to everyone, its command's processes too


def perform(row: StartedRow, handler: Call, timeout: float) -> Ended:
    """Run the handler for a started row; nothing that it raises gets out.

    Args:
        row: the row; one whose values can't be read fails at once.
        handler: what to run.
        timeout: seconds until RowTimeout is raised in it.
    """
    if row.refused:
        return _ended(row, Outcome.FAILED, time.monotonic(), reason=row.refused)
    if row.unreadable:
        group = row.unreadable.partition(":")[0]  # what follows is of this row alone
        return _ended(row, Outcome.FAILED, time.monotonic(), reason=row.unreadable, error=group, final=True)
    if _alarms is None:
        with alarms():
            return _perform(row, handler, timeout)
    return _perform(row, handler, timeout)


def _ended(row: StartedRow, outcome: Outcome, began: float, **facts: Any) -> Ended:
    return Ended(row.claim, outcome, seconds=time.monotonic() - began, at=clock.boot(), **facts)


def _perform(row: StartedRow, handler: Call, timeout: float) -> Ended:
    global _interruptible  # noqa: PLW0603 - a signal handler has no other place
    hand, alarm = share_hand(), _alarms
    assert alarm is not None  # noqa: S101 - perform() has seen to it
    began = time.monotonic()
    hand.run_until(began + timeout)
    try:
        try:
            # Only user code may be cut short; a write of ours is let through to its end.
            _interruptible = True
            if _interrupt_asked:
                raise RowInterrupted
            alarm.set(began, began + timeout)
            # Their texts, too, are user code: what it returns or raises is looked at within its time.
            return _attempt(row, handler, began)
        finally:
            alarm.armed = _interruptible = False
    except RowInterrupted:
        if hand.is_cancelled:
            return _ended(row, Outcome.CANCELLED, began, reason=CANCELLED)
        return _ended(row, Outcome.INTERRUPTED, began, reason="its worker was told to stop")
    except RowTimeout as error:
        # By hand: to format an exception is to ask those before it for their texts, which may never come.
        trace = f"Traceback (most recent call last):\n{''.join(traceback.format_tb(error.__traceback__))}RowTimeout\n"
        why = f"ran longer than its timeout of {timeout:g} s"
        return _ended(row, Outcome.TIMED_OUT, began, reason=why, traceback=trace, error=_place(error))
    finally:
        alarm.armed = _interruptible = False  # again: a signal may have cut the first one short
        hand.run_until(0.0)


def _attempt(row: StartedRow, handler: Call, began: float) -> Ended:
    try:
        result = handler(row.values, *row.claim.for_handler)
        if result is not None:
            result = _as_text(result)
        # By place: names take as long again, and this is what most rows come to.
        return Ended(row.claim, DONE, None, None, result, time.monotonic() - began, False, 0.0, clock.boot())
    except (RowInterrupted, RowTimeout):
        raise
    except RetryLater as asked:
        try:
            later = RetryLater(asked.seconds)
        except Exception as error:  # user code: a subclass that went round our __init__
            return _ended(row, Outcome.FAILED, began, **_told(error))
        return _ended(row, Outcome.POSTPONED, began, reason=str(later), postpone=later.seconds)
    except Fail as error:
        return _ended(row, Outcome.FAILED, began, **_told(error), final=True)
    except CommandFailed as error:
        if _all_told and error.signalled:
            return _ended(row, Outcome.INTERRUPTED, began, reason="everything here was told to stop")
        return _ended(row, Outcome.FAILED, began, **_told(error) | {"error": str(error).partition(":")[0]})
    except BaseException as error:  # user code: sys.exit() and KeyboardInterrupt end the row, not its worker
        return _ended(row, Outcome.FAILED, began, **_told(error))


def install_interrupts() -> None:
    """Let our worker end the row in hand by a signal, and let nobody else's SIGTERM or Ctrl-C do so.

    A deploy sends SIGTERM to every process of a container at once; the worker decides when the row must stop.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(INTERRUPT, _on_interrupt)
        # A handler that does nothing, not SIG_IGN: what user code starts would inherit that, and couldn't be ended.
        for number in TOLD:
            signal.signal(number, _on_told)
        os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals, after_in_child=_forget_signals)


def _on_told(signum: int, frame: Any) -> None:
    global _all_told  # noqa: PLW0603
    _all_told = True


def _hold_signals() -> None:
    # A child that is ended at once must not get the signal while it still has our handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)


def _let_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)


def _forget_signals() -> None:
    for number in TOLD:
        if signal.getsignal(number) is _on_told:
            signal.signal(number, signal.SIG_DFL)
    _let_signals()


def is_interruptible() -> bool:
    """Whether INTERRUPT ends the row in hand here, and not the process."""
    return signal.getsignal(INTERRUPT) is _on_interrupt


def interrupt_asked() -> bool:
    """Whether the worker has asked this horse to stop: begin no further row."""
    return _interrupt_asked


def _on_interrupt(signum: int, frame: Any) -> None:
    global _interrupt_asked  # noqa: PLW0603 - a signal handler has no other place
    _interrupt_asked = True
    if _interruptible:
        raise RowInterrupted


class Alarms:
    """The process's alarm clock while rows of a job run: raises RowTimeout when it rings in user code past its time.

    It is set once for many short rows: one that rings too early, for a row before, is set again for the present one.
    """

    def __init__(self) -> None:
        self.armed = False  # an alarm that rings while no user code runs must not harm ours
        self._until = self._rings = 0.0
        self._works = threading.current_thread() is threading.main_thread()  # signals reach that one only

    def set(self, now: float, until: float) -> None:
        """Ring at `until`, and each second again, should the handler swallow it; both by time.monotonic()."""
        self._until = until
        self.armed = True
        # A library in a row before may have used the clock for itself, and stopped it.
        if self._works and not (
            now < self._rings <= until and abs(self._rings - now - getitimer(ITIMER_REAL)[0]) < 0.05
        ):
            self._ring_at(until)

    def _ring_at(self, instant: float) -> None:
        self._rings = instant
        signal.setitimer(signal.ITIMER_REAL, max(0.001, instant - time.monotonic()), 1.0)

    def clear(self) -> None:
        """Don't ring any more."""
        self.armed = False
        self._rings = 0.0
        if self._works:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def heed(self, signum: int, frame: Any) -> None:
        """The alarm's handler."""
        if self.armed:
            if time.monotonic() >= self._until - 0.001:
                raise RowTimeout
            self._ring_at(self._until)


_alarms: Alarms | None = None


@contextlib.contextmanager
def alarms(*, give_back: bool = True) -> Iterator[None]:
    """Have the alarm clock be ours while a job's rows run.

    Args:
        give_back: whether RQ's own alarm on the same timer is put back afterwards, with the time that it had left.
            In a horse it isn't: once user code is over, our own writing has no deadline.
    """
    global _alarms  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        _alarms = Alarms()
        try:
            yield
        finally:
            _alarms = None
        return
    began = time.monotonic()
    old_delay, _ = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _alarms = Alarms()
    old_handler = signal.signal(signal.SIGALRM, _alarms.heed)
    try:
        yield
    finally:
        _alarms.clear()
        _alarms = None
        signal.signal(signal.SIGALRM, old_handler)
        if old_delay and give_back:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, old_delay - (time.monotonic() - began)))


def _as_text(result: Any) -> str:
    try:
        return json.dumps(result, default=str, ensure_ascii=False)
    except (RowInterrupted, RowTimeout):
        raise
    except Exception as error:  # user data: any error, from any __str__
        return json.dumps(f"a {_name(result)} that can't be kept ({_name(error)})")


def _told(error: BaseException) -> dict[str, str]:
    return {"reason": _say(error), "traceback": _trace(), "error": _place(error)}


def _place(error: BaseException) -> str:
    try:
        return place_of(_name(error), error.__traceback__)
    except (RowInterrupted, RowTimeout):
        raise
    except BaseException:  # user code: an exception that hides its traceback, a folder that is gone
        return _name(error)


def _say(error: BaseException) -> str:
    try:
        text = str(error)
    except (RowInterrupted, RowTimeout):
        raise
    except BaseException:  # user code: an exception whose own str() raises, whatever it likes
        text = "(its text can't be read)"
    return f"{_name(error)}: {text}" if text else _name(error)


def _name(thing: Any) -> str:
    try:
        return str(type.__getattribute__(type(thing), "__name__"))
    except Exception:  # user code: a class that hides its name
        return "nameless"


def _trace() -> str:
    try:
        return traceback.format_exc()
    except (RowInterrupted, RowTimeout):
        raise
    except BaseException as error:  # user code again: __str__, __repr__, source files gone
        return f"(the traceback can't be formatted: {_name(error)})"
