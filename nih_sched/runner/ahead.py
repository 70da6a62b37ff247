"""Rows that a worker begins while its horse runs those before them: what they say of it to each other.

To begin a thousand takes the database some 20 ms, for which a horse whose rows take 1 ms each would stand still.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from nih_sched.model import Claim, StartedRow
from nih_sched.runner.locks import PATIENCE, UNHEARD, acquire_or_die

NOTHING, ASKED, BEGINNING, BEGUN, FAILED = range(5)
# Which of these it is, and how long what follows; native words are read whole, and written whole but by pack_into().
_HEAD, _WORD = struct.Struct("@qq"), struct.Struct("@q")
BRIEFLY = 0.5  # seconds for which a worker waits for its horse, or for a database, while its horse may wait for it
TURN = 0.001  # seconds between a horse's looks whether its worker has done it


class Ask(NamedTuple):
    """What a horse asks for."""

    number: int  # of the asks of its job
    run: str  # its own: what the worker begins is the horse's to end
    facts: str  # the source, as the horse knows it
    claim_ids: Sequence[int]


class Ahead:
    """Made before the fork, as the hand is whose part it is."""

    ROOM = 4 * 2**20  # bytes for rows; more are begun by the horse itself

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD.size + self.ROOM)
        self._lock = multiprocessing.get_context("fork").Lock()

    def reset(self) -> None:
        """In the worker: before each job."""
        self._put(NOTHING)

    def ask(self, ask: Ask) -> None:
        """In the horse: have these begun."""
        self._put(ASKED, pickle.dumps(tuple(ask)))

    def collect(self) -> list[StartedRow] | None:
        """In the horse: what the worker has begun, or is beginning; None when the horse has to do it itself.

        It may have been begun all the same, by the horse's run: to begin it once more harms nothing.
        """
        deadline = time.monotonic() + PATIENCE
        while self._withdraw() == BEGINNING:
            if time.monotonic() >= deadline:
                os._exit(UNHEARD)
            time.sleep(TURN)
        if self._stage != BEGUN:
            return None
        said = pickle.loads(self._said())  # noqa: S301 - by our own parent
        self._put(NOTHING)
        return [StartedRow(Claim(*claim), *more) for claim, *more in said]

    @property
    def has_failed(self) -> bool:
        """In the horse: whether the worker couldn't, when it was asked last."""
        return self._stage == FAILED

    def _withdraw(self) -> int:
        acquire_or_die(self._lock)
        try:
            if self._stage == ASKED:
                self._put(NOTHING)
            return self._stage
        finally:
            self._lock.release()

    @property
    def is_asked(self) -> bool:
        """In the worker: whether its horse has asked for rows."""
        return self._stage == ASKED

    def accept(self) -> Ask | None:
        """In the worker: what was asked for, which must be given then; None when it isn't any more."""
        if not self._lock.acquire(timeout=BRIEFLY):
            return None  # its horse has died, or was frozen, just while it had it
        try:
            if self._stage != ASKED:
                return None
            ask = Ask(*pickle.loads(self._said()))  # noqa: S301 - by our own child
            self._put(BEGINNING)
            return ask
        finally:
            self._lock.release()

    def give(self, rows: Sequence[StartedRow] | None) -> bool:
        """In the worker: these have begun; None: the horse has to see to it.

        Returns:
            whether the horse has got them.
        """
        text = b""
        if rows is not None:
            try:
                text = pickle.dumps([(tuple(row.claim), *row[1:]) for row in rows])
            except Exception:  # a value of a type that can't be: the horse reads it itself
                rows = None
        fits = rows is not None and len(text) <= self.ROOM
        self._put(BEGUN if fits else FAILED, text if fits else b"")
        return fits

    @property
    def _stage(self) -> int:
        stage: int = _HEAD.unpack_from(self._memory)[0]
        return stage

    def _said(self) -> bytes:
        return self._memory[_HEAD.size : _HEAD.size + _HEAD.unpack_from(self._memory)[1]]

    def _put(self, stage: int, said: bytes = b"") -> None:
        self._memory[_HEAD.size : _HEAD.size + len(said)] = said
        self._memory[8:16] = _WORD.pack(len(said))
        self._memory[0:8] = _WORD.pack(stage)  # last: whoever sees it sees the rest
