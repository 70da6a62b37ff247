"""Rows that a worker begins for its horse: under the horse's run and lease, as far as they may begin."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from conformance.places import Place, claim, finish, start, take
from nih_sched import host
from nih_sched.model import Claim, StartedRow
from nih_sched.runner import advance, cancelling
from nih_sched.runner.advance import Advance
from nih_sched.runner.ahead import Ask
from nih_sched.runner.cancelling import Waiting
from nih_sched.runner.hand import Hand
from nih_sched.store import Desk
from nih_sched.store.pauses import Pauses


def worker() -> Advance:
    slot, settings = SimpleNamespace(lease="lease"), SimpleNamespace(lease=120.0)
    site: Any = SimpleNamespace(slot=slot, settings=settings, worker="w", handler=SimpleNamespace(columns=("name",)))
    return Advance(site)


def begin(desk: Desk, hand: Hand, works: Advance, claims: list[Claim], number: int = 1) -> list[StartedRow] | None:
    """What a horse has of it, that has asked for these."""
    hand.ahead.ask(Ask(number, "run", desk.facts, [one.id for one in claims]))
    assert works.is_asked
    works.begin(desk, os.getpid())
    return hand.ahead.collect()


def test_they_are_the_horses(place: Place, hand: Hand) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    take(desk, "lease")
    claims = claim(desk)
    start(desk, claims[0])
    rows = begin(desk, hand, worker(), claims[1:])
    assert rows is not None
    assert sorted((row.claim.key, row.values) for row in rows) == [((n,), {"name": f"n{n}"}) for n in (2, 3, 4)]
    assert place.states() == dict.fromkeys(range(1, 5), "Started")
    assert set(place.attempts("run", "lease", "worker")[1:]) == {("run", "lease", "w")}
    (held,) = place.run("SELECT horse, horse_born FROM nih_sched_leases")
    assert held == (os.getpid(), host.born(os.getpid()))
    assert all(finish(desk, [row.claim for row in rows]))


def test_what_may_not_begin_does_not(place: Place, hand: Hand) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    take(desk, "lease")
    claims = claim(desk)
    place.set(2, "Mine")
    start(desk, claims[2], run="another")
    rows = begin(desk, hand, worker(), claims)
    assert rows is not None
    assert {row.claim.key for row in rows} == {(1,), (4,)}
    assert place.states() == {1: "Started", 2: "Mine", 3: "Started", 4: "Started"}
    place.run("INSERT INTO jobs (id, state) VALUES (5, 'Pending')")
    (late,) = claim(desk)
    Pauses(desk).pause([desk.source.name], "ada", None)
    assert not begin(desk, hand, worker(), [late])


def test_what_it_cannot_do_is_left_to_the_horse(place: Place, hand: Hand) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    assert begin(desk, hand, worker(), claims) is None  # there is no lease
    assert hand.ahead.has_failed
    take(desk, "lease")
    hand.ahead.ask(Ask(1, "run", "others", [one.id for one in claims]))
    worker().begin(desk, os.getpid())
    assert hand.ahead.collect() is None  # the horse goes by other words
    assert place.states() == {1: "Queued", 2: "Queued"}
    assert len(begin(desk, hand, worker(), claims) or ()) == 2


def test_what_has_begun_unheard_is_the_horses_all_the_same(place: Place, hand: Hand) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    take(desk, "lease")
    claims = claim(desk)
    first = begin(desk, hand, worker(), claims)
    assert first is not None
    again = start(desk, *claims, columns=["name"], lease="lease")
    assert sorted(again) == sorted(first)
    assert start(desk, *claims, run="another") == []
    # An owner may have had other ideas since; nobody else could ever end what began.
    place.set(1, "Pending")
    place.run("DELETE FROM jobs WHERE id = 2")
    assert start(desk, *claims, columns=["name"], lease="lease") == []
    assert place.attempts("outcome", "open_key") == [("cancelled", None)] * 2
    assert len(claim(desk)) == 1


def test_whether_they_are_still_wanted_is_seen_for_the_horse(
    place: Place, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs(*["Pending"] * 6)
    desk = place.desk()
    take(desk, "lease")
    claims = claim(desk)
    start(desk, *claims[:2])
    works = worker()
    assert not works.is_due
    now = 1000.0
    monkeypatch.setattr("nih_sched.runner.advance.clock.monotonic", lambda: now)
    rows = begin(desk, hand, works, claims[2:])
    assert rows is not None
    looks: list[int] = []
    unwanted = cancelling.Cancels.unwanted

    def counted(self: Any, claims: Any) -> Any:
        looks.append(len(claims))
        return unwanted(self, claims)

    monkeypatch.setattr(cancelling.Cancels, "unwanted", counted)
    for one in claims[:2]:
        hand.take(one.id)
    waiting, own = Waiting(desk, rows, now, 1), Waiting(desk, rows, now)
    for number, row in enumerate(rows[:2]):
        now += cancelling.FRESH + 0.01
        assert works.is_due
        works.look(desk)
        assert not works.is_due
        assert hand.wanted_at(1) == now
        assert waiting.withdrawn(number) is None
        hand.take(row.claim.id)
    assert looks == [4, 4]  # the worker's alone: the first one is in hand
    assert own.withdrawn(0) is None
    assert looks.pop() == 4  # rows that the horse has begun itself it looks after itself
    place.set(rows[0].claim.key[0], "Cancelled")  # it has had its turn
    now += advance.LOOK_EVERY
    works.look(desk)
    assert hand.wanted_at(1) == now
    place.set(rows[3].claim.key[0], "Cancelled")
    now += cancelling.FRESH + 0.01
    works.look(desk)
    assert hand.wanted_at(1) < now
    assert waiting.withdrawn(2) is None
    assert waiting.withdrawn(3) is not None
    assert looks == [4, 4, 3, 3, 2]


def test_of_several_portions_it_looks_after_the_last(place: Place, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Pending"] * 6)
    desk = place.desk()
    take(desk, "lease")
    claims, works = claim(desk), worker()
    first, second = (begin(desk, hand, works, some, number) for number, some in enumerate((claims[:3], claims[3:]), 1))
    assert first
    assert second
    now = 1000.0
    monkeypatch.setattr("nih_sched.runner.cancelling.clock.monotonic", lambda: now)
    running, behind = Waiting(desk, first, now, 1), Waiting(desk, second, now, 2)
    place.set(first[1].claim.key[0], "Cancelled")
    hand.take(first[0].claim.id)
    now += cancelling.FRESH + 0.01
    works.look(desk)
    assert (hand.wanted_at(1), hand.wanted_at(2)) == (0.0, now)
    assert running.withdrawn(1) is not None
    monkeypatch.setattr(cancelling.Cancels, "unwanted", None)  # nobody else looks
    assert behind.withdrawn(1) is None


def test_a_horse_looks_ahead_as_far_as_it_comes_until_the_next_look(
    place: Place, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs(*["Pending"] * 100)
    desk = place.desk()
    rows = start(desk, *claim(desk, 100))
    now = 1000.0
    monkeypatch.setattr("nih_sched.runner.cancelling.clock.monotonic", lambda: now)
    monkeypatch.setattr(cancelling, "SOME", 5)
    waiting = Waiting(desk, rows, now)
    place.run("UPDATE jobs SET state = 'Cancelled'")
    assert waiting.withdrawn(9) is None  # they have just begun
    now += cancelling.FRESH + 0.01
    assert [n for n in range(10, 100) if waiting.withdrawn(n) is None] == []
    place.run("UPDATE jobs SET state = 'Started'")
    waiting = Waiting(desk, rows, now)
    now += cancelling.FRESH + 0.01
    assert waiting.withdrawn(10) is None
    place.run("UPDATE jobs SET state = 'Cancelled'")
    wanted = [n for n in range(10, 100) if waiting.withdrawn(n) is None]
    assert wanted == list(range(10, 10 + len(wanted)))
    assert 5 <= len(wanted) < 90
