"""The end of attempts: what is written to row and ledger, and what changes nothing."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from conformance.places import Events, Place, claim, finish, next_attempt, run_once, snapshot, start
from nih_sched import get_jobs
from nih_sched.model import Ended, Fate, Outcome, State, open_key
from nih_sched.store import Attempts, Looks
from nih_sched.store.running import running


def test_what_ends_from_now_on_is_found_without_reading_what_had_ended(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    assert Looks(desk).first_to_end() == 0
    monkeypatch.setattr("nih_sched.store.looks.UNSEEN", 0)
    old, late, *others = claim(desk)
    start(desk, old, late, *others)
    finish(desk, old)
    looks = Looks(desk)
    before, first = looks.now(), looks.first_to_end()
    assert first == late.id
    for one in (late, *others):
        finish(desk, one)
    assert looks.ended_since(before, first=first) == looks.ended_since(before) == {"done": 3}
    assert looks.first_to_end() == others[-1].id
    monkeypatch.setattr("nih_sched.store.looks.MOST_OPEN", 1)
    place.set(1, "Pending")
    claim(desk)
    assert looks.first_to_end() == 0  # too many are open to be looked at


def test_done_is_written_to_row_and_ledger(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    start(desk, one)
    before = Looks(desk).now()
    fate = finish(desk, one, result='{"größe": "🎈"}', seconds=1.25, reason=None)
    assert fate == [Fate(State.DONE, 0)]
    assert place.states() == {1: "Done"}
    columns = "id, of_claim, open_key, attempt, failures, outcome, seconds, reason, traceback, result"
    assert place.attempts(columns) == [(one.id, None, None, 1, 0, "done", 1.25, None, None, '{"größe": "🎈"}')]
    attempts = desk.ledger.attempts
    started, finished = desk.read(lambda c: c.execute(select(attempts.c.started_at, attempts.c.finished_at)).one())
    assert started <= before <= finished <= Looks(desk).now()
    assert Looks(desk).open_claims_up_to(9) == 0
    assert Looks(desk).ended_since(before) == {"done": 1}
    assert Looks(desk).ended_since(before, "producer") == {"done": 1}
    assert Looks(desk).ended_since(before, "other") == {}
    assert Looks(desk).by_word() == {"Done": 1}


def test_a_stale_finish_changes_nothing(place: Place, events: Events) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims[1:])
    finish(desk, claims[2])
    before = snapshot(place)
    for outcome in Outcome:  # for a claim that hasn't begun, one that runs for another, one that has ended
        assert finish(desk, claims, outcome, run="somebody else's") == [None] * 3
        assert snapshot(place) == before
    assert [event for event, _ in events].count("stale") == 3 * len(Outcome)


def test_a_repeated_finish_of_the_same_run_changes_nothing(place: Place) -> None:
    place.jobs(*["Pending"] * len(Outcome))
    desk = place.desk(delay=1.0)
    claims = claim(desk)
    start(desk, *claims)
    group = [Ended(one, outcome, postpone=1.0) for one, outcome in zip(claims, Outcome, strict=True)]
    fates = Attempts(desk, "run", "worker").finish(group)
    assert None not in fates
    before = snapshot(place)
    assert Attempts(desk, "run", "worker").finish(group) == fates
    assert [Attempts(desk, "run", "worker").finish([one])[0] for one in group] == fates
    assert snapshot(place) == before


def test_a_finish_from_before_a_retry_changes_nothing_after_it(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    start(desk, one, run="first")
    finish(desk, one, Outcome.FAILED, run="first")
    second = next_attempt(desk, one, "second")
    before = snapshot(place)
    assert finish(desk, one, Outcome.FAILED, run="first") == [Fate(State.RETRYING, 1, 0.0)]  # its own, written before
    assert snapshot(place) == before
    assert finish(desk, second, run="second") == [Fate(State.DONE, 1)]


def test_what_the_owner_wrote_during_the_run_is_kept(place: Place) -> None:
    words = ["Pending", "Cancelled", "Done?", "started"] * 2
    place.jobs(*["Pending"] * 8)
    desk = place.desk()
    claims = claim(desk, tries=0)
    start(desk, *claims)
    for number, word in enumerate(words, 1):
        place.set(number, word)
    assert None not in finish(desk, claims[:4], Outcome.DONE) + finish(desk, claims[4:], Outcome.FAILED)
    assert place.states() == dict(enumerate(words, 1))
    assert place.attempts("outcome", "open_key") == [("done", None)] * 4 + [("failed", None)] * 4


def test_a_row_deleted_during_its_run_keeps_its_outcome_in_the_ledger(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    start(desk, one)
    place.run("DELETE FROM jobs")
    assert finish(desk, one) == [Fate(State.DONE, 0)]
    assert place.attempts("outcome", "open_key") == [("done", None)]


def test_a_failure_with_tries_left_goes_on_and_leaves_its_history(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=0.3, backoff=2.0)
    (one,) = claim(desk, tries=1)
    start(desk, one, run="first")
    (fate,) = finish(desk, one, Outcome.FAILED, run="first", reason="why", traceback="trace", seconds=0.5)
    assert fate == Fate(State.RETRYING, 1, 0.3)
    assert place.states() == {1: "Queued"}
    key = open_key(desk.rows.name, (1,))
    columns = ("of_claim", "open_key", "attempt", "failures", "tries", "run", "outcome", "reason", "traceback")
    assert place.attempts(*columns) == [
        (None, key, 2, 1, 1, None, None, None, None),
        (one.id, None, 1, 1, 1, "first", "failed", "why", "trace"),
    ]
    c = desk.ledger.attempts.c
    query = select(c.due_at, c.started_at, c.finished_at).order_by(c.id)
    (due, began, ended), (past_due, past_began, past_ended) = desk.read(lambda c: c.execute(query).all())
    assert (began, ended, past_due) == (None, None, None)
    assert past_began <= past_ended
    assert timedelta(seconds=0.3) <= due - past_ended < timedelta(seconds=2)
    assert Looks(desk).open_claims_up_to(9) == 1
    assert Looks(desk).ended_since(datetime(2000, 1, 1)) == {}

    second = next_attempt(desk, one, "second")
    assert (second.id, second.attempt, second.failures, second.tries) == (one.id, 2, 1, 1)
    (fate,) = finish(desk, second, Outcome.TIMED_OUT, run="second", reason="slow")
    assert fate == Fate(State.FAILED, 2)
    assert place.states() == {1: "Failed"}
    assert place.attempts(*columns)[0] == (None, None, 2, 2, 1, "second", "timed out", "slow", None)
    assert Looks(desk).ended_since(datetime(2000, 1, 1)) == {"timed out": 1}
    (failure,), _ = Looks(desk).last_failures(10)
    assert (failure.row_key, failure.outcome, failure.attempt, failure.reason) == ("[1]", "timed out", 2, "slow")


def test_the_retrying_word_stands_between_attempts(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(retrying_val="Again")
    assert run_once(desk, Outcome.FAILED) == Fate(State.RETRYING, 1, 0.0)
    assert place.states() == {1: "Again"}


def test_fail_is_final_whatever_tries_are_left(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    assert run_once(desk, Outcome.FAILED, final=True) == Fate(State.FAILED, 1)
    assert place.states() == {1: "Failed"}
    assert claim(desk) == []


def test_an_interrupted_row_is_ready_again_if_it_has_spent_nothing(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    assert run_once(desk, Outcome.INTERRUPTED) == Fate(State.READY, 0, interruptions=1)
    assert place.states() == {1: "Pending"}
    assert place.attempts("outcome", "open_key") == [("interrupted", None)]
    (new,) = claim(desk)
    assert (new.attempt, new.failures) == (1, 0)


def test_an_interruption_keeps_the_tries_that_are_spent(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=0.0)
    (one,) = claim(desk, tries=1)
    start(desk, one)
    finish(desk, one, Outcome.FAILED)
    second = next_attempt(desk, one, "second")
    assert finish(desk, second, Outcome.INTERRUPTED, run="second") == [Fate(State.RETRYING, 1, 0.0, interruptions=1)]
    assert place.states() == {1: "Queued"}
    third = next_attempt(desk, one, "third")
    assert (third.attempt, third.failures) == (3, 1)
    assert finish(desk, third, Outcome.FAILED, run="third") == [Fate(State.FAILED, 2)]
    assert place.attempts("attempt", "outcome") == [(3, "failed"), (1, "failed"), (2, "interrupted")]


def test_a_postponed_row_comes_back_when_it_said_and_spends_no_try(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=50.0)
    (one,) = claim(desk, tries=0)
    start(desk, one)
    began = time.monotonic()
    assert finish(desk, one, Outcome.POSTPONED, postpone=0.3) == [Fate(State.RETRYING, 0, 0.3)]
    second = next_attempt(desk, one, "second")
    assert time.monotonic() - began >= 0.25
    assert (second.attempt, second.failures) == (2, 0)
    assert finish(desk, second, Outcome.POSTPONED, run="second", postpone=100 * 365 * 86400.0)[0] is not None
    assert start(desk, one, run="third") == []
    seconds = Looks(desk).around(rows=False).due
    assert seconds is not None
    assert seconds > 99 * 365 * 86400


REFUSALS = {
    "check": [
        "CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), name text, CHECK (id <> 2 OR state <> 'Done'))"
    ],
    "trigger": {
        "sqlite": "CREATE TRIGGER t BEFORE UPDATE ON jobs WHEN NEW.id = 2 AND NEW.state = 'Done' "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END",
        "postgresql": "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id = 2 AND "
        "NEW.state = 'Done' THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$",
        "mariadb": "CREATE TRIGGER t BEFORE UPDATE ON jobs FOR EACH ROW BEGIN IF NEW.id = 2 AND NEW.state = 'Done' "
        "THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'; END IF; END",
    },
}


@pytest.mark.parametrize("how", list(REFUSALS))
def test_a_refused_row_keeps_its_outcome_and_harms_no_other(place: Place, how: str, events: Events) -> None:
    if how == "check":
        place.jobs(*["Pending"] * 4, create=REFUSALS["check"][0])  # type: ignore[index]
    else:
        place.jobs(*["Pending"] * 4)
        place.run(REFUSALS["trigger"][place.name])  # type: ignore[call-overload]
        if place.name == "postgresql":
            place.run("CREATE TRIGGER t BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION f()")
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    fates = finish(desk, claims, result="kept")
    assert fates == [Fate(State.DONE, 0)] * 4
    assert place.states() == {1: "Done", 2: "Started", 3: "Done", 4: "Done"}
    assert place.attempts("outcome", "result", "open_key") == [("done", "kept", None)] * 4
    refused = [facts for event, facts in events if event == "state_refused"]
    assert [facts["key"] for facts in refused] == ["2"]
    assert "\n" not in refused[0]["reason"]
    assert "SELECT" not in refused[0]["reason"].upper().replace("SELECT RAISE", "")
    before = snapshot(place)
    assert finish(desk, claims, result="kept") == fates
    assert snapshot(place) == before


def test_what_the_ledger_refuses_isnt_taken_for_the_rows_refusal(place: Place, events: Events) -> None:
    # Else the outcome would be written without the row's state, should the ledger take it a moment later.
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    start(desk, one)
    trigger = REFUSALS["trigger"][place.name]  # type: ignore[call-overload]
    condition = ("NEW.id = 2 AND NEW.state = 'Done'", "NEW.outcome IS NOT NULL")
    place.run(trigger.replace(*condition).replace(" ON jobs ", " ON nih_sched_attempts "))
    if place.name == "postgresql":
        place.run("CREATE TRIGGER t BEFORE UPDATE ON nih_sched_attempts FOR EACH ROW EXECUTE FUNCTION f()")
    before = snapshot(place)
    with pytest.raises(DBAPIError, match="not this one"):
        finish(desk, one)
    assert "state_refused" not in [name for name, _ in events]
    assert snapshot(place) == before


def test_a_row_that_may_not_be_set_back_gets_its_tries_all_the_same(place: Place) -> None:
    # The owner's rules know no way from Started back to Queued.
    place.jobs(
        "Pending",
        create="CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), name text, CHECK (state <> 'Again'))",
    )
    desk = place.desk(retrying_val="Again")
    (one,) = claim(desk)
    start(desk, one)
    assert finish(desk, one, Outcome.FAILED) == [Fate(State.RETRYING, 1, 0.0)]
    assert place.states() == {1: "Started"}
    second = next_attempt(desk, one, "second")
    assert finish(desk, second, run="second") == [Fate(State.DONE, 1)]
    assert place.states() == {1: "Done"}


def test_texts_of_any_size_and_characters_are_kept(place: Place) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    nasty = "a\0b \ud800 🎈 \x1b[0m ' \" \\ % :x %s"
    huge = "begin" + "\0ä🎈" * 150_000 + "end"
    assert len(huge.encode()) > 1024 * 1024
    finish(desk, claims[0], reason=nasty, traceback=nasty, result=nasty)
    finish(desk, claims[1], Outcome.FAILED, reason=huge, traceback=huge, result=huge)
    finish(desk, claims[2], Outcome.FAILED, final=True, reason="x" * 65536, traceback="y" * 65536, result="")
    records = place.attempts("row_key", "reason", "traceback", "result")
    assert ("[1]", *["a\\x00b \\ud800 🎈 \x1b[0m ' \" \\ % :x %s"] * 3) in records
    (kept,) = [record for record in records if record[0] == "[2]" and record[1]]
    for one in kept[1:]:
        assert len(one.encode()) <= 64 * 1024
        assert one.startswith("begin\\x00ä")
        assert one.endswith("🎈end")
        assert " bytes cut …]" in one
    (last,) = [record for record in records if record[0] == "[3]"]
    assert 65400 < len(last[1]) <= 65536
    assert last[3] == ""


def test_a_group_is_written_whole(place: Place) -> None:
    place.jobs(*["Pending"] * 6)
    desk = place.desk()
    claims = claim(desk, tries=1)
    start(desk, *claims)
    outcomes = [
        Outcome.DONE,
        Outcome.FAILED,
        Outcome.INTERRUPTED,
        Outcome.POSTPONED,
        Outcome.CANCELLED,
        Outcome.CRASHED,
    ]
    group = [Ended(one, outcome, postpone=5.0) for one, outcome in zip(claims, outcomes, strict=True)]
    fates = Attempts(desk, "run", "worker").finish(group)
    assert [fate and fate.state for fate in fates] == [
        State.DONE,
        State.RETRYING,
        State.READY,
        State.RETRYING,
        State.CANCELLED,
        State.RETRYING,
    ]
    assert place.states() == {1: "Done", 2: "Queued", 3: "Pending", 4: "Queued", 5: "Cancelled", 6: "Queued"}
    assert Attempts(desk, "run", "worker").finish([]) == []


def test_a_dead_horses_rows_are_found_by_its_worker(place: Place) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    claims = claim(desk, tries=1)
    start(desk, claims[0], run="one")
    start(desk, claims[1], run="two")
    finish(desk, claims[1], run="two")
    Attempts(desk, "three", "another worker").start([claims[2].id], [])
    found = running(desk, [one.id for one in claims], "worker")
    assert found == [(claims[0], "one")]
    assert finish(desk, found[0][0], Outcome.CRASHED, run=found[0][1]) == [Fate(State.RETRYING, 1, 0.0)]
    assert running(desk, [one.id for one in claims], "worker") == []


def test_get_jobs_reads_what_the_store_wrote(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    run_once(desk)
    with Session(place.engine) as session:
        assert [row["id"] for row in get_jobs(session, "state", "Done", ["id"])] == [1]
