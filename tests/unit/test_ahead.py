"""Rows that a worker begins for its horse: what they say of it, across a real fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from nih_sched.model import Claim, StartedRow
from nih_sched.runner import ahead as module
from nih_sched.runner import locks
from nih_sched.runner.ahead import Ahead, Ask

ASK = Ask(1, "run", "facts", [3, 4])
ROWS = [
    StartedRow(
        Claim(3, ("k", 1), "rq", first=2, earlier=1), {"a": Decimal("1.50"), "b": datetime(2026, 1, 1, tzinfo=UTC)}
    ),
    StartedRow(Claim(4, ("k", 2), "rq"), {}, unreadable="no"),
]


@contextmanager
def horse(work: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """Run it in a child; what is given waits for its exit code: 0 if what it returned is true."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    yield lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def accepted(ahead: Ahead) -> Ask:
    while not ahead.is_asked:
        time.sleep(0.001)
    ask = ahead.accept()
    assert ask is not None
    return ask


def test_a_worker_gives_what_its_horse_has_asked_for() -> None:
    ahead = Ahead()
    assert not ahead.is_asked

    def work() -> bool:
        ahead.ask(ASK)
        time.sleep(0.1)
        return ahead.collect() == ROWS

    with horse(work) as code:
        assert accepted(ahead) == ASK
        assert ahead.accept() is None
        assert ahead.give(ROWS)
        assert code() == 0
    assert not ahead.has_failed


def test_a_horse_waits_for_a_worker_that_is_at_it() -> None:
    ahead = Ahead()
    ahead.ask(ASK)
    assert ahead.accept() == ASK
    with horse(lambda: ahead.collect() == ROWS[:1]) as code:
        time.sleep(0.2)
        ahead.give(ROWS[:1])
        assert code() == 0


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    ahead = Ahead()
    ahead.ask(ASK)
    ahead.accept()
    with horse(ahead.collect) as code:
        assert code() == locks.UNHEARD


def test_what_the_worker_hasnt_begun_its_horse_does_itself() -> None:
    ahead = Ahead()
    ahead.ask(ASK)
    assert ahead.collect() is None
    assert not ahead.has_failed
    assert not ahead.is_asked
    assert ahead.accept() is None


def values(value: Any) -> list[StartedRow]:
    return [StartedRow(Claim(3, (3,), "rq"), {"a": value})]


@pytest.mark.parametrize("rows", [None, values("x" * Ahead.ROOM), values(threading.Lock())])
def test_so_it_does_what_the_worker_cannot_give(rows: list[StartedRow] | None) -> None:
    ahead = Ahead()
    ahead.ask(ASK)
    ahead.accept()
    assert not ahead.give(rows)
    assert ahead.collect() is None
    assert ahead.has_failed
    ahead.ask(ASK)  # it may be asked again
    ahead.accept()
    ahead.give(ROWS)
    assert ahead.collect() == ROWS
    ahead.ask(ASK)
    ahead.reset()
    assert not ahead.is_asked


def test_a_worker_does_not_wait_for_a_horse_that_died_with_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BRIEFLY", 0.1)
    ahead = Ahead()
    ahead.ask(ASK)
    with horse(ahead._lock.acquire) as code:
        assert code() == 0
    assert ahead.accept() is None
    assert not ahead.give(None)
