"""Claims that wait for their next attempt: which are due, and who sends them."""

from __future__ import annotations

import threading

import pytest

from conformance.places import Place, all_due, claim, due_for, failed, finish, next_attempt, rq_id, start
from nih_sched.model import Claim, Outcome
from nih_sched.store import Desk, Due, Looks, Retries


def test_only_what_is_due_is_due_and_the_longest_due_comes_first(place: Place) -> None:
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    retries = Retries(desk)
    assert retries.due(10) == []
    assert Looks(desk).around(rows=False).due is None
    claims = claim(desk)
    start(desk, *claims[:4])
    finish(desk, claims[:3], Outcome.POSTPONED, postpone=600.0)
    finish(desk, claims[3])
    assert retries.due(10) == []
    left = Looks(desk).around(rows=False).due
    assert left is not None
    assert 300 < left <= 600
    due_for(desk, claims[2], seconds=7.0)
    assert Looks(desk).around(rows=False).due == 0.0
    (first,) = retries.due(10)
    assert first.claim == claims[2]._replace(attempt=2)
    assert first.overdue >= 6.99
    due_for(desk, claims[0], seconds=5.0)
    both = retries.due(10)
    assert [one.claim.id for one in both] == [claims[2].id, claims[0].id]
    assert both[0].overdue > both[1].overdue >= 4.99
    assert [one.claim.id for one in retries.due(1)] == [claims[2].id]
    assert all(retries.take(one, rq_id()) for one in both)
    assert retries.due(10) == []
    left = Looks(desk).around(rows=False).due
    assert left is not None
    assert 300 < left <= 600


def test_another_sources_retries_are_its_own(place: Place) -> None:
    place.jobs("Pending", "other")
    one, other = place.desk(), place.desk(ready_val="other")
    failed(one)
    all_due(one, 1)
    assert Retries(other).due(10) == []
    assert Looks(other).around(rows=False).due is None


def test_what_others_have_had_due_for_longer_hides_nothing(place: Place) -> None:
    place.jobs(*["other"] * 3, "Pending")
    one, other = place.desk(), place.desk(ready_val="other")
    for desk, many in ((other, 3), (one, 1)):
        failed(desk, many)
        all_due(desk, many)
    assert [due.claim.key for due in Retries(one).due(2)] == [(4,)]


def test_all_open_claims_have_a_carrier_however_many(place: Place) -> None:
    place.jobs(*["Pending"] * 7)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims[:2])
    for page in (1, 3, 5, 7, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nih_sched.store.retries.PAGE", page)
            assert Retries(place.desk()).carriers() == {one.rq_id for one in claims[2:]}
            assert {one.id for one in Retries(place.desk()).unstarted()} == {one.id for one in claims[2:]}
            assert Retries(place.desk()).unstarted({claims[1].rq_id, claims[4].rq_id}) == [claims[4]]


def test_one_of_several_producers_takes_a_due_claim(place: Place) -> None:
    place.jobs(*["Pending"] * 12)
    desks = [place.desk() for _ in range(3)]
    failed(desks[0], 12)
    due = all_due(desks[0], 12)
    barrier = threading.Barrier(3)
    taken: list[tuple[int, str]] = []

    def producer(desk: Desk) -> None:
        retries = Retries(desk)
        for one in due:
            barrier.wait(30)
            mine = rq_id()
            if retries.take(one, mine):
                taken.append((one.claim.id, mine))

    threads = [threading.Thread(target=producer, args=(desk,)) for desk in desks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(number for number, _ in taken) == sorted(one.claim.id for one in due)
    assert dict(taken) == dict(place.run("SELECT id, rq_id FROM nih_sched_attempts WHERE of_claim IS NULL"))


def test_a_claim_that_has_begun_or_ended_meanwhile_is_not_taken(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    one, other = failed(desk, 2)
    due = {found.claim.id: found for found in all_due(desk, 2)}
    next_attempt(desk, one, "second")
    place.set(2, "Pending")
    claim(desk)  # closes the old claim
    assert not Retries(desk).take(due[one.id], rq_id())
    assert not Retries(desk).take(due[other.id], rq_id())
    assert not Retries(desk).take(Due(Claim(10**9, (1,), "x"), 0.0), rq_id())


def test_a_claim_that_was_carried_elsewhere_is_not_taken_by_its_old_id(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = failed(desk)
    (due,) = all_due(desk, 1)
    assert Retries(desk).carry({one.id: "new id"}) == {one.id}
    assert not Retries(desk).take(due, rq_id())
    (due,) = Retries(desk).due(10)
    assert due.claim.rq_id == "new id"
    assert Retries(desk).take(due, "newer id")
    assert Retries(desk).carry({one.id: "late"}) == set()
    assert place.attempts("rq_id")[0] == ("newer id",)


def test_many_that_wait_are_carried_each_under_its_own_id(place: Place) -> None:
    place.jobs(*["Pending"] * 6)
    desk = place.desk()
    waits, sent, begun, done, other, untouched = claims = claim(desk)
    start(desk, *claims)
    finish(desk, [one for one in claims if one is not done], Outcome.FAILED)
    finish(desk, done)
    for one in all_due(desk, 5):
        if one.claim.id == sent.id:
            assert Retries(desk).take(one, "sent by another")
    next_attempt(desk, begun, "second")
    before = dict(place.run("SELECT id, rq_id FROM nih_sched_attempts"))
    wanted = {one.id: f"new {one.key[0]}" for one in (waits, sent, begun, done, other)} | {10**9: "nobody's"}
    assert Retries(desk).carry(wanted) == {waits.id, other.id}
    after = before | {waits.id: "new 1", other.id: "new 5"}
    assert dict(place.run("SELECT id, rq_id FROM nih_sched_attempts")) == after
    assert {one.claim.rq_id for one in Retries(desk).due(10)} == {"new 1", "new 5", untouched.rq_id}
    assert Retries(desk).carry({}) == set()


def test_a_retry_may_come_again_and_again(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = failed(desk, tries=6)
    for attempt in range(2, 7):
        (due,) = all_due(desk, 1)
        assert due.claim.failures == attempt - 1
        assert Retries(desk).take(due, due.claim.rq_id)
        assert Retries(desk).due(10) == []
        again = next_attempt(desk, one, f"run {attempt}")
        assert again.attempt == attempt
        finish(desk, again, Outcome.FAILED, run=f"run {attempt}")


def test_claims_that_nobody_carries_are_made_due(place: Place) -> None:
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims[:2])
    finish(desk, claims[0])
    finish(desk, claims[1], Outcome.POSTPONED, postpone=60.0)
    Retries(desk).put_off([one.id for one in claims[:3]], 0.0)
    assert {one.claim.id for one in all_due(desk, 1)} == {
        claims[2].id
    }  # not the ended, nor one that waits for its time
    assert len(start(desk, claims[2], run="again")) == 1
    Retries(desk).put_off([claims[1].id, claims[2].id], 60.0)  # that one runs
    assert Retries(desk).due(10) == []
    assert place.attempts("due_at IS NULL")[1:3] == [(False,), (True,)]
