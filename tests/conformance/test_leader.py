"""Which producer rescues: one leads, and another takes over when it is gone, is dead, or its time has passed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from conformance.places import Place, together
from nih_sched.dialects import After, Now
from nih_sched.store import Desk, source_facts
from nih_sched.store.desk import register
from nih_sched.store.leader import HOLDS, Leader

Lives = Callable[[int, int], bool]


def everyone(pid: int, born: int) -> bool:
    """All processes live."""
    return True


def nobody(pid: int, born: int) -> bool:
    """None does."""
    return False


def leader(desk: Desk, number: int, host: str = "here") -> Leader:
    """A producer with this number, as name and pid."""
    return Leader(desk, f"producer {number}", host, number, number * 100)


def ends_in(desk: Desk, seconds: float | None) -> None:
    """Have the present leader's time end in so many seconds by the database's clock, or have nobody lead."""
    sources = desk.ledger.sources
    values = {"leader_until": After(seconds)} if seconds is not None else {"leader": None, "leader_until": None}
    statement = update(sources).where(sources.c.name == desk.source.name).values(values)
    assert desk.transact(lambda connection: connection.execute(statement).rowcount) == 1


def left(desk: Desk) -> float:
    """For how many seconds the present leader leads."""
    sources = desk.ledger.sources
    query = select(sources.c.leader_until, Now()).where(sources.c.name == desk.source.name)
    until, now = desk.read(lambda connection: connection.execute(query).one())
    return float((until - now).total_seconds())


def test_one_leads_and_goes_on_leading(place: Place) -> None:
    place.jobs()
    desk, other = place.desk(), place.desk()
    one, two = leader(desk, 1), leader(other, 2)
    assert one.lead(everyone) is True
    assert 0 < left(desk) <= HOLDS + 0.01
    for _ in range(3):
        assert two.lead(everyone) is False
        assert one.lead(everyone) is True
    ends_in(desk, 1.0)
    assert one.lead(everyone) is True
    assert left(desk) > 1.1  # it was renewed


def test_it_goes_on_leading_after_its_time_if_nobody_else_came(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    one = leader(desk, 1)
    one.lead(everyone)
    ends_in(desk, -100.0)
    assert one.lead(everyone) is True
    assert left(desk) > 0


def test_another_takes_over_once_its_time_has_passed(place: Place) -> None:
    place.jobs()
    desk, other = place.desk(), place.desk()
    one, two = leader(desk, 1), leader(other, 2, host="there")
    one.lead(everyone)
    ends_in(desk, 5.0)
    assert two.lead(everyone) is False
    ends_in(desk, -0.1)
    assert two.lead(everyone) is True
    assert one.lead(everyone) is False  # it learns that it leads no more
    assert two.lead(everyone) is True


def test_another_takes_over_at_once_from_a_process_that_died_on_the_same_host(place: Place) -> None:
    place.jobs()
    desk, other = place.desk(), place.desk()
    asked: list[tuple[int, int]] = []

    def dead(pid: int, born: int) -> bool:
        asked.append((pid, born))
        return False

    leader(desk, 1).lead(everyone)
    assert leader(other, 2, host="there").lead(dead) is False  # of another host's processes nothing is known
    assert asked == []
    assert leader(other, 3).lead(everyone) is False
    assert leader(other, 3).lead(dead) is True
    assert asked == [(1, 100)]
    assert leader(desk, 1).lead(everyone) is False


def test_another_leads_at_once_after_a_resignation(place: Place) -> None:
    place.jobs()
    desk, other = place.desk(), place.desk()
    one, two = leader(desk, 1), leader(other, 2)
    one.lead(everyone)
    two.resign()  # it doesn't lead: nothing happens
    assert two.lead(everyone) is False
    one.resign()
    one.resign()
    assert two.lead(everyone) is True
    one.resign()
    assert two.lead(everyone) is True
    assert one.lead(everyone) is False


@pytest.mark.parametrize("ahead", [3 * HOLDS, 3600.0, 10 * 365 * 86400.0])
def test_an_instant_far_ahead_holds_nobody_up(place: Place, ahead: float) -> None:
    # The database's clock was set back since it was written.
    place.jobs()
    desk, other = place.desk(), place.desk()
    leader(desk, 1).lead(everyone)
    ends_in(desk, HOLDS - 1.0)
    assert leader(other, 2).lead(everyone) is False
    ends_in(desk, ahead)
    assert leader(other, 2).lead(everyone) is True
    assert 0 < left(desk) <= HOLDS + 0.01


def test_each_source_has_its_own_leader_and_keeps_it_when_it_is_written_down_again(place: Place) -> None:
    place.jobs()
    desk, other = place.desk(), place.desk(ready_val="new")
    assert leader(desk, 1).lead(everyone) is True
    assert leader(other, 2).lead(everyone) is True
    assert leader(desk, 2).lead(everyone) is False
    register(place.desk())
    assert leader(desk, 2).lead(everyone) is False
    assert leader(desk, 1).lead(everyone) is True
    assert source_facts(desk.engine, desk.ledger, desk.source.name) == desk.source.to_json()


def test_of_a_source_that_is_not_written_down_nobody_is_leader(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    place.run("DELETE FROM nih_sched_sources")
    assert leader(desk, 1).lead(everyone) is False


def test_names_of_any_length_are_told_apart(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    host = f"{'h' * 80} {'b' * 36} pid:[4026531836]"
    one, two = (Leader(desk, "producer-" * 50 + str(pid), host, pid, 2**40) for pid in (2**22, 2**22 + 1))
    assert one.lead(everyone) is True
    assert two.lead(everyone) is False
    assert one.lead(everyone) is True
    assert two.lead(nobody) is True


FREE = ["nobody led", "its time has passed", "far ahead", "it is dead"]


@pytest.mark.parametrize("how", FREE)
def test_of_several_that_race_for_a_free_seat_one_leads(place: Place, how: str) -> None:
    place.jobs()
    desks = [place.desk() for _ in range(5)]
    rounds = 12
    barrier = threading.Barrier(4)
    led: list[list[int]] = [[] for _ in range(rounds)]
    dead = 10**6  # from this pid on
    lives: Lives = everyone if how != "it is dead" else lambda pid, born: pid < dead

    def producer(number: int) -> None:
        desk = desks[number]
        for turn in range(rounds):
            if number == 1:
                # A leader that nobody meets again: not one of those that race.
                ends_in(desk, None)
                assert Leader(desk, "old", "here", dead + turn, 7).lead(everyone)
                ends_in(desk, {"nobody led": None, "its time has passed": -1.0, "far ahead": 1e6}.get(how, 5.0))
            barrier.wait(60)
            if leader(desk, number).lead(lives):
                led[turn].append(number)
            barrier.wait(60)

    together(*(lambda n=n: producer(n) for n in range(1, 5)))  # type: ignore[misc]
    assert [len(found) for found in led] == [1] * rounds


def test_a_leader_that_revives_while_another_takes_over_is_not_beside_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its time has passed; another has seen that; now it renews; then the other writes.
    place.jobs()
    desk, other = place.desk(), place.desk()
    one, two = leader(desk, 1), leader(other, 2)
    one.lead(everyone)
    ends_in(desk, -1.0)
    look = Desk.read
    renewed: list[bool] = []

    def look_and_be_overtaken(self: Desk, work: Any) -> Any:
        found = look(self, work)
        if self is other and not renewed:
            renewed.append(False)
            renewed[0] = one.lead(everyone)
        return found

    monkeypatch.setattr(Desk, "read", look_and_be_overtaken)
    took = two.lead(everyone)
    assert renewed == [True]
    assert took is False
    assert one.lead(everyone) is True
