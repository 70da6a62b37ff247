"""How often in a row a row is interrupted: counted across claims, and when it is too often the row fails."""

from __future__ import annotations

import pytest

from conformance.places import Place, claim, due_for, failed, finish, next_attempt, run_once, start, take
from nih_sched.model import Claim, Fate, Outcome, State
from nih_sched.store import Claims, Desk, Looks
from nih_sched.store.running import orphaned


def interrupt(desk: Desk, times: int = 1) -> list[Fate | None]:
    """Claim the one ready row and interrupt it, again and again."""
    return [run_once(desk, Outcome.INTERRUPTED, reason=f"its worker died (time {n})") for n in range(1, times + 1)]


def ready_after(times: int) -> Fate:
    return Fate(State.READY, 0, interruptions=times)


def failed_after(times: int, failures: int = 0) -> Fate:
    return Fate(State.FAILED, failures, interruptions=times)


def test_a_row_that_is_interrupted_too_often_in_a_row_fails(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    assert interrupt(desk, 2) == [ready_after(1), ready_after(2)]
    assert place.states() == {1: "Pending"}
    assert interrupt(desk) == [failed_after(3)]
    assert place.states() == {1: "Failed"}
    assert claim(desk) == []
    *earlier, (outcome, reason, interruptions, open_key) = place.attempts(
        "outcome", "reason", "interruptions", "open_key"
    )
    assert earlier == [
        ("interrupted", "its worker died (time 1)", 1, None),
        ("interrupted", "its worker died (time 2)", 2, None),
    ]
    assert (outcome, interruptions, open_key) == ("failed", 3, None)
    assert reason.startswith("interrupted 3 times in a row (--max-interruptions)")
    assert reason.endswith("its worker died (time 1)")
    assert [found.reason for found in Looks(desk).last_failures(10)[0]] == [reason]
    assert Looks(desk).open_claims_up_to(9) == 0


def test_the_default_is_ten(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    assert interrupt(desk, 10) == [*(ready_after(n) for n in range(1, 10)), failed_after(10)]


def test_one_may_be_too_often(place: Place) -> None:
    place.jobs("Pending")
    assert interrupt(place.desk(max_interruptions=1)) == [failed_after(1)]
    assert place.states() == {1: "Failed"}


def test_a_reason_is_not_needed(place: Place) -> None:
    place.jobs("Pending")
    assert run_once(place.desk(max_interruptions=1), Outcome.INTERRUPTED) == failed_after(1)
    ((reason,),) = place.attempts("reason")
    assert reason.startswith("interrupted 1 times in a row (--max-interruptions)")
    assert "None" not in reason


def test_attempts_of_one_claim_are_counted_too(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    (one,) = failed(desk)
    fates = []
    for n in range(3):
        again = next_attempt(desk, one, f"run {n}")
        assert again.interruptions == n
        fates += finish(desk, again, Outcome.INTERRUPTED, run=f"run {n}")
    assert fates == [
        Fate(State.RETRYING, 1, 0.0, interruptions=1),
        Fate(State.RETRYING, 1, 0.0, interruptions=2),
        failed_after(3, failures=1),
    ]
    assert place.states() == {1: "Failed"}
    outcomes = sorted(place.attempts("attempt", "outcome", "failures", "interruptions"))
    assert outcomes == [(1, "failed", 1, 0), (2, "interrupted", 1, 1), (3, "interrupted", 1, 2), (4, "failed", 1, 3)]


def test_the_count_goes_on_from_claim_to_claim_into_its_attempts(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    interrupt(desk, 2)
    (one,) = claim(desk)
    (row,) = start(desk, one)
    assert row.claim.interruptions == 2
    # A failure in between: what follows is counted anew.
    assert finish(desk, row.claim, Outcome.FAILED) == [Fate(State.RETRYING, 1, 0.0)]
    for n in (1, 2):
        again = next_attempt(desk, one, f"run {n}")
        assert again.interruptions == n - 1
        assert finish(desk, again, Outcome.INTERRUPTED, run=f"run {n}") == [
            Fate(State.RETRYING, 1, 0.0, interruptions=n)
        ]
    third = next_attempt(desk, one, "third")
    assert finish(desk, third, Outcome.INTERRUPTED, run="third") == [failed_after(3, failures=1)]


BREAKS = [Outcome.DONE, Outcome.FAILED, Outcome.TIMED_OUT, Outcome.CRASHED, Outcome.CANCELLED]


@pytest.mark.parametrize("outcome", BREAKS)
def test_an_end_of_another_kind_begins_the_count_anew(place: Place, outcome: Outcome) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    interrupt(desk, 2)
    fate = run_once(desk, outcome, final=True)
    assert fate is not None
    assert fate.interruptions == 0
    place.set(1, "Pending")  # its owner's
    assert interrupt(desk, 3) == [ready_after(1), ready_after(2), failed_after(3)]


def test_a_row_that_asked_to_be_run_later_begins_the_count_anew(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    interrupt(desk, 2)
    (one,) = claim(desk)
    (row,) = start(desk, one)
    finish(desk, row.claim, Outcome.POSTPONED, postpone=600.0)
    due_for(desk, one, seconds=1.0)
    again = next_attempt(desk, one, "again")
    assert finish(desk, again, Outcome.INTERRUPTED, run="again") == [ready_after(1)]
    assert interrupt(desk, 2) == [ready_after(2), failed_after(3)]


def test_a_handler_is_told_of_the_same_claim_however_often_its_row_is_interrupted(place: Place) -> None:
    # So that what it did before it was interrupted can be known by that.
    place.jobs("Pending", "Pending")
    desk = place.desk()

    def begin() -> list[Claim]:
        return sorted((row.claim for row in start(desk, *claim(desk))), key=lambda one: one.key)

    first, other = begin()
    assert (first.for_handler, other.for_handler) == ((first.id, 1), (other.id, 1))
    finish(desk, [first, other], Outcome.INTERRUPTED)
    for n in (2, 3, 4):
        Claims(desk, "", 0).give_back([one.id for one in claim(desk)])  # nothing began
        rows = begin()
        assert [one.for_handler for one in rows] == [(first.id, n), (other.id, n)]
        assert not {first.id, other.id} & {one.id for one in rows}
        assert {one.attempt for one in rows} == {1}
        finish(desk, rows, Outcome.INTERRUPTED)
    # Through its tries as well; what its owner resets after its end is another one.
    rows = begin()
    finish(desk, rows[0], Outcome.FAILED)
    finish(desk, rows[1], Outcome.DONE)
    again = next_attempt(desk, rows[0], "again")
    assert again.for_handler == (first.id, 6)
    finish(desk, again, Outcome.INTERRUPTED, run="again")
    again = next_attempt(desk, rows[0], "once more")
    assert again.for_handler == (first.id, 7)
    finish(desk, again, run="once more")
    place.run("UPDATE jobs SET state = 'Pending'")
    assert all(one.for_handler == (one.id, 1) for one in begin())


def test_a_claim_that_is_given_back_unstarted_is_no_break(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    for n in (1, 2):
        assert interrupt(desk) == [ready_after(n)]
        for _ in range(2):
            (one,) = claim(desk)
            assert Claims(desk, "producer", 3).give_back() == [one.rq_id]
    assert interrupt(desk) == [failed_after(3)]


def test_a_claim_that_its_owner_voids_unstarted_is_no_break(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)
    interrupt(desk)
    claim(desk)
    place.set(1, "Pending")  # the next claim closes that one
    assert interrupt(desk) == [ready_after(2)]
    (one,) = claim(desk)
    place.set(1, "Cancelled")
    assert start(desk, one) == []
    place.set(1, "Pending")
    assert interrupt(desk) == [failed_after(3)]


def test_after_that_failure_an_owners_reset_begins_at_none(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=2)
    for _ in range(3):
        assert interrupt(desk, 2) == [ready_after(1), failed_after(2)]
        assert place.states() == {1: "Failed"}
        place.set(1, "Pending")
    (row,) = start(desk, *claim(desk))
    assert row.claim.interruptions == 0


def test_each_row_is_counted_for_itself(place: Place) -> None:
    place.run("CREATE TABLE jobs (a integer, b varchar(20), state varchar(20), PRIMARY KEY (a, b))")
    for key in ("(1, 'x'", "(1, 'X'", "(2, 'x'") if place.name != "mariadb" else ("(1, 'x'", "(1, 'y'", "(2, 'x'"):
        place.run(f"INSERT INTO jobs VALUES {key}, 'Pending')")
    desk = place.desk(max_interruptions=3)
    rows = [row.claim for row in start(desk, *claim(desk), run="1")]
    assert len(rows) == 3
    finish(desk, rows, Outcome.INTERRUPTED, run="1")
    second = {row.claim.key: row.claim for row in start(desk, *claim(desk), run="2")}
    assert {one.interruptions for one in second.values()} == {1}
    finish(desk, [second[rows[0].key]], Outcome.INTERRUPTED, run="2")
    finish(desk, [second[rows[1].key]], Outcome.DONE, run="2")
    finish(desk, [second[rows[2].key]], Outcome.INTERRUPTED, run="2")
    place.run("UPDATE jobs SET state = 'Pending'")
    third = {row.claim.key: row.claim for row in start(desk, *claim(desk), run="3")}
    assert [third[one.key].interruptions for one in rows] == [2, 0, 2]
    fates = finish(desk, [third[one.key] for one in rows], Outcome.INTERRUPTED, run="3")
    assert fates == [failed_after(3), ready_after(1), failed_after(3)]


def test_a_rescued_row_is_counted_like_any_other(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=2)
    leases = take(desk, "a", "b")
    fates: list[Fate | None] = []
    for name in ("a", "b"):
        start(desk, *claim(desk), run=name, lease=name)
        leases.end(name, "its worker died")
        for one, run, _ in orphaned(desk, [name], 10):
            fates += finish(desk, one, Outcome.INTERRUPTED, run=run, by="leader", reason="its worker died")
    assert fates == [ready_after(1), failed_after(2)]
    assert place.states() == {1: "Failed"}
    assert place.attempts("outcome", "ended_by") == [("interrupted", "leader"), ("failed", "leader")]


def test_a_repeated_write_counts_once(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(max_interruptions=2)
    (row,) = start(desk, *claim(desk))
    for _ in range(3):
        assert finish(desk, row.claim, Outcome.INTERRUPTED) == [ready_after(1)]
    assert interrupt(desk) == [failed_after(2)]
    (last,) = place.run("SELECT max(id) FROM nih_sched_attempts")
    assert place.attempts("id", "interruptions")[-1] == (last[0], 2)


def test_a_row_that_may_not_be_set_back_is_counted_too(place: Place) -> None:
    # The owner's rules know no way back to ready; the row stays in its word, its owner resets it.
    place.jobs(
        "Pending",
        create="CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), name text, old varchar(20), "
        "CHECK (old IS NULL OR NOT (old = 'Started' AND state = 'Pending')))",
    )
    desk = place.desk(max_interruptions=2)
    (row,) = start(desk, *claim(desk))
    place.run("UPDATE jobs SET old = state")
    assert finish(desk, row.claim, Outcome.INTERRUPTED) == [ready_after(1)]
    assert place.states() == {1: "Started"}
    place.run("UPDATE jobs SET old = NULL, state = 'Pending'")
    assert interrupt(desk) == [failed_after(2)]


def test_nothing_is_kept_of_a_count_that_is_over(place: Place) -> None:
    # A row's next claim looks for what is kept of it: that must never be many records.
    place.jobs("Pending")
    desk = place.desk(max_interruptions=3)

    def kept() -> list[int]:
        return [number for (number,) in place.run("SELECT id FROM nih_sched_attempts WHERE kept_key IS NOT NULL")]

    for n in range(1, 3):
        interrupt(desk)
        assert len(kept()) == 1, n
    run_once(desk)
    assert kept() == []
    place.set(1, "Pending")
    interrupt(desk, 3)
    assert kept() == []
