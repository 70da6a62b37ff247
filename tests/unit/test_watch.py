"""What stands still, and for how long: told from looks alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nih_sched.reconciler.watch import Standstill

settings.register_profile("patient", deadline=None)  # a noisy machine is no failure
settings.load_profile("patient")

GAP = 5.0  # seconds


def test_what_stands_is_counted_from_the_first_look_at_it() -> None:
    watch: Standstill[str] = Standstill()
    assert watch.see(100.0, {"a": 1}, GAP) == {"a": 0.0}
    assert watch.see(101.0, {"a": 1}, GAP) == {"a": 1.0}
    assert watch.see(101.0, {"a": 1}, GAP) == {"a": 1.0}
    assert watch.see(104.5, {"a": 1}, GAP) == {"a": 4.5}


def test_what_has_moved_is_counted_anew() -> None:
    watch: Standstill[str] = Standstill()
    watch.see(100.0, {"a": 1, "b": 1}, GAP)
    assert watch.see(103.0, {"a": 2, "b": 1}, GAP) == {"a": 0.0, "b": 3.0}
    assert watch.see(104.0, {"a": 2, "b": 1}, GAP) == {"a": 1.0, "b": 4.0}
    assert watch.see(105.0, {"a": 1, "b": 1}, GAP) == {"a": 0.0, "b": 5.0}  # back where it was, but it has moved


def test_what_was_gone_is_counted_anew() -> None:
    watch: Standstill[str] = Standstill()
    watch.see(100.0, {"a": 1, "b": 1}, GAP)
    assert watch.see(102.0, {"b": 1}, GAP) == {"b": 2.0}
    assert watch.see(104.0, {"a": 1, "b": 1}, GAP) == {"a": 0.0, "b": 4.0}
    assert watch.see(105.0, {}, GAP) == {}
    assert watch.see(106.0, {"b": 1}, GAP) == {"b": 0.0}


def test_nothing_is_known_of_the_time_in_which_we_did_not_look() -> None:
    # While we were frozen or cut off, so may the database have been: nobody could renew.
    watch: Standstill[str] = Standstill()
    watch.see(100.0, {"a": 1}, GAP)
    assert watch.see(105.0, {"a": 1}, GAP) == {"a": 5.0}
    assert watch.see(110.1, {"a": 1}, GAP) == {"a": 0.0}
    assert watch.see(111.0, {"a": 1}, GAP) == {"a": pytest.approx(0.9)}


def test_the_gap_is_that_of_the_present_look() -> None:
    watch: Standstill[str] = Standstill()
    watch.see(100.0, {"a": 1}, 1.0)
    assert watch.see(104.0, {"a": 1}, 10.0) == {"a": 4.0}
    assert watch.see(106.0, {"a": 1}, 1.0) == {"a": 0.0}


def test_who_could_not_look_begins_anew() -> None:
    watch: Standstill[str] = Standstill()
    watch.cut_off()
    watch.see(100.0, {"a": 1}, GAP)
    watch.see(104.0, {"a": 1}, GAP)
    watch.cut_off()
    watch.cut_off()
    assert watch.see(104.1, {"a": 1}, GAP) == {"a": 0.0}
    assert watch.see(105.1, {"a": 1}, GAP) == {"a": 1.0}


def test_things_and_places_may_be_of_any_kind() -> None:
    watch: Standstill[int] = Standstill()
    watch.see(1.0, {7: "rq 1", 8: None, 9: ("x", 1)}, GAP)
    assert watch.see(2.0, {7: "rq 2", 8: None, 9: ("x", 1)}, GAP) == {7: 0.0, 8: 1.0, 9: 1.0}


LOOKS = st.lists(
    st.one_of(
        st.none(),  # we were cut off
        st.tuples(st.integers(0, 12), st.dictionaries(st.sampled_from("abc"), st.integers(0, 2))),
    ),
    max_size=40,
)


@given(LOOKS)
def test_it_never_says_more_than_was_seen(looks: list[tuple[int, dict[str, int]] | None]) -> None:
    watch: Standstill[str] = Standstill()
    now = 1000
    seen: list[tuple[int, dict[str, int]]] = []  # since the last gap
    for look in looks:
        if look is None:
            watch.cut_off()
            seen = []
            continue
        wait, things = look
        now += wait
        if wait > GAP:
            seen = []
        seen.append((now, things))
        expected = {}
        for thing, place in things.items():
            since = now
            for instant, then in reversed(seen):
                if then.get(thing) != place:
                    break
                since = instant
            expected[thing] = now - since
        assert watch.see(now, things, GAP) == expected
