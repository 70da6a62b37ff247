"""What a worker knows of its horse: which row it has in hand, until when, and what came of those before.

Memory that both share: a horse killed or stuck in C code can't say anything any more.
"""

from __future__ import annotations

import mmap
import multiprocessing
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nih_sched.model import Ended
from nih_sched.runner.ahead import Ahead
from nih_sched.runner.locks import acquire_or_die
from nih_sched.runner.tail import Tail

# Until when user code may run (0.0: none runs), the claim in hand (0: none), how many rows were taken, the length of
# what was told, how much of that is written down, whether no further row may be taken, the claim that is cancelled,
# of which rows that it has begun the worker last saw that all that wait are wanted, and when; each is a native word,
# which is never seen half written, unless by pack_into(), which zeroes it first. What was told begins at byte _START.
_UNTIL, _CLAIM, _TAKEN, _TOLD, _WRITTEN, _CLOSED, _CANCELLED, _WHICH, _WANTED, _START = *range(9), 128
_SIZE, _CLAIM_AND_TAKEN = struct.Struct("=I"), struct.Struct("@qq")
_BOTH = slice(8 * _CLAIM, 8 * _CLAIM + _CLAIM_AND_TAKEN.size)


class Hand:
    """Made before the fork, by the worker; a horse that died may have had the lock, so the next one gets a new one."""

    ROOM = 4 * 2**20  # bytes for outcomes: each one's texts are cut to 64 KB, escaped at most six times as long

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _START + self.ROOM)
        head = memoryview(self._memory)[:_START]
        self._words, self._instants = head.cast("q"), head.cast("d")
        context = multiprocessing.get_context("fork")
        self.tail, self.ahead = Tail(), Ahead()
        self._turn, self._pen = context.Lock(), context.Lock()

    @contextmanager
    def held_back(self, patience: float) -> Iterator[bool]:
        """In the worker: keep the horse from taking a row; whether that could be had."""
        had = self._turn.acquire(timeout=patience)
        try:
            yield had
        finally:
            if had:
                self._turn.release()

    @contextmanager
    def writing(self, patience: float | None = None) -> Iterator[bool]:
        """Keep the other one from writing outcomes; whether that could be had.

        Args:
            patience: seconds, in the worker; None, in the horse: a worker that keeps it waiting for long is frozen.
        """
        had = True
        if patience is None:
            acquire_or_die(self._pen)
        else:
            had = self._pen.acquire(timeout=patience)
        try:
            yield had
        finally:
            if had:
                self._pen.release()

    def reset(self) -> None:
        """In the worker: before each job."""
        self._memory[:_START] = bytes(_START)
        self.ahead.reset()

    def take(self, claim_id: int) -> bool:
        """In the horse: the next row's turn; False when the worker has given the rest of the batch back."""
        acquire_or_die(self._turn)
        try:
            if self._words[_CLOSED]:
                return False
            self._memory[_BOTH] = _CLAIM_AND_TAKEN.pack(claim_id, self._words[_TAKEN] + 1)
            return True
        finally:
            self._turn.release()

    def run_until(self, instant: float) -> None:
        """In the horse: user code begins, and has until then by time.monotonic(); 0.0: it has returned."""
        self._instants[_UNTIL] = instant

    def tell(self, ended: Ended) -> int:
        """In the horse: how the row ended, before that is written: it is kept even if we die.

        Returns:
            how many bytes have been told since forget(); 0: there is no room left for this.
        """
        text, words = ended.told(), self._words
        at = _START + words[_TOLD]
        end = at + _SIZE.size + len(text)
        if end > _START + self.ROOM:
            return 0
        self._memory[at:end] = _SIZE.pack(len(text)) + text
        words[_TOLD] = end - _START
        words[_CLAIM] = 0
        return end - _START

    def close(self) -> int:
        """In the worker: have no further row taken; return the claim in hand. The caller holds it back."""
        self._words[_CLOSED] = 1
        return self.claim

    def cancel(self) -> None:
        """In the worker: the row in hand is cancelled. The caller holds it back, and then signals."""
        self._words[_CANCELLED] = self.claim

    @property
    def is_cancelled(self) -> bool:
        """In the horse: whether the row in hand is."""
        return self.claim != 0 and self._words[_CANCELLED] == self.claim

    def unwritten(self) -> list[bytes]:
        """What was told and isn't written down yet, oldest first."""
        at, end = _START + self._words[_WRITTEN], _START + self._words[_TOLD]
        texts: list[bytes] = []
        while at < end:
            (length,) = _SIZE.unpack_from(self._memory, at)
            texts.append(self._memory[at + _SIZE.size : at + _SIZE.size + length])
            at += _SIZE.size + length
        return texts

    def note_written(self, texts: Sequence[bytes]) -> None:
        """These first ones are written down; the horse may have told more meanwhile. The caller has the pen."""
        self._words[_WRITTEN] += sum(_SIZE.size + len(text) for text in texts)

    def forget(self) -> None:
        """In the horse: all that was told is written down; begin anew. The caller has the pen."""
        self._words[_WRITTEN] = 0
        self._words[_TOLD] = 0

    def note_wanted(self, number: int, instant: float) -> None:
        """In the worker: of what was begun at its horse's ask of this number all that wait were wanted then."""
        self._instants[_WANTED] = 0.0
        self._words[_WHICH] = number
        self._instants[_WANTED] = instant

    def wanted_at(self, number: int) -> float:
        """In the horse: when that was, by time.monotonic(); 0.0: its worker hasn't looked."""
        instant = self._instants[_WANTED]
        return instant if self._words[_WHICH] == number else 0.0  # in this order: the other writes them the other way

    @property
    def is_behind(self) -> bool:
        """Whether something was told that isn't written down yet."""
        return self._words[_WRITTEN] < self._words[_TOLD]

    @property
    def told(self) -> int:
        """How many bytes have been told since forget()."""
        return self._words[_TOLD]

    @property
    def written(self) -> int:
        """In the horse: how many bytes, of what was told since forget(), the worker has written down."""
        return self._words[_WRITTEN]

    @property
    def claim(self) -> int:
        """The claim whose row is in hand; 0 while none is."""
        return self._words[_CLAIM]

    @property
    def taken(self) -> int:
        """How many rows of the job have been taken in hand."""
        return self._words[_TAKEN]

    def late(self, slack: float) -> bool:
        """In the worker: whether the horse should have come out of user code `slack` seconds ago."""
        until = self._instants[_UNTIL]
        return bool(until > 0.0 and time.monotonic() > until + slack)


_hand: Hand | None = None


def share_hand() -> Hand:
    """The hand that this process shares with its horse, or with its worker."""
    return _hand if _hand is not None else new_hand()


def new_hand() -> Hand:
    """In the worker, before it forks a horse."""
    global _hand  # noqa: PLW0603 - a horse finds it by being a fork of its worker
    _hand = Hand()
    return _hand
