"""Waits that a signal can end."""

from __future__ import annotations

import os
import signal
import threading
import time

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
