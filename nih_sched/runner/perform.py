"""One attempt of one row: the handler, its timeout, and whatever it may raise."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nih_sched.errors import Fail, RetryLater, RowInterrupted, RowTimeout
from nih_sched.model import Ended, Outcome, StartedRow, clean_text
from nih_sched.runner.command import CommandFailed

Call = Callable[[Mapping[str, Any], int, int], Any]

INTERRUPT = signal.SIGUSR1
TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_interruptible = False
_interrupt_asked = False
_all_told = False  # SIGTERM or Ctrl-C reached this horse: it was sent to everyone, its command's processes too


class Hand:
    """Tells the worker whether its horse is inside user code, until when, and what came of it.

    Memory that both share: a horse killed or stuck in C code can't say anything any more.
    """

    ROOM = 2 * 2**20  # bytes for an outcome: its texts are cut to 64 KB each, escaped at most six times as long

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16 + self.ROOM)

    def take(self, seconds: float) -> None:
        """In the horse: user code begins, and has so many seconds."""
        struct.pack_into("d", self._memory, 0, time.monotonic() + seconds)

    def empty(self) -> None:
        """In the horse: user code has returned."""
        struct.pack_into("d", self._memory, 0, 0.0)

    def tell(self, run: str, ended: Ended) -> None:
        """In the horse: how the row ended, before that is written: it is kept even if we die."""
        reason, trace, result = (clean_text(text) for text in (ended.reason, ended.traceback, ended.result))
        text = json.dumps([run, replace(ended, reason=reason, traceback=trace, result=result).to_json()]).encode()
        if len(text) <= self.ROOM:
            self._memory[16 : 16 + len(text)] = text
            struct.pack_into("q", self._memory, 8, len(text))

    def forget(self) -> None:
        """In the horse: what was told is written down. In the worker: before each fork."""
        struct.pack_into("q", self._memory, 8, 0)

    @property
    def told(self) -> tuple[str, Ended] | None:
        """In the worker: the run and the outcome that a dead horse didn't get to write down."""
        (length,) = struct.unpack_from("q", self._memory, 8)
        if not length:
            return None
        run, text = json.loads(self._memory[16 : 16 + length])
        return run, Ended.from_json(text)

    @property
    def busy(self) -> bool:
        """In the worker: whether the horse is, or died, inside user code."""
        return self._until > 0.0

    def late(self, slack: float) -> bool:
        """In the worker: whether the horse should have come out of user code `slack` seconds ago."""
        return self.busy and time.monotonic() > self._until + slack

    @property
    def _until(self) -> float:
        until: float = struct.unpack_from("d", self._memory, 0)[0]
        return until


_hand: Hand | None = None


def share_hand() -> Hand:
    """The hand that this process shares with the horses it forks; empty before each fork but the one just made."""
    global _hand  # noqa: PLW0603 - a horse finds it by being a fork of its worker
    if _hand is None:
        _hand = Hand()
    return _hand


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
        # Their texts, too, are user code: what it returns or raises is looked at within its time.
        with _in_hand(timeout), _interrupts(), _deadline(timeout):
            return _attempt(row, handler, ended)
    except RowInterrupted:
        return ended(Outcome.INTERRUPTED, reason="its worker was told to stop")
    except RowTimeout as error:
        # By hand: to format an exception is to ask those before it for their texts, which may never come.
        trace = f"Traceback (most recent call last):\n{''.join(traceback.format_tb(error.__traceback__))}RowTimeout\n"
        return ended(Outcome.TIMED_OUT, reason=f"ran longer than its timeout of {timeout:g} s", traceback=trace)


def _attempt(row: StartedRow, handler: Call, ended: Callable[..., Ended]) -> Ended:
    try:
        return ended(Outcome.DONE, result=_as_text(handler(row.values, *row.claim.for_handler)))
    except (RowInterrupted, RowTimeout):
        raise
    except RetryLater as asked:
        try:
            later = RetryLater(asked.seconds)
        except Exception as error:  # user code: a subclass that went round our __init__
            return ended(Outcome.FAILED, reason=_say(error), traceback=_trace())
        return ended(Outcome.POSTPONED, reason=str(later), postpone=later.seconds)
    except Fail as error:
        return ended(Outcome.FAILED, reason=_say(error), traceback=_trace(), final=True)
    except CommandFailed as error:
        if _all_told and error.signalled:
            return ended(Outcome.INTERRUPTED, reason="everything here was told to stop")
        return ended(Outcome.FAILED, reason=_say(error), traceback=_trace())
    except BaseException as error:  # user code: sys.exit() and KeyboardInterrupt end the row, not its worker
        return ended(Outcome.FAILED, reason=_say(error), traceback=_trace())


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


def silence_alarm() -> None:
    """Switch off the alarm that RQ has set for its job: user code is over, and our own writing has no deadline."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt_asked() -> bool:
    """Whether the worker has asked this horse to stop: begin no further row."""
    return _interrupt_asked


def _on_interrupt(signum: int, frame: Any) -> None:
    global _interrupt_asked  # noqa: PLW0603 - a signal handler has no other place
    _interrupt_asked = True
    if _interruptible:
        raise RowInterrupted


@contextlib.contextmanager
def _in_hand(seconds: float) -> Iterator[None]:
    hand = share_hand()
    hand.take(seconds)
    try:
        yield
    finally:
        hand.empty()


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
    except (RowInterrupted, RowTimeout):
        raise
    except Exception as error:  # user data: any error, from any __str__
        return json.dumps(f"a {_name(result)} that can't be kept ({_name(error)})")


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
