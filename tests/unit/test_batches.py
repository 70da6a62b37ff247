"""How many rows travel together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nih_sched import batches
from nih_sched.batches import MOST, Batches, fitting, rq_ids
from nih_sched.model import Claim
from nih_sched.settings import Settings, load
from nih_sched.store import Looks


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
    """Run times as the ledger would tell them."""

    def __init__(self, *seconds: float) -> None:
        self.seconds: Sequence[float] = seconds
        self.asked: list[int] = []

    def run_times(self, ids: list[int], alone: set[int]) -> Sequence[float]:
        self.asked += ids
        self.alone = alone
        return self.seconds


def test_it_begins_with_one_and_follows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(batches.clock, "monotonic", lambda: now)
    measured: Any = Measured()
    sizes = Batches(cast(Looks, measured), 0)
    sizes.look()
    assert sizes.size == 1
    assert measured.asked == []
    sizes.sent([Claim(n, (n,), "x") for n in (7, 8)])
    sizes.look()
    assert sizes.size == 1  # none has ended yet
    assert measured.asked == [7, 8]
    measured.seconds = [0.0]
    sizes.look()
    assert sizes.size == 1  # not looked at each time
    for size in (8, 64, 512, MOST, MOST):  # the first rows to end may be the shortest ones
        now += batches.FIRST_EVERY
        sizes.look()
        assert sizes.size == size
    sizes.sent([Claim(9, (9,), "x")])
    now += batches.LOOK_EVERY
    sizes.look()
    assert measured.asked[-3:] == [7, 8, 9]
    assert measured.alone == {7, 8}
    measured.seconds = [2.0]
    now += batches.LOOK_EVERY
    sizes.look()
    assert sizes.size == 1


def test_batches_get_smaller_near_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counted = 100.0, list[int]()
    monkeypatch.setattr(batches.clock, "monotonic", lambda: now)
    looks: Any = Measured(0.02)
    looks.ready_up_to = lambda limit: counted.append(limit) or min(limit, ready)
    sizes = Batches(cast(Looks, looks), 0)
    sizes.sent([Claim(1, (1,), "x")])
    for _ in range(3):
        sizes.look()
        now += batches.FIRST_EVERY
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
    now += batches.BEHIND_EVERY
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
