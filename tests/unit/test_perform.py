"""One attempt of one row: whatever the handler does, it ends, and the process is as it was."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

from nih_sched.errors import Fail, RetryLater, RowInterrupted, RowTimeout
from nih_sched.model import Claim, Ended, Outcome, StartedRow
from nih_sched.runner.handler import FunctionHandler
from nih_sched.runner.perform import INTERRUPT, alarms, install_interrupts, interrupt_asked, perform

HERE = sys.modules["nih_sched.runner.perform"]  # the package's attribute of that name is the function
SIGNALS = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, INTERRUPT)


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(HERE, "_interrupt_asked", False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == 0, "a test left the alarm clock running"


def performed(function: Callable[..., Any], timeout: float = 30.0, unreadable: str | None = None) -> Ended:
    handler = FunctionHandler("f", function, (), ())
    return perform(StartedRow(Claim(1, (1,), "rq", tries=3), {}, unreadable), handler, timeout)


def raising(error: BaseException) -> Callable[[], None]:
    def handler() -> None:
        raise error

    return handler


# How a handler may end


def test_what_it_returns_is_kept_as_json() -> None:
    ended = performed(lambda: {"größe": [1, 2.5, None, "🎈"]})
    assert ended.outcome is Outcome.DONE
    assert ended.result == '{"größe": [1, 2.5, null, "🎈"]}'
    assert (ended.reason, ended.traceback, ended.final) == (None, None, False)
    assert performed(lambda: None).result is None
    assert performed(lambda: 0).result == "0"


def test_it_is_timed() -> None:
    assert 0.05 <= performed(lambda: time.sleep(0.05)).seconds < 5


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (Unprintable, "a Unprintable that can't be kept (RuntimeError)"),
        (circle, "a list that can't be kept (ValueError)"),
        (deep, "a list that can't be kept (RecursionError)"),
        (lambda: {(1, 2): 3}, "a dict that can't be kept (TypeError)"),
        (lambda: b"\0\xff", "b'\\x00\\xff'"),
    ],
    ids=["str() raises", "circular", "deep", "odd keys", "bytes"],
)
def test_a_result_that_cannot_be_kept_fails_no_row(make: Callable[[], Any], kept: str) -> None:
    ended = performed(make)
    assert ended.outcome is Outcome.DONE
    assert ended.result is not None
    assert json.loads(ended.result) == kept


def test_an_exception_is_a_failure_with_its_traceback() -> None:
    ended = performed(raising(LookupError("no such thing")))
    assert (ended.outcome, ended.final, ended.reason) == (Outcome.FAILED, False, "LookupError: no such thing")
    assert ended.traceback is not None
    assert "raise error\nLookupError: no such thing\n" in ended.traceback
    assert performed(raising(ValueError())).reason == "ValueError"


def test_fail_is_final() -> None:
    ended = performed(raising(Fail("never again")))
    assert (ended.outcome, ended.final, ended.reason) == (Outcome.FAILED, True, "Fail: never again")
    assert ended.traceback is not None

    class Refused(Fail):
        pass

    assert performed(raising(Refused("no"))).final
    assert performed(raising(Refused("no"))).reason == "Refused: no"


def test_retry_later_postpones() -> None:
    ended = performed(raising(RetryLater(0.25)))
    assert (ended.outcome, ended.postpone, ended.final) == (Outcome.POSTPONED, 0.25, False)
    assert ended.reason == "asked to be run again in 0.25 s"
    assert performed(raising(RetryLater(0))).postpone == 0.0


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), 1e11, 1e300])
def test_retry_later_takes_no_absurd_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="RetryLater takes seconds from 0"):
        RetryLater(seconds)


def test_a_retry_later_that_went_round_its_check_is_a_failure() -> None:
    class RateLimited(RetryLater):
        def __init__(self, seconds: Any = None) -> None:
            if seconds is not None:
                self.seconds = seconds

    for error in (RateLimited(), RateLimited(-5.0), RateLimited(float("nan")), RateLimited("soon")):
        assert performed(raising(error)).outcome is Outcome.FAILED
    assert performed(raising(RateLimited(5))).postpone == 5.0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (SystemExit(), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError(), "CancelledError"),
        (BaseExceptionGroup("several", [ValueError(1), KeyboardInterrupt()]), "BaseExceptionGroup: several"),
    ],
)
def test_nothing_that_a_handler_raises_ends_its_worker(error: BaseException, reason: str) -> None:
    ended = performed(raising(error))
    assert ended.outcome is Outcome.FAILED
    assert ended.reason is not None
    assert ended.reason.startswith(reason)


@pytest.mark.parametrize("inner", [RuntimeError, SystemExit, KeyboardInterrupt, RecursionError])
@pytest.mark.parametrize("base", [Exception, Fail, RetryLater, BaseException])
def test_an_exception_whose_text_cannot_be_read_is_one_too(
    base: type[BaseException], inner: type[BaseException]
) -> None:
    class Odd(base):  # type: ignore[valid-type,misc]
        def __str__(self) -> str:
            raise inner("inside")

    def handler() -> None:
        raise Odd(1)  # an argument of this type would end pytest when it shows a failure

    ended = performed(handler)
    if base is RetryLater:
        assert ended.outcome is Outcome.POSTPONED
    else:
        assert ended.outcome is Outcome.FAILED
        assert ended.reason == "Odd: (its text can't be read)"
        assert ended.traceback is not None
        assert "raise Odd" in ended.traceback


def test_endless_recursion_is_a_failure() -> None:
    def handler() -> None:
        handler()

    ended = performed(handler)
    assert ended.outcome is Outcome.FAILED
    assert ended.reason is not None
    assert ended.reason.startswith("RecursionError: ")


def test_a_row_that_cannot_be_read_fails_for_good_and_is_not_run() -> None:
    ended = performed(lambda: pytest.fail("was run"), unreadable="a column's value can't be read: x")
    assert (ended.outcome, ended.final) == (Outcome.FAILED, True)
    assert ended.reason == "a column's value can't be read: x"
    assert ended.error == "a column's value can't be read"


# Timeouts


def polite() -> None:
    time.sleep(60)


def busy() -> None:
    while True:
        pass


def swallowing() -> None:
    while True:
        try:  # noqa: SIM105 - as it is written out there
            time.sleep(0.005)
        except Exception:
            pass


def hiding() -> None:
    try:
        time.sleep(60)
    finally:
        time.sleep(0.01)


async def waiting() -> None:
    await asyncio.sleep(60)


async def spinning() -> None:
    while True:
        await asyncio.sleep(0)


async def blocking() -> None:
    time.sleep(60)


@pytest.mark.parametrize("handler", [polite, busy, swallowing, hiding, waiting, spinning, blocking])
def test_a_row_ends_at_its_timeout(handler: Callable[[], Any]) -> None:
    ended = performed(handler, timeout=0.2)
    assert ended.outcome is Outcome.TIMED_OUT
    assert ended.reason == "ran longer than its timeout of 0.2 s"
    assert ended.traceback is not None
    assert "RowTimeout" in ended.traceback
    # One alarm is enough; asyncio's own loop may swallow the first, if it rings there and not in the coroutine.
    assert 0.2 <= ended.seconds < (20.0 if handler is spinning else 1.1)


def test_a_handler_that_swallows_everything_once_is_told_again() -> None:
    def handler() -> None:
        try:
            time.sleep(60)
        except BaseException:
            time.sleep(60)

    ended = performed(handler, timeout=0.1)
    assert ended.outcome is Outcome.TIMED_OUT
    assert 1.0 <= ended.seconds < 5


def test_a_timeout_cannot_be_caught_as_an_exception() -> None:
    assert not issubclass(RowTimeout, Exception)
    assert not issubclass(RowInterrupted, Exception)


def test_no_alarm_is_left_over() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    for one in (lambda: None, raising(ValueError()), raising(SystemExit()), polite):
        performed(one, timeout=0.1)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) is handler


def test_many_rows_have_each_their_own_timeout() -> None:
    with alarms():
        assert performed(lambda: 1, timeout=0.5).outcome is Outcome.DONE
        assert performed(lambda: time.sleep(0.6), timeout=30).outcome is Outcome.DONE  # it rings for the row before
        assert performed(lambda: time.sleep(0.6), timeout=1.2).outcome is Outcome.DONE
        began = time.monotonic()
        assert performed(polite, timeout=0.8).outcome is Outcome.TIMED_OUT
        assert performed(polite, timeout=0.1).outcome is Outcome.TIMED_OUT  # shorter than what the clock was set to
        assert 0.9 <= time.monotonic() - began < 1.5  # not only when it rings again, a second later
        time.sleep(0.2)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_row_that_used_the_alarm_clock_itself_leaves_the_next_one_its_timeout() -> None:
    def own() -> None:
        signal.alarm(50)
        signal.alarm(0)

    def longer() -> None:
        signal.alarm(50)

    with alarms():
        for handler in (own, longer):
            assert performed(handler, timeout=1.0).outcome is Outcome.DONE
            assert performed(polite, timeout=1.0).outcome is Outcome.TIMED_OUT


@pytest.mark.many  # coverage's tracer holds a lock of its own, and a timeout raised inside it blocks for ever
def test_rows_at_the_edge_of_their_timeout_leave_no_alarm_either() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    outcomes = set()
    for n in range(600):
        end = time.perf_counter() + 0.001 + (n % 60 - 30) * 2e-6

        def spin(end: float = end) -> None:
            while time.perf_counter() < end:
                pass

        outcomes.add(performed(spin, timeout=0.001).outcome)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) is handler
    assert outcomes <= {Outcome.DONE, Outcome.TIMED_OUT}


def test_rqs_own_alarm_is_put_back_with_the_time_it_had_left() -> None:
    def job() -> None:
        rqs = signal.getsignal(signal.SIGALRM)
        assert performed(lambda: time.sleep(0.3)).outcome is Outcome.DONE
        assert performed(polite, timeout=0.1).outcome is Outcome.TIMED_OUT
        assert signal.getsignal(signal.SIGALRM) == rqs
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0.1 < left <= 1.6
        time.sleep(10)

    began = time.monotonic()
    with pytest.raises(JobTimeoutException), UnixSignalDeathPenalty(2, JobTimeoutException):
        job()
    assert 1.9 <= time.monotonic() - began < 6


def test_rqs_alarm_that_was_due_meanwhile_comes_after_the_row() -> None:
    done = []

    def job() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        done.append(performed(lambda: time.sleep(0.2)).outcome)
        time.sleep(10)

    with pytest.raises(JobTimeoutException), UnixSignalDeathPenalty(1, JobTimeoutException):
        job()
    assert done == [Outcome.DONE]


def test_a_thread_that_gets_no_signals_runs_its_rows_all_the_same() -> None:
    found: list[Ended] = []
    thread = threading.Thread(target=lambda: found.append(performed(lambda: 7, timeout=0.001)))
    thread.start()
    thread.join()
    assert found[0].result == "7"


# Interruption


def signal_soon(number: int, seconds: float = 0.1) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("handler", [polite, busy, swallowing, hiding, waiting, blocking])
def test_the_worker_may_interrupt_a_row(handler: Callable[[], Any]) -> None:
    install_interrupts()
    signal_soon(INTERRUPT)
    ended = performed(handler, timeout=5)
    assert (ended.outcome, ended.reason) == (Outcome.INTERRUPTED, "its worker was told to stop")
    assert ended.seconds < 3
    assert interrupt_asked()


def test_no_further_row_is_begun_then() -> None:
    install_interrupts()
    os.kill(os.getpid(), INTERRUPT)  # outside of user code: nothing is cut short
    assert interrupt_asked()
    assert performed(lambda: pytest.fail("was run")).outcome is Outcome.INTERRUPTED


def test_everybody_elses_signals_leave_the_row_alone() -> None:
    install_interrupts()

    def handler() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return "done"

    assert performed(handler).result == '"done"'
    assert not interrupt_asked()
