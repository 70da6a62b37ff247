"""The start of attempts: what begins, what is dropped, and what harms no other."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import select, text

from conformance.places import Events, Place, all_due, claim, finish, instants, next_attempt, only, start
from nih_sched.model import Fate, Outcome, State
from nih_sched.store import Attempts, Claims, Desk, Looks, Retries, source_desk
from nih_sched.store.records import StaleDesk


def test_a_start_marks_row_and_ledger_and_gives_the_columns_asked_for(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    before = Looks(desk).now()
    rows = Attempts(desk, "my run", "w" * 500).start([one.id for one in claims], ["name", "id"])
    assert {(row.claim, row.unreadable) for row in rows} == {(one, None) for one in claims}
    assert sorted(row.values["id"] for row in rows) == [1, 2]
    assert all(dict(row.values) == {"name": f"n{row.claim.key[0]}", "id": row.claim.key[0]} for row in rows)
    assert place.states() == {1: "Started", 2: "Started"}
    assert place.attempts("run", "worker", "due_at", "finished_at") == [("my run", "w" * 190, None, None)] * 2
    attempts = desk.ledger.attempts
    instants = desk.read(lambda c: c.execute(select(attempts.c.started_at)).scalars().all())
    assert all(before <= instant <= Looks(desk).now() for instant in instants)


def test_a_handler_without_columns_gets_none(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (row,) = start(desk, *claim(desk))
    assert row.values == {}


def test_one_claim_sent_twice_starts_once(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    assert len(start(desk, one, run="first")) == 1
    assert start(desk, one, run="second") == []
    assert start(desk, one, one, run="third") == []
    assert place.attempts("run") == [("first",)]
    finish(desk, one, run="first")
    assert start(desk, one, run="fourth") == []
    assert place.states() == {1: "Done"}


def test_the_same_id_twice_in_one_job_starts_once(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    assert len(start(desk, one, one)) == 1


@pytest.mark.parametrize("words", [{}, {"queued_val": "Busy", "started_val": "Busy"}], ids=["two words", "one word"])
def test_two_workers_at_once_start_each_claim_once(place: Place, words: dict[str, str]) -> None:
    # With one word for queued and started, the row's word can't tell: only the ledger's can.
    place.jobs(*["Pending"] * 40)
    desks = [place.desk(**words) for _ in range(3)]
    claims = claim(desks[0])
    groups = [claims[at : at + 4] for at in range(0, 40, 4)]
    barrier = threading.Barrier(3)
    started: list[tuple[str, int]] = []

    def worker(number: int, desk: Desk) -> None:
        for at, group in enumerate(groups):
            barrier.wait(30)
            for row in start(desk, *group, run=f"{number}.{at}"):
                started.append((f"{number}.{at}", row.claim.id))

    threads = [threading.Thread(target=worker, args=pair) for pair in enumerate(desks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Workers that meet at a row may both stand back from it: then it is put off, and starts the next time.
    begun = {number for _, number in started}
    started += [("later", next_attempt(desks[0], one, "later").id) for one in claims if one.id not in begun]
    assert sorted(number for _, number in started) == [one.id for one in claims]
    assert sorted(started) == sorted((run, number) for number, run in place.attempts("id", "run"))
    assert set(place.states().values()) == {words.get("started_val", "Started")}


def test_a_start_whose_answer_was_lost_may_be_made_again(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    start(desk, claims[0])
    again = start(desk, *claims, columns=["name"])
    assert sorted(row.values["name"] for row in again) == ["n1", "n2"]
    assert place.states() == {1: "Started", 2: "Started"}


@only("postgresql", "mariadb")
def test_a_start_whose_answer_was_lost_needs_no_lock_to_be_made_again(place: Place) -> None:
    # The row runs for us by what is committed: whoever has it locked by now, it must not be left to nobody.
    place.jobs("Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    start(desk, claims[0])
    with place.engine.begin() as owner:
        owner.execute(text("UPDATE jobs SET name = 'its owner''s' WHERE id = 1"))
        again = start(desk, *claims, columns=["id"])
    assert sorted(row.claim.key[0] for row in again) == [1, 2]
    assert None not in finish(desk, [row.claim for row in again])
    assert place.states() == {1: "Done", 2: "Done"}


@only("postgresql", "mariadb")
def test_rows_that_their_owner_has_locked_are_put_off_and_hold_up_no_other(place: Place) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    claims = claim(desk)
    with place.engine.begin() as owner:
        owner.execute(text("UPDATE jobs SET name = 'x' WHERE id IN (1, 3)"))
        assert {row.claim.key[0] for row in start(desk, *claims)} == {2, 4}
        owner.execute(text("DELETE FROM jobs WHERE id = 3"))
    assert place.states() == {1: "Queued", 2: "Started", 4: "Started"}
    due = {found.claim.key: found for found in all_due(desk, 2)}
    assert set(due) == {(1,), (3,)}
    assert start(desk, claims[2], run="later") == []
    assert place.attempts("outcome", "open_key IS NULL")[2] == ("cancelled", True)
    assert Retries(desk).take(due[(1,)], "sent anew")
    (row,) = start(desk, claims[0], run="later")
    assert (row.claim.attempt, row.claim.failures, row.claim.rq_id) == (1, 0, "sent anew")
    assert finish(desk, row.claim, run="later") == [Fate(State.DONE, 0)]


def test_rows_that_their_owner_changed_are_not_started(place: Place) -> None:
    words = ["Pending", "Cancelled", "Done", "Started", "queued", "Queued?", None]
    place.jobs(*["Pending"] * (len(words) + 1))
    desk = place.desk()
    claims = claim(desk)
    for number, word in enumerate(words, 1):
        place.run("UPDATE jobs SET state = :w WHERE id = :i", w=word, i=number)
    assert [row.claim for row in start(desk, *claims)] == [claims[-1]]
    assert place.states() == {**dict(enumerate(words, 1)), 8: "Started"}
    reason = "its owner changed or deleted the row before it began"
    assert place.attempts("outcome", "reason", "open_key IS NULL", "finished_at IS NULL") == [
        *[("cancelled", reason, True, False)] * len(words),
        (None, None, False, True),
    ]
    assert [one.key for one in claim(desk)] == [(1,)]


def test_a_deleted_row_is_not_started(place: Place, events: Events) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    claims = claim(desk)
    place.run("DELETE FROM jobs WHERE id = 1")
    assert [row.claim for row in start(desk, *claims)] == [claims[1]]
    assert place.attempts("outcome", "open_key IS NULL")[0] == ("cancelled", True)
    assert ("cancelled", {"key": "1", "expected": "Queued"}) in events


def test_claims_that_are_not_there_start_nothing(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    assert Attempts(desk, "run", "worker").start([10**12, 0, -1], ["name"]) == []
    assert Attempts(desk, "run", "worker").start([], ["name"]) == []


def test_an_early_start_is_refused(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=1.0)
    (one,) = claim(desk)
    start(desk, one)
    assert finish(desk, one, Outcome.FAILED) == [Fate(State.RETRYING, 1, 1.0)]
    tries = 0
    while not (rows := start(desk, one, run="early")):
        assert place.attempts("run", "started_at")[0] == (None, None)
        tries += 1
        time.sleep(0.02)
    assert tries > 0
    (_, began), (ended, _) = instants(desk, "finished_at", "started_at")
    assert began - ended >= timedelta(seconds=1)
    assert [(row.claim.attempt, row.claim.failures) for row in rows] == [(2, 1)]


def test_a_claim_starts_for_its_own_source_alone(place: Place) -> None:
    # Whoever may write to Redis can pair any source with any claim.
    place.jobs("Pending", "new")
    one, other = place.desk(), place.desk(ready_val="new", started_val="Busy")
    (mine,) = claim(one)
    assert start(other, mine) == []
    assert Claims(other, "", 0).give_back([mine.id]) == []
    assert place.states() == {1: "Queued", 2: "new"}
    assert len(start(one, mine)) == 1


def test_a_row_that_the_database_will_not_start_fails_alone(place: Place) -> None:
    place.jobs(
        *["Pending"] * 3,
        create="CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), name text, "
        "CHECK (id <> 2 OR state <> 'Started'))",
    )
    desk = place.desk()
    claims = claim(desk, tries=1)
    rows = start(desk, *claims, columns=["name"])
    assert {row.claim.key[0]: row.values.get("name") for row in rows} == {1: "n1", 2: None, 3: "n3"}
    (refused,) = [row.refused for row in rows if row.refused]
    assert refused.startswith("the database refused to start the row: ")
    assert "\n" not in refused
    assert place.states() == {1: "Started", 2: "Queued", 3: "Started"}
    assert len(start(desk, *claims, *claims, run="run")) == 3  # ids that stand twice in a tampered job
    assert finish(desk, claims[1], Outcome.FAILED, reason=refused) == [Fate(State.RETRYING, 1, 0.0)]
    second = next_attempt(desk, claims[1], "second")
    assert finish(desk, second, Outcome.FAILED, run="second") == [Fate(State.FAILED, 2)]
    assert place.states() == {1: "Started", 2: "Failed", 3: "Started"}


UNREADABLE = {
    "sqlite": [("timestamp", "'not a date'"), ("text", "CAST(x'ff' AS text)")],
    "postgresql": [("timestamp", "'infinity'"), ("date", "'0044-03-15 BC'")],
}


@pytest.mark.parametrize("number", [0, 1])
@only("sqlite", "postgresql")
def test_a_value_that_python_cannot_take_fails_its_row_alone(place: Place, number: int) -> None:
    kind, value = UNREADABLE[place.name][number]
    place.run(f"CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), at {kind})")
    for number, written in ((1, "'2024-02-29 01:02:03'"), (2, value), (3, "NULL")):
        place.run(f"INSERT INTO jobs VALUES ({number}, 'Pending', {written})")
    desk = place.desk()
    rows = {row.claim.key[0]: row for row in start(desk, *claim(desk), columns=["id", "at"])}
    assert str(rows[1].values["at"]).startswith("2024-02-29")
    assert rows[3].values == {"id": 3, "at": None}
    assert rows[2].values == {}
    assert rows[2].unreadable is not None
    assert rows[2].unreadable.startswith("a column's value can't be read: ")
    assert "SELECT" not in rows[2].unreadable
    assert "Background on this error" not in rows[2].unreadable
    assert place.states() == {1: "Started", 2: "Started", 3: "Started"}


def test_words_that_have_changed_since_are_seen_before_anything_begins(place: Place) -> None:
    place.jobs("Pending", "Pending")
    old = place.desk(retrying_val="Again")
    stale = source_desk(old.engine, old.ledger, old.source.name, old.source.to_json())
    place.desk(retrying_val="Later")  # its producer was started anew
    first, second = claim(old)
    with pytest.raises(StaleDesk):
        start(stale, first)
    assert place.attempts("started_at") == [(None,), (None,)]
    assert set(place.states().values()) == {"Queued"}
    facts = place.run("SELECT facts FROM nih_sched_sources")[0][0]
    current = source_desk(old.engine, old.ledger, old.source.name, facts)
    run = Attempts(current, "run", "worker")
    assert len(run.start([first.id], [])) == 1
    place.desk(retrying_val="Again")
    assert len(run.start([second.id], [])) == 1  # a job that has begun goes on
