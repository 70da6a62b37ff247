"""Waits that a signal can end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from nih_sched import clock


def test_a_nudge_ends_a_wait_from_a_signals_handler_and_the_next_one_when_it_came_early() -> None:
    nudge = clock.Nudge()
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: nudge.give())
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        began = time.monotonic()
        nudge.wait(10)
        assert time.monotonic() - began < 5
        for _ in range(100_000):  # more than a pipe holds
            nudge.give()
        began = time.monotonic()
        nudge.wait(10)
        assert time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGUSR2, before)
        nudge.close()


def test_a_nudge_that_doesnt_come_is_waited_for() -> None:
    nudge = clock.Nudge()
    began = time.monotonic()
    nudge.wait(0.05)
    assert time.monotonic() - began >= 0.04
    nudge.close()


def test_a_bell_may_be_rung_at_any_moment_of_a_wait() -> None:
    """As a signal's handler does, which runs between two steps of whatever the main thread is at."""

    def steps_of_a_wait(ring_at: int) -> int:
        bell, step = clock.Bell(), 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal step
            step += 1
            if step == ring_at:
                bell.ring()
            return trace

        sys.settrace(trace)
        bell.wait(0.01)
        sys.settrace(None)
        assert bell.rung == (step >= ring_at)
        if bell.rung:
            assert bell.wait(60)
            assert bell.wait(60)
        return step

    def ring_at_each() -> None:
        number = 1
        while steps_of_a_wait(number) >= number:
            number += 1
        rung.append(number)

    rung: list[int] = []
    thread = threading.Thread(target=ring_at_each, daemon=True)  # it has a trace of its own, and may not come back
    thread.start()
    thread.join(10)
    assert rung
    assert rung[0] > 3
