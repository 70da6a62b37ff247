"""When history is forgotten: a little at a time, by whoever leads, and rarely when there is nothing to forget."""

from __future__ import annotations

from nih_sched import clock
from nih_sched.store import Desk
from nih_sched.store.pruning import Pruning

SHARE = 0.05  # seconds of each turn
EVERY = 1.0  # seconds between turns while there is more to do
ROUND = 600.0  # seconds between rounds
SOON = 15.0  # seconds between rounds where what is done is hardly kept at all
BRIEF = 3600.0  # seconds: kept for less than that is hardly kept


class Pruner:
    """One producer's. Two at once would harm nothing.

    Args:
        desk: the source's.
        done: seconds for which done claims are kept.
        others: seconds for which all others are.
    """

    def __init__(self, desk: Desk, done: float, others: float) -> None:
        self._pruning = Pruning(desk, done, others)
        self._round = SOON if min(done, others) < BRIEF else ROUND
        self._after = 0
        self._next = clock.boot() + EVERY

    def turn(self) -> None:
        """Forget for a moment, if it is time.

        Raises:
            SQLAlchemyError: the database is away.
        """
        now = clock.boot()
        if now < self._next:
            return
        self._next = now + EVERY
        while clock.boot() - now < SHARE:
            pruned = self._pruning.chunk(self._after)
            self._after = pruned.last or 0
            if pruned.last is None:
                while self._pruning.fold():
                    pass
                self._next = now + self._round
                return
