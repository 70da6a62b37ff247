"""How many rows travel together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nih_sched import batches
from nih_sched.batches import MOST, Batches, fitting, rq_ids
from nih_sched.model import Claim
from nih_sched.settings import Settings, load
from nih_sched.store import Looks, Progress


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ([], None),
        ([0.0], MOST),
        ([0.001], MOST),
        ([0.005] * 3, 400),
        ([0.02], 100),
        ([0.05], 40),
        ([0.51], 3),
        ([1.01], 1),
        ([3600.0], 1),
        ([0.001] * 99 + [60.0], 1),
        ([0.001] * 99 + [1.0], 51),
        ([0.001, 0.002, 0.003] * 20, 974),
    ],
)
def test_a_batch_is_two_seconds_of_work(seconds: list[float], size: int | None) -> None:
    assert fitting(seconds) == size


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_a_batch_has_some_rows_whatever_was_measured(seconds: list[float]) -> None:
    assert 1 <= cast(int, fitting(seconds)) <= MOST


@given(st.integers(0, 500), st.integers(1, 100), st.integers(1, 20))
def test_batches_leave_no_worker_idle(count: int, size: int, workers: int) -> None:
    ids = rq_ids(count, size, workers)
    assert len(ids) == count
    sizes = Counter(ids)
    assert all(number <= size for number in sizes.values())
    assert len(sizes) >= min(count, workers) / 2
    assert ids == sorted(ids, key=ids.index)  # rows next to each other travel together


class Measured:
    """Claims' progress as the ledger would tell it; of those that it isn't told of the same as of the others."""

    def __init__(self, seconds: float | None = None) -> None:
        self.others = Progress(False, seconds)
        self.told: dict[int, Progress | None] = {}  # None: it was given back
        self.asked: list[int] = []

    def progress(self, ids: Iterable[int]) -> dict[int, Progress]:
        self.asked += (claims := list(ids))
        found = {claim: self.told.get(claim, self.others) for claim in claims}
        return {claim: one for claim, one in found.items() if one is not None}


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock's, that the test sets."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(batches.clock, "monotonic", lambda: made.now)
    return made


def sent(sizes: Batches, *ids: int) -> None:
    sizes.sent([Claim(n, (n,), "x") for n in ids])


def look(sizes: Batches, time: SimpleNamespace, after: float = batches.LOOK_EVERY) -> int:
    time.now += after
    sizes.look()
    return sizes.size


def test_it_begins_with_one_and_follows_what_was_measured(time: SimpleNamespace) -> None:
    measured: Any = Measured()
    sizes = Batches(cast(Looks, measured), 0)
    assert look(sizes, time) == 1
    assert measured.asked == []
    sent(sizes, 7, 8)
    assert look(sizes, time) == 1  # none has ended yet
    assert measured.asked == [7, 8]
    measured.others = Progress(False, 0.0)
    assert look(sizes, time, 0.0) == 1  # not looked at each time
    for size in (8, 64, 512, MOST, MOST):  # the first rows to end may be the shortest ones
        assert look(sizes, time, batches.FIRST_EVERY) == size
    sent(sizes, 9)
    look(sizes, time)
    assert measured.asked[-3:] == [7, 8, 9]
    measured.others = Progress(False, 2.0)
    assert look(sizes, time) == 1


def test_a_row_that_runs_counts_if_it_waited_for_none_and_takes_longer_than_others(time: SimpleNamespace) -> None:
    measured: Any = Measured()
    sizes = Batches(cast(Looks, measured), 0)
    sent(sizes, 1, 2)
    measured.told = {1: Progress(True, 0.001), 2: Progress(True, 0.001)}
    assert look(sizes, time) == 1  # of rows of a minute, say, that have begun just now
    measured.told[1] = Progress(False, 0.5)
    assert look(sizes, time) == 4
    measured.told[2] = Progress(True, 60.0)
    sent(sizes, 3)
    measured.told[3] = Progress(True, 60.0)  # it may have waited
    assert look(sizes, time) == 1
    measured.told[2] = Progress(False, 0.5)
    assert look(sizes, time) == 4


def test_batches_of_which_most_rows_come_back_get_smaller(time: SimpleNamespace) -> None:
    measured: Any = Measured(0.001)
    sizes = Batches(cast(Looks, measured), 0)
    sent(sizes, 1)
    assert [look(sizes, time) for _ in range(4)] == [8, 64, 512, MOST]
    numbers = itertools.count(2)
    found = []
    for _ in range(6):
        ids = [next(numbers) for _ in range(10)]
        measured.told = dict.fromkeys(ids[1:])
        sent(sizes, *ids)
        found.append(look(sizes, time))
    assert found == [250, 31, 3, 1, 1, 1]
    sent(sizes, next(numbers))
    assert look(sizes, time) == 1
    assert [look(sizes, time, batches.CALM) for _ in range(3)] == [2, 4, 8]
    measured.told = dict.fromkeys(range(next(numbers)))  # what has run may be pruned
    assert look(sizes, time) == 8


def test_batches_get_smaller_near_the_end(time: SimpleNamespace) -> None:
    counted = list[int]()
    looks: Any = Measured(0.02)
    looks.ready_up_to = lambda limit: counted.append(limit) or min(limit, ready)
    sizes = Batches(cast(Looks, looks), 0)
    sizes.sent([Claim(1, (1,), "x")])
    for _ in range(3):
        look(sizes, time)
    assert sizes.size_for(2) == sizes.size == 100
    ready = 10_000
    sizes.note_claim(800, 800, 100, 2, 2)
    assert (sizes.size_for(2), counted) == (100, [1600])
    sizes.note_claim(800, 800, 100, 2, 2)
    assert counted == [1600]  # plenty were left, a moment ago
    sizes.note_claim(401, 401, 100, 2, 2)
    assert counted == [1600] * 2
    sizes.note_claim(601, 601, 100, 2, 1)  # another producer has a worker too
    assert counted == [1600] * 3
    time.now += batches.BEHIND_EVERY
    sizes.note_claim(1, 1, 100, 2, 2)
    assert counted == [1600] * 4  # by now others may have claimed them
    ready = 200
    sizes.note_claim(1500, 1500, 100, 2, 2)
    assert (sizes.size_for(2), counted) == (50, [1600] * 5)
    ready = 3
    sizes.note_claim(200, 200, 50, 2, 2)
    assert sizes.size_for(2) == 12  # an eighth at least
    sizes.note_claim(3, 200, 12, 2, 2)
    assert (sizes.size_for(2), len(counted)) == (100, 6)  # that was all


def test_a_fixed_size_asks_nobody() -> None:
    measured: Any = Measured(5.0)
    sizes = Batches(cast(Looks, measured), 20)
    sizes.sent([Claim(1, (1,), "x")])
    sizes.look()
    assert sizes.size == 20
    assert measured.asked == []


def test_the_size_may_be_named_auto() -> None:
    assert load({"batch_size": "auto"}, {}).batch_size == load({}, {}).batch_size == 0
    assert load({"batch_size": "7"}, {}).batch_size == 7
    assert Settings(batch_size=7).batch_size == 7
