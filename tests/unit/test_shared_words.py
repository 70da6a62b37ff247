"""What two processes share is never seen half written, though nobody locks it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from nih_sched.keeper import Slots
from nih_sched.runner.ahead import BEGUN, Ahead
from nih_sched.runner.hand import Hand
from nih_sched.runner.tail import Tail

Both = tuple[Callable[[], object], Callable[[], bool]]  # what writes the same again and again; whether it stands there


def slot() -> Both:
    (its,) = Slots(1).slots
    its.occupy(os.getpid(), 1, "lease", 5.0)
    return lambda: its.vouch(5.0), lambda: its._get("kept") == 5.0


def deadline() -> Both:
    hand = Hand()
    hand.run_until(1.0)
    return lambda: hand.run_until(1.0), lambda: hand.late(0.0)


def in_hand() -> Both:
    hand = Hand()
    hand.take(7)
    return lambda: hand.take(7), lambda: hand.claim == 7 and hand.taken > 0


def ahead() -> Both:
    its = Ahead()
    its.give([])
    return lambda: its.give([]), lambda: its._stage == BEGUN


def output() -> Both:
    tail = Tail()
    tail.write(b"x")
    return lambda: tail.write(b"x"), lambda: tail.total > 0


@pytest.mark.parametrize("made", [slot, deadline, in_hand, ahead, output])
def test_words_are_never_seen_half_written(made: Callable[[], Both]) -> None:
    write, stands = made()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            while os.getppid() == parent:
                write()
        finally:
            os._exit(0)
    try:
        end = time.monotonic() + 0.5
        looks = 0
        while time.monotonic() < end:
            assert stands()
            looks += 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert looks > 1000
