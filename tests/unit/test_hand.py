"""What a worker and its horse share, across a real fork."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from nih_sched.model import TEXT_LIMIT, Claim, Ended, Outcome
from nih_sched.runner import locks
from nih_sched.runner.hand import Hand

Lock = Callable[[Hand, float], AbstractContextManager[bool]]

CLAIMS = [Claim(n, (n,), "rq") for n in range(1, 6)]


def in_a_horse(work: Callable[[], object]) -> int:
    """Run it in a child; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ids(hand: Hand) -> list[int]:
    return [Ended.claim_told(text) for text in hand.unwritten()]


def test_what_a_horse_had_in_hand_outlives_it() -> None:
    hand = Hand()
    assert (hand.claim, hand.taken, hand.unwritten(), hand.late(0.0)) == (0, 0, [], False)
    told = [Ended(CLAIMS[0], Outcome.DONE, at=1.5), Ended(CLAIMS[1], Outcome.FAILED, "größe\0", "trace", at=2.5)]

    def horse() -> None:
        for ended in told:
            assert hand.take(ended.claim.id)
            assert hand.tell(ended)
        hand.take(2**62)
        hand.run_until(time.monotonic() - 1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_horse(horse) == -signal.SIGKILL
    assert (hand.claim, hand.taken) == (2**62, 3)
    assert ids(hand) == [1, 2]
    first, second = (Ended.from_told(text, one.claim) for text, one in zip(hand.unwritten(), told, strict=True))
    assert first == told[0]
    assert (second.outcome, second.reason, second.traceback) == (Outcome.FAILED, "größe\\x00", "trace")
    assert hand.late(0.5)
    assert not hand.late(30.0)
    hand.reset()
    assert (hand.claim, hand.taken, hand.unwritten(), hand.late(0.0)) == (0, 0, [], False)


def test_the_worker_writes_what_was_told_and_the_horse_begins_anew() -> None:
    hand = Hand()
    for one in CLAIMS[:3]:
        hand.tell(Ended(one, Outcome.DONE, at=0.0))
    assert hand.is_behind
    with hand.writing(5.0) as had:
        assert had
        hand.note_written(hand.unwritten())
    assert not hand.is_behind
    assert hand.unwritten() == []

    def horse() -> None:
        assert hand.unwritten() == []
        hand.tell(Ended(CLAIMS[3], Outcome.DONE, at=0.0))
        assert ids(hand) == [4]
        with hand.writing():
            hand.forget()
        hand.tell(Ended(CLAIMS[4], Outcome.DONE, result="x", at=0.0))

    assert in_a_horse(horse) == 0
    assert ids(hand) == [5]


def test_no_row_is_taken_once_the_worker_has_closed_it() -> None:
    hand = Hand()
    assert in_a_horse(lambda: hand.take(7)) == 0
    with hand.held_back(5.0):
        assert hand.close() == 7

    def horse() -> None:
        assert not hand.take(8)

    assert in_a_horse(horse) == 0
    assert (hand.claim, hand.taken) == (7, 1)
    hand.reset()
    assert hand.take(8)


def test_a_horse_waits_while_its_worker_decides() -> None:
    hand = Hand()
    ready, told = os.pipe()

    def horse() -> None:
        os.write(told, b"x")
        assert not hand.take(2)

    hand.take(1)
    with hand.held_back(5.0):
        pid = os.fork()
        if pid == 0:
            try:
                horse()
                os._exit(0)
            finally:
                os._exit(1)
        os.read(ready, 1)
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        hand.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert hand.claim == 1
    os.close(ready)
    os.close(told)


@pytest.mark.parametrize("lock", [Hand.held_back, Hand.writing])
def test_a_horse_killed_with_a_lock_keeps_its_worker_for_its_patience_only(lock: Lock) -> None:
    hand = Hand()

    def horse() -> None:
        with lock(hand, 5.0):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_horse(horse) == -signal.SIGKILL
    with lock(hand, 0.05) as had:
        assert not had


def test_a_horse_runs_on_while_its_worker_writes() -> None:
    hand = Hand()
    with hand.writing(5.0):
        assert in_a_horse(lambda: hand.take(1) and hand.tell(Ended(CLAIMS[0], Outcome.DONE, at=0.0))) == 0
    assert ids(hand) == [1]


def test_a_horse_writes_after_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    hand = Hand()

    def horse() -> None:
        with hand.writing():
            hand.forget()

    with hand.writing(5.0):
        assert in_a_horse(horse) == locks.UNHEARD
    assert in_a_horse(horse) == 0


def test_it_says_when_there_is_no_room_left_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hand, "ROOM", 2000)
    hand = Hand()
    number = 0
    hand.take(1)
    while hand.tell(Ended(Claim(number + 1, (1,), "rq"), Outcome.DONE, result="x" * 100, at=0.0)):
        number += 1
        hand.take(number + 1)
    assert 5 < number < 20
    assert hand.claim == number + 1  # it has ended, and isn't told
    assert ids(hand) == list(range(1, number + 1))
    with hand.writing():
        hand.forget()
    assert hand.tell(Ended(Claim(number + 1, (1,), "rq"), Outcome.DONE, result="x" * 100, at=0.0))
    assert ids(hand) == [number + 1]


def test_the_longest_outcome_has_room() -> None:
    hand, text = Hand(), "\x01" * (10 * TEXT_LIMIT)
    assert hand.tell(Ended(CLAIMS[0], Outcome.FAILED, text, text, text, at=0.0))
    assert hand.tell(Ended(CLAIMS[1], Outcome.FAILED, text, text, text, at=0.0))
    assert ids(hand) == [1, 2]
