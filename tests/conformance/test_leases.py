"""Leases: who is presumed alive, what may begin under a lease, and what becomes of a dead horse's attempts."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from conformance.places import (
    Events,
    Place,
    all_due,
    claim,
    failed,
    finish,
    leases_of,
    next_attempt,
    start,
    take,
    together,
)
from nih_sched.dialects import Now
from nih_sched.model import Claim, Fate, Outcome, State, open_key
from nih_sched.store import Desk, Lease, Looks, Retries
from nih_sched.store.records import LeaseLost
from nih_sched.store.running import orphaned


def one_of(desk: Desk, name: str) -> Lease:
    """The lease of this name."""
    (found,) = [lease for lease in leases_of(desk).all() if lease.id == name]
    return found


def left(desk: Desk, name: str) -> float:
    """For how many seconds the lease holds, by the database's clock."""
    leases = desk.ledger.leases
    query = select(leases.c.lease_until, Now()).where(leases.c.id == name)
    until, now = desk.read(lambda connection: connection.execute(query).one())
    return float((until - now).total_seconds())


# A lease's own life


def test_a_lease_says_whose_life_is_presumed(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = leases_of(desk)
    assert leases.all() == []
    leases.take("a", worker="w" * 500, host="h1 boot", pid=2**31, born=2**40, seconds=50.5)
    assert leases.all() == [Lease("a", "w" * 190, "h1 boot", 2**31, 2**40, None, None, 50.5, 0, None)]
    assert 0 < left(desk, "a") <= 50.51


def test_taking_a_lease_again_changes_nothing(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = take(desk, "a")
    leases.renew(["a"], 120.0)
    before = place.run("SELECT * FROM nih_sched_leases")
    leases.take("a", worker="another", host="there", pid=9, born=9, seconds=1.0)
    assert place.run("SELECT * FROM nih_sched_leases") == before
    leases.end("a", "its worker died")
    leases.take("a", worker="another", host="there", pid=9, born=9, seconds=1.0)
    assert one_of(desk, "a").died == "its worker died"


def test_a_renewal_moves_the_beat_and_the_end(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = take(desk, "a", "b", seconds=10.0)
    assert leases.renew(["a"], 300.0) == {"a"}
    assert leases.renew(["a"], 300.0) == {"a"}
    assert (one_of(desk, "a").beat, one_of(desk, "b").beat) == (2, 0)
    assert left(desk, "a") > 10.1 >= left(desk, "b")
    assert leases.renew(["b", "a"], 300.0) == {"a", "b"}
    assert leases.renew([], 300.0) == set()


def test_only_those_that_are_still_accepted_are_renewed(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = take(desk, "alive", "dead", "another's")
    assert leases.end("dead", "its lease ran out")
    before = one_of(desk, "dead"), left(desk, "dead")
    assert leases.renew(["alive", "dead", "never taken"], 1000.0) == {"alive"}
    assert leases.renew(["dead"], 1000.0) == set()
    assert one_of(desk, "dead") == before[0]
    assert left(desk, "dead") <= before[1]
    assert (one_of(desk, "alive").beat, one_of(desk, "another's").beat) == (1, 0)


def test_an_end_that_saw_an_older_beat_does_nothing(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = take(desk, "a")
    seen = one_of(desk, "a").beat
    leases.renew(["a"], 120.0)
    assert leases.end("a", "its lease ran out", seen) is False
    assert one_of(desk, "a").died is None
    assert leases.renew(["a"], 120.0) == {"a"}
    assert leases.end("a", "its lease ran out", one_of(desk, "a").beat) is True
    assert one_of(desk, "a").died == "its lease ran out"


def test_a_lease_ends_once(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = take(desk, "a", "b")
    assert leases.end("a", "x" * 1000) is True
    assert leases.end("a", "its lease ran out") is False
    assert leases.end("a", "its lease ran out", one_of(desk, "a").beat) is False
    assert one_of(desk, "a").died == "x" * 400
    assert leases.end("never taken", "its worker died") is False
    assert one_of(desk, "b").died is None


def test_a_renewal_and_several_ends_at_once_agree(place: Place) -> None:
    place.jobs()
    desks = [place.desk() for _ in range(4)]
    names = [f"lease {number}" for number in range(15)]
    take(desks[0], *names)
    barrier = threading.Barrier(4)
    ended: list[str] = []
    renewed: set[str] = set()

    def ender(desk: Desk) -> None:
        for name in names:
            barrier.wait(60)
            if leases_of(desk).end(name, "its lease ran out", beat=0):
                ended.append(name)

    def renewer(desk: Desk) -> None:
        for name in names:
            barrier.wait(60)
            renewed.update(leases_of(desk).renew([name], 120.0))

    together(*(lambda desk=desk: ender(desk) for desk in desks[1:]), lambda: renewer(desks[0]))  # type: ignore[misc]
    assert sorted([*ended, *renewed]) == sorted(names)  # each of them is either dead, once, or alive
    alive = {lease.id for lease in leases_of(desks[0]).all() if lease.died is None}
    assert alive == renewed


def test_a_released_lease_is_gone(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    leases = take(desk, "a", "b")
    leases.release("a")
    leases.release("a")
    assert [lease.id for lease in leases.all()] == ["b"]
    assert leases.renew(["a", "b"], 120.0) == {"b"}
    assert leases.end("a", "its worker died") is False


def test_leases_may_be_listed_by_host(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    take(desk, "a", "b", host="here")
    take(desk, "c", host="there")
    leases = leases_of(desk)
    leases.end("b", "its worker died")
    assert {lease.id: lease.died for lease in leases.all("here")} == {"a": None, "b": "its worker died"}
    assert [lease.id for lease in leases.all("there")] == ["c"]
    assert leases.all("elsewhere") == []
    assert len(leases.all()) == 3


def test_dead_leases_are_kept_while_an_attempt_is_left_to_be_ended(place: Place) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    leases = take(desk, "running", "over", "unused", "waiting", "alive")
    running, over, waiting, alive = claim(desk)
    start(desk, running, lease="running")
    start(desk, over, lease="over")
    finish(desk, over)
    start(desk, waiting, lease="waiting")
    finish(desk, waiting, Outcome.FAILED)  # its next attempt will have another lease
    start(desk, alive, lease="alive")
    for name in ("running", "over", "unused", "waiting"):
        leases.end(name, "its worker died")
    leases.forget_dead()
    assert {lease.id for lease in leases.all()} == {"running", "alive"}
    leases.forget_dead()
    finish(desk, [running, alive], Outcome.INTERRUPTED)
    leases.forget_dead()
    assert {lease.id for lease in leases.all()} == {"alive"}


# Starting under a lease


def test_a_start_renews_its_lease(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    take(desk, "a", "b", seconds=10.0)
    claims = claim(desk)
    assert len(start(desk, *claims[:2], lease="a", columns=["name"])) == 2
    found = one_of(desk, "a")
    assert found == replace(found, id="a", worker="worker of a", pid=1, born=100, horse=77, horse_born=88, died=None)
    assert found.beat == 1
    assert 10.1 < left(desk, "a") <= 120.01
    assert (one_of(desk, "b").beat, one_of(desk, "b").horse) == (0, None)
    assert place.attempts("lease", "worker") == [("a", "worker"), ("a", "worker"), (None, None)]
    start(desk, claims[2], lease="a")
    assert one_of(desk, "a").beat == 2


def test_the_ledger_keeps_under_which_lease_an_attempt_ran(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    take(desk, "a", "b")
    (one,) = claim(desk)
    start(desk, one, run="first", lease="a")
    finish(desk, one, Outcome.FAILED, run="first")
    assert place.attempts("of_claim", "lease") == [(None, None), (one.id, "a")]
    (second,) = start(desk, one, run="second", lease="b")
    finish(desk, second.claim, run="second")
    assert place.attempts("of_claim", "lease", "ended_by") == [(None, "b", "worker"), (one.id, "a", "worker")]


@pytest.mark.parametrize("how", ["dead", "missing"])
def test_a_start_under_a_lost_lease_begins_nothing(place: Place, how: str) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    leases = take(desk, "dead", "good")
    leases.end("dead", "its lease ran out")
    (retried,) = failed(desk)
    claims = claim(desk)
    before = place.states(), place.run("SELECT * FROM nih_sched_attempts"), leases.all()
    for chosen in ([retried], claims, [retried, *claims]):
        with pytest.raises(LeaseLost):
            start(desk, *chosen, run="dead one's", lease=how, columns=["name"])
        assert (place.states(), place.run("SELECT * FROM nih_sched_attempts"), leases.all()) == before
    rows = start(desk, retried, *claims, run="good one's", lease="good")
    assert {row.claim.attempt for row in rows} == {1, 2}
    assert set(place.attempts("run")) == {("good one's",), ("run",)}


def test_a_start_that_the_database_refuses_needs_its_lease_too(place: Place) -> None:
    place.jobs(
        *["Pending"] * 3,
        create="CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), name text, "
        "CHECK (id <> 2 OR state <> 'Started'))",
    )
    desk = place.desk()
    leases = take(desk, "dead", "good")
    leases.end("dead", "its worker died")
    claims = claim(desk)
    with pytest.raises(LeaseLost):
        start(desk, claims[1], lease="dead")
    with pytest.raises(LeaseLost):
        start(desk, *claims, lease="dead")
    assert place.attempts("run", "lease", "started_at") == [(None, None, None)] * 3
    rows = start(desk, *claims, lease="good")
    assert sorted(row.claim.key[0] for row in rows if row.refused) == [2]
    assert place.attempts("lease") == [("good",)] * 3
    assert one_of(desk, "good").beat > 0


def test_a_start_and_the_end_of_its_lease_at_once_agree(place: Place) -> None:
    place.jobs(*["Pending"] * 15)
    one, other = place.desk(), place.desk()
    claims = claim(one)
    take(one, *(str(wanted.id) for wanted in claims))
    barrier = threading.Barrier(2)
    began: set[int] = set()
    ended: set[int] = set()

    def starter() -> None:
        for wanted in claims:
            barrier.wait(60)
            try:
                began.update(row.claim.id for row in start(one, wanted, lease=str(wanted.id)))
            except LeaseLost:
                continue

    def ender() -> None:
        for wanted in claims:
            barrier.wait(60)
            if leases_of(other).end(str(wanted.id), "its lease ran out", beat=0):
                ended.add(wanted.id)

    together(starter, ender)
    # What begins has moved the beat; whose beat stands still begins nothing.
    assert not began & ended
    assert began | ended == {wanted.id for wanted in claims}
    assert {number for number, run in place.attempts("id", "run") if run} == began


# Attempts whose horse is dead


def orphans(desk: Desk, *dead: str, limit: int = 100) -> set[tuple[Claim, str, str]]:
    return set(orphaned(desk, dead, limit))


def rescue(desk: Desk, *dead: str, why: str = "its worker died: w") -> list[Fate | None]:
    """What the leader does with the orphans of these leases."""
    return [
        finish(desk, one, Outcome.INTERRUPTED, run=run, by="leader", reason=why)[0]
        for one, run, _ in orphans(desk, *dead)
    ]


def test_orphans_are_under_dead_leases_and_under_vanished_ones(place: Place) -> None:
    place.jobs(*["Pending"] * 9, "other", "other")
    desk, other = place.desk(), place.desk(ready_val="other")
    leases = take(desk, "dead", "dead too", "living", "vanished")
    dead, dead_too, living, vanished, unled, ended, waiting, unstarted, given = claim(desk)
    start(desk, dead, run="1", lease="dead")
    start(desk, dead_too, run="2", lease="dead too")
    start(desk, living, run="3", lease="living")
    start(desk, vanished, run="4", lease="vanished")
    start(desk, unled, run="5")
    start(desk, ended, run="6", lease="dead")
    finish(desk, ended, run="6")
    start(desk, waiting, run="7", lease="dead")
    finish(desk, waiting, Outcome.POSTPONED, run="7", postpone=600.0)
    start(desk, given, run="8", lease="dead")
    finish(desk, given, Outcome.INTERRUPTED, run="8")
    others, others_gone = claim(other)
    start(other, others, run="9", lease="dead")
    start(other, others_gone, run="10", lease="vanished")
    assert orphans(desk, "nothing") == set()  # none of those that are there is taken for gone
    leases.end("dead", "its worker died")
    leases.end("dead too", "its lease ran out")
    leases.release("vanished")
    gone = (vanished, "4", "vanished")
    assert orphans(desk, "dead", "dead too") == {(dead, "1", "dead"), (dead_too, "2", "dead too"), gone}
    assert orphans(desk, "dead") == {(dead, "1", "dead"), gone}
    assert orphans(desk) == {gone}
    assert orphans(other, "dead") == {(others, "9", "dead"), (others_gone, "10", "vanished")}
    assert len(orphans(desk, "dead", "dead too", limit=2)) == 2
    assert unstarted.id in {one.id for one in Retries(desk).unstarted()}


def test_an_orphan_that_has_spent_nothing_is_ready_again(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    leases = take(desk, "a")
    (one,) = claim(desk)
    start(desk, one, lease="a")
    leases.end("a", "its worker died")
    assert rescue(desk, "a") == [Fate(State.READY, 0, interruptions=1)]
    assert rescue(desk, "a") == []
    assert place.states() == {1: "Pending"}
    columns = "outcome, reason, ended_by, open_key, lease, late, interruptions"
    assert place.attempts(columns) == [("interrupted", "its worker died: w", "leader", None, "a", None, 1)]
    assert Looks(desk).open_claims_up_to(9) == 0
    (new,) = claim(desk)
    assert new.id != one.id
    assert len(start(desk, new, run="again")) == 1


def test_an_orphan_that_has_spent_tries_keeps_them_and_is_due_at_once(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=0.0)
    leases = take(desk, "a")
    (one,) = failed(desk)
    (second,) = start(desk, one, run="second", lease="a")
    leases.end("a", "its worker died")
    assert rescue(desk, "a") == [Fate(State.RETRYING, 1, 0.0, interruptions=1)]
    assert place.states() == {1: "Queued"}
    (head, _, past) = place.attempts(
        "of_claim", "attempt", "failures", "open_key", "lease", "run", "outcome", "ended_by"
    )
    assert head == (None, 3, 1, open_key(desk.rows.name, (1,)), None, None, None, None)
    assert past == (one.id, 2, 1, None, "a", "second", "interrupted", "leader")
    third = next_attempt(desk, one, "third")
    assert (third.attempt, third.failures, third.interruptions) == (3, 1, 1)
    assert second.claim.attempt == 2


def test_an_orphan_that_has_spent_tries_waits_to_be_sent(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=0.0)
    leases = take(desk, "a")
    (one,) = failed(desk)
    start(desk, one, run="second", lease="a")
    leases.release("a")
    rescue(desk)
    (due,) = all_due(desk, 1)
    assert (due.claim.id, due.claim.attempt, due.claim.failures) == (one.id, 3, 1)
    assert Retries(desk).unstarted() == []
    assert Retries(desk).take(due, "anew")
    assert [waiting.rq_id for waiting in Retries(desk).unstarted()] == ["anew"]


STALE = [outcome for outcome in Outcome if outcome is not Outcome.LOST]


@pytest.mark.parametrize("failures", [0, 1], ids=["the claim is closed", "the claim goes on"])
def test_a_stale_horse_changes_nothing_and_what_it_brings_is_noted(place: Place, failures: int, events: Events) -> None:
    place.jobs(*["Pending"] * len(STALE))
    desk = place.desk()
    leases = take(desk, "a")
    claims = failed(desk, len(STALE)) if failures else claim(desk)
    held = {row.claim.key: row.claim for row in start(desk, *claims, run="stale", lease="a")}
    leases.end("a", "its lease ran out")
    assert len(rescue(desk, "a")) == len(STALE)
    everything = "id, of_claim, open_key, attempt, failures, due_at, outcome, reason, ended_by, kept_key, result, run"
    before = place.states(), place.attempts(everything)
    assert place.attempts("late").count((None,)) == len(before[1])
    for outcome, (key, mine) in zip(STALE, sorted(held.items()), strict=True):
        assert finish(desk, mine, outcome, run="stale", result="x", reason="x", postpone=1.0) == [None]
        # Of the stale horse's own attempt, and of no other.
        query = "SELECT attempt, late FROM nih_sched_attempts WHERE row_key = :k AND late IS NOT NULL"
        assert place.run(query, k=f"[{key[0]}]") == [(1 + failures, outcome.value)]
    assert (place.states(), place.attempts(everything)) == before
    assert [event for event, _ in events].count("stale") == len(STALE)


def test_a_stale_horse_harms_no_attempt_that_has_begun_since(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    leases = take(desk, "a", "b")
    (retried,) = failed(desk)
    (fresh,) = claim(desk)
    old = {row.claim.key: row.claim for row in start(desk, retried, fresh, run="stale", lease="a")}
    leases.end("a", "its lease ran out")
    rescue(desk, "a")
    (anew,) = claim(desk)
    now = [row.claim for one in (retried, anew) for row in start(desk, one, run="new", lease="b")]
    assert finish(desk, list(old.values()), run="stale") == [None, None]
    assert place.states() == {1: "Started", 2: "Started"}
    assert orphans(desk, "a") == set()
    assert finish(desk, now, run="new") == [Fate(State.DONE, 1), Fate(State.DONE, 0)]
    assert finish(desk, list(old.values()), Outcome.FAILED, run="stale") == [None, None]
    assert place.states() == {1: "Done", 2: "Done"}
    assert sorted(place.attempts("run", "outcome", "late"), key=repr) == [
        ("new", "done", None),
        ("new", "done", None),
        ("run", "failed", None),
        ("stale", "interrupted", "failed"),
        ("stale", "interrupted", "failed"),
    ]


def test_what_a_horse_wrote_before_its_lease_ended_stands(place: Place) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    leases = take(desk, "a")
    (retried,) = failed(desk)
    claims = [row.claim for row in start(desk, retried, *claim(desk), run="its", lease="a")]
    fates = [finish(desk, one, outcome, run="its")[0] for one, outcome in zip(claims, STALE, strict=False)]
    leases.end("a", "its lease ran out")
    assert rescue(desk, "a") == []
    before = place.states(), place.run("SELECT * FROM nih_sched_attempts ORDER BY id")
    # Its answer was lost, so it writes again; and so does its worker, which was told.
    assert [finish(desk, one, outcome, run="its")[0] for one, outcome in zip(claims, STALE, strict=False)] == fates
    assert (place.states(), place.run("SELECT * FROM nih_sched_attempts ORDER BY id")) == before


@pytest.mark.parametrize("failures", [0, 1])
def test_a_rescuer_that_comes_too_late_is_no_stale_worker(place: Place, failures: int) -> None:
    place.jobs("Pending")
    desk = place.desk()
    leases = take(desk, "a")
    (one,) = failed(desk) if failures else claim(desk)
    (row,) = start(desk, one, run="its", lease="a")
    leases.end("a", "its lease ran out")
    (seen,) = orphans(desk, "a")
    finish(desk, row.claim, run="its", result="its own")
    for leader in ("leader", "another leader"):
        assert finish(desk, seen[0], Outcome.INTERRUPTED, run=seen[1], by=leader) == [None]
    assert place.states() == {1: "Done"}
    assert place.attempts("outcome", "result", "ended_by", "late")[0] == ("done", "its own", "worker", None)


def test_of_several_rescuers_one_writes(place: Place) -> None:
    place.jobs(*["Pending"] * 12)
    desks = [place.desk() for _ in range(3)]
    leases = take(desks[0], "a")
    retried = failed(desks[0], 6)
    start(desks[0], *retried, *claim(desks[0]), lease="a")
    leases.end("a", "its lease ran out")
    found = sorted(orphans(desks[0], "a"), key=lambda one: one[0].id)
    assert len(found) == 12
    barrier = threading.Barrier(3)
    written: list[tuple[int, str]] = []

    def rescuer(desk: Desk, name: str) -> None:
        for one, run, _ in found:
            barrier.wait(60)
            if finish(desk, one, Outcome.INTERRUPTED, run=run, by=name) != [None]:
                written.append((one.id, name))

    works: list[Any] = [lambda desk=desk, n=n: rescuer(desk, f"leader {n}") for n, desk in enumerate(desks)]
    together(*works)
    assert sorted(number for number, _ in written) == [one.id for one, _, _ in found]
    ended = place.run("SELECT coalesce(of_claim, id), ended_by FROM nih_sched_attempts WHERE outcome = 'interrupted'")
    assert sorted(ended) == sorted(written)
    assert set(place.states().values()) == {"Queued", "Pending"}
