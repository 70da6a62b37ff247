"""How many rows travel in one RQ job: as many as run in about two seconds, from how long rows have run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from nih_sched import broker, clock
from nih_sched.model import Claim
from nih_sched.store import Looks, Progress
from nih_sched.store.claims import TAKEN

AIM = 2.0  # seconds of work in one job: what RQ and two commits cost it, some 15 ms, is little of that
MOST = TAKEN  # rows in one job: it carries rows of one claim
FIRST_EVERY = 0.02  # seconds between looks until some rows have run, and while the size grows
LOOK_EVERY = 0.2  # seconds between looks at how long rows have run
BEHIND_EVERY = 5.0  # seconds between counts of ready rows of which there should be plenty
REMEMBERED = 100  # claims of ours whose run times are looked at
CALM = 5.0  # seconds in which no rows have come back, after which twice as many may travel together
GROWTH = 8  # by which the size changes at most from look to look: of the first rows, the short ones end first


class Batches:
    """The size of one producer's batches."""

    def __init__(self, looks: Looks, fixed: int) -> None:
        """Of size `fixed` if that isn't 0."""
        self._looks = looks
        self._fixed = fixed
        self._recent: deque[int] = deque(maxlen=REMEMBERED)
        self._alone: deque[int] = deque(maxlen=REMEMBERED)  # those that didn't wait for others of their job
        self._ran: set[int] = set()  # those of which that was seen
        self._size, self._most = 1, MOST
        self._calm_at = 0.0
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
        """See, from time to time, how long rows have run, and how many came back that should have."""
        now = clock.monotonic()
        if self._fixed or not self._recent or now < self._next_look:
            return
        progress = self._looks.progress(self._recent)
        shrinks = self._came_back(progress, now)
        found = fitting(_run_times(progress, self._alone))
        before = self._size
        self._size = min(found or before, GROWTH * before, self._most)
        grows = found is not None and self._size < min(found, self._most)
        self._next_look = now + (FIRST_EVERY if shrinks or grows or found is None else LOOK_EVERY)

    def _came_back(self, progress: Mapping[int, Progress], now: float) -> bool:
        # A row that leaves something behind, or takes long, has all behind it in its job given back: a job of a
        # thousand would run one row, and the next job too. What is gone after it has run was pruned.
        ran = {claim for claim, one in progress.items() if one.seconds is not None and not one.runs}
        came_back = sum(claim not in progress and claim not in self._ran for claim in self._recent)
        new = len(ran - self._ran)
        shrinks = came_back > new
        if shrinks:
            part = self._size * new // (new + came_back)
            self._most, self._calm_at = max(1, self._size // GROWTH, part), now + CALM
        elif now >= self._calm_at:
            self._most, self._calm_at = min(MOST, 2 * self._most), now + CALM
        self._ran = ran
        self._recent = deque((claim for claim in self._recent if claim in progress), maxlen=REMEMBERED)
        return shrinks


def _run_times(progress: Mapping[int, Progress], alone: Collection[int]) -> list[float]:
    """How long rows have run, and those that run by now, if they didn't wait for others and take longer than most.

    One that began a moment ago says nothing yet.
    """
    ran = [one.seconds for one in progress.values() if one.seconds is not None and not one.runs]
    if not ran:
        return []
    mean = statistics.fmean(ran)
    running = [one.seconds for claim, one in progress.items() if one.runs and claim in alone and one.seconds]
    return ran + [seconds for seconds in running if seconds > mean]


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
