"""The worker's end of a horse that serves many jobs."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

import pytest

from nih_sched.worker.warm import BEGUN, DONE, LENGTH, WarmHorse


class Cut(Exception):
    """As RQ's alarm raises, in the middle of whatever a worker is at while it waits for its horse."""


def cut_short(warm: WarmHorse, at: int) -> bool:
    """Listen to a horse that has something to say, until a step of that; whether there was such a step."""
    steps = itertools.count(1)
    cuts = list[bool]()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if next(steps) == at:
            raise Cut
        return trace

    def listen() -> None:
        sys.settrace(trace)
        try:
            warm.answer(5)
            cuts.append(False)
        except Cut:
            cuts.append(True)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=listen)  # which has a trace of its own
    thread.start()
    thread.join()
    return cuts[0]


def test_no_answer_is_lost_by_whatever_cuts_the_listening_short() -> None:
    for at in itertools.count(1):
        warm = WarmHorse(lambda: lambda order, hear: True, lambda: None)
        try:
            warm.hand_over({})
            assert warm.answer(5) == BEGUN
            warm.heard()
            was_cut = cut_short(warm, at)
            assert warm.answer(5) == DONE
            assert warm.answer(5) == DONE
            warm.heard()
            assert warm.answer(0.01) is None
        finally:
            warm.bury()
        if not was_cut:
            break
    assert at > 3


def test_an_order_arrives_as_it_was_given() -> None:
    order = {"job": "é\n", "raw": {bytes(range(256)): bytes(range(256)) * 4096, b"": b""}, "created": 0.1 + 0.2}
    warm = WarmHorse(lambda: lambda heard, hear: heard == order == hear(), lambda: None)
    try:
        for _ in range(2):
            warm.hand_over(order)
            warm.hand_over(order)
            assert warm.answer(5) == BEGUN
            warm.heard()
            assert warm.answer(5) == DONE
            warm.heard()
    finally:
        warm.bury()


def test_a_word_cut_short_by_the_workers_end_is_no_order(capfd: pytest.CaptureFixture[str]) -> None:
    for said in (b"", b"\0", (9).to_bytes(LENGTH) + b"{"):
        warm = WarmHorse(lambda: lambda order, hear: True, lambda: None)
        warm._socket.sendall(said)
        _, status, _ = warm.bury(5)
        assert status == 0
    assert capfd.readouterr().err == ""
