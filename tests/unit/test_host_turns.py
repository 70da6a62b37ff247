"""Short turns of a process, as Linux tells of them."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

import pytest

from nih_sched import host


def turn() -> int:
    """Of this process, in nanoseconds: sched_runtime of sched_getattr(2)."""
    raw = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number, 0, raw, 48, 0) == 0
    return int.from_bytes(raw.raw[24:32], sys.byteorder)


def in_a_child(work: Callable[[], int]) -> int:
    """What a new child answers."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writer, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = int(answer.read())
    os.waitpid(pid, 0)
    return told


def short() -> int:
    host.wake_promptly()
    return turn()


def from_short() -> int:
    host.wake_promptly()
    return in_a_child(turn)


def batch() -> int:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return short()


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing of the kind")
@pytest.mark.parametrize(
    ("work", "is_short"),
    [
        (short, True),
        (from_short, False),  # what a row starts is none of ours
        (batch, False),
    ],
)
def test_a_process_takes_short_turns_and_what_it_starts_does_not(work: Callable[[], int], is_short: bool) -> None:
    if turn() == 0:
        pytest.skip("this Linux, older than 6.12, has one length for all")
    assert turn() != host.TURN
    assert (in_a_child(work) == host.TURN) is is_short
