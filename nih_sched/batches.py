"""How many rows travel in one RQ job: as many as run in about two seconds, from how long rows have run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from nih_sched import broker, clock
from nih_sched.model import Claim
from nih_sched.store import Looks
from nih_sched.store.claims import TAKEN

AIM = 2.0  # seconds of work in one job: what RQ and two commits cost it, some 15 ms, is little of that
MOST = TAKEN  # rows in one job: it carries rows of one claim
FIRST_EVERY = 0.02  # seconds between looks until some rows have run, and while the size grows
LOOK_EVERY = 0.2  # seconds between looks at how long rows have run
BEHIND_EVERY = 5.0  # seconds between counts of ready rows of which there should be plenty
REMEMBERED = 100  # claims of ours whose run times are looked at
GROWTH = 8  # by which the size grows at most from look to look: of the first rows, the short ones end first


class Batches:
    """The size of one producer's batches."""

    def __init__(self, looks: Looks, fixed: int) -> None:
        """Of size `fixed` if that isn't 0."""
        self._looks = looks
        self._fixed = fixed
        self._recent: deque[int] = deque(maxlen=REMEMBERED)
        self._alone: deque[int] = deque(maxlen=REMEMBERED)  # those that didn't wait for others of their job
        self._size = 1
        self._next_look = self._next_count = 0.0
        self._behind = 0.0  # ready rows that the last claim left, as far as counted; 0: unknown

    def sent(self, claims: Sequence[Claim]) -> None:
        """Remember some of these claims, to see how long they will have run."""
        some = [claim.id for claim in claims[:: max(1, len(claims) // 10)]]
        self._recent.extend(some)
        if self.size == 1:
            self._alone.extend(some)

    @property
    def size(self) -> int:
        """How many rows the next jobs may carry. Nothing is known at first: then it is one."""
        return self._fixed or self._size

    def size_for(self, workers: int) -> int:
        """The same for so many workers: near the end batches get smaller, so that all of them come to it together."""
        size = self.size
        return min(size, max(size // 8, math.ceil(self._behind / (2 * workers)))) if self._behind else size

    def note_claim(self, claimed: int, room: int, size: int, workers: int, ours: int) -> None:
        """See how many ready rows a claim has left, exactly if they are few.

        Counted to several times that, and not again until they should have become few: of many it takes a while. Others
        may be claiming too, each what its workers need.

        Args:
            claimed: how many rows were.
            room: how many could have been.
            size: of the batches that they were put into.
            workers: as of size_for().
            ours: how many of them are this producer's.
        """
        if claimed != room or size <= 1 or self._fixed:
            self._behind = 0
            return
        few, now = 2 * workers * self.size, clock.monotonic()
        self._behind -= claimed * max(1.0, workers / ours)
        if self._behind < few or now >= self._next_count:
            self._behind, self._next_count = self._looks.ready_up_to(4 * few), now + BEHIND_EVERY

    @property
    def ahead(self) -> int:
        """How many jobs should wait in Redis for each worker: enough that none idles, else rows wait in the table.

        A job of several rows takes its time, unless there are so many because they take none.
        """
        return 2 if not self._fixed and 1 < self._size < MOST else 4

    def look(self) -> None:
        """See, from time to time, how long rows have run."""
        if not self._fixed and self._recent and clock.monotonic() >= self._next_look:
            found = fitting(self._looks.run_times(list(self._recent), set(self._alone)))
            before = self._size
            self._size = min(found or before, GROWTH * before)
            self._next_look = clock.monotonic() + (LOOK_EVERY if found == self._size else FIRST_EVERY)


def fitting(seconds: Sequence[float]) -> int | None:
    """How many rows fit into one job if they run as long as these did; None when none has run.

    n rows take n * mean seconds, give or take sqrt(n) * deviation: that and twice the deviation must fit, so that a few
    long rows among many short ones keep batches small. https://en.wikipedia.org/wiki/Standard_error
    """
    if not seconds:
        return None
    mean = max(statistics.fmean(seconds), 1e-6)
    spread = statistics.pstdev(seconds, mean)
    root = (math.sqrt(spread * spread + mean * AIM) - spread) / mean  # of n: mean * n + 2 * spread * sqrt(n) = AIM
    return max(1, min(MOST, int(root * root + 1e-9)))


def rq_ids(count: int, size: int, hungry: int) -> list[str]:
    """RQ ids for so many claims, each for `size` claims at most, and so that so many workers get some of them."""
    size = max(1, min(size, math.ceil(count / hungry)))
    return [rq_id for rq_id in (broker.new_rq_id() for _ in range(0, count, size)) for _ in range(size)][:count]
