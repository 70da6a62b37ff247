"""Claiming and giving back: who gets a row, on every database."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import pytest
from servers import eventually
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from conformance.places import Place, all_due, claim, failed, finish, next_attempt, only, ready, rq_ids, start
from nih_sched.errors import UsageError
from nih_sched.model import Fate, Outcome, State, open_key
from nih_sched.store import Claims, Looks, Retries
from nih_sched.store.rows import insert_rows

# Claiming: exactly the ready rows

LOOK_ALIKES = ["pending", "PENDING", "Pending ", " Pending", "Pendin", "Pendings", "Pénding", "", "Queued", "Pending\t"]


def test_only_rows_of_exactly_the_ready_word_are_claimed(place: Place) -> None:
    # MariaDB's default collation takes most of these for equal, and so does a NOCASE column.
    collate = " COLLATE NOCASE" if place.name == "sqlite" else ""
    place.jobs(
        "Pending", *LOOK_ALIKES, create=f"CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20){collate}, name text)"
    )
    place.run("INSERT INTO jobs (id, state) VALUES (50, NULL)")
    before = place.states()
    desk = place.desk()
    assert ready(desk) == 1
    assert [one.key for one in claim(desk)] == [(1,)]
    assert place.states() == {**before, 1: "Queued"}
    assert claim(desk) == []


def test_other_words_are_written_only_over_exactly_ours(place: Place) -> None:
    collate = " COLLATE NOCASE" if place.name == "sqlite" else ""
    place.jobs(
        *["Pending"] * 4, create=f"CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20){collate}, name text)"
    )
    desk = place.desk()
    claims = claim(desk)
    place.set(1, "queued")  # the owner's, before it began
    assert {row.claim.key[0] for row in start(desk, *claims)} == {2, 3, 4}
    place.set(2, "started")  # the owner's, while it ran
    place.set(3, "Started ")
    finish(desk, claims[1:])
    assert place.states() == {1: "queued", 2: "started", 3: "Started ", 4: "Done"}


@only("mariadb")
def test_a_word_of_another_character_set_is_compared_exactly_too(place: Place) -> None:
    place.run("CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20) CHARACTER SET latin1, name text)")
    for number, word in enumerate(["größe", "GRÖSSE", "grösse", "größe ", "grôße"], 1):
        place.run("INSERT INTO jobs (id, state) VALUES (:i, :w)", i=number, w=word)
    assert [one.key for one in claim(place.desk(ready_val="größe"))] == [(1,)]


ODD_WORDS = [
    "it's",
    '"quoted"',
    "100%",
    "%s",
    "%(x)s",
    ":x",
    "a:b",
    "back\\slash",
    "\\",
    "?",
    "größe 🎈",
    "a--b",
    "{x}",
]


def test_words_of_any_characters_go_the_whole_way(place: Place) -> None:
    place.jobs()
    for number, word in enumerate(ODD_WORDS, 1):
        place.run("INSERT INTO jobs (id, state) VALUES (:i, :w)", i=number, w=word)
    for number, word in enumerate(ODD_WORDS, 1):
        desk = place.desk(ready_val=word, queued_val=word + "q", started_val=word + "s", done_val=word + "d")
        assert ready(desk) == 1, word
        (one,) = claim(desk)
        assert one.key == (number,)
        assert place.states()[number] == word + "q"
        start(desk, one)
        assert place.states()[number] == word + "s"
        finish(desk, one)
        assert place.states()[number] == word + "d"


def test_the_oldest_keys_come_first_and_no_more_than_asked_for(place: Place) -> None:
    place.jobs()
    for number in (30, 4, 100, 1, 22, 7):
        place.run("INSERT INTO jobs (id, state) VALUES (:i, 'Pending')", i=number)
    desk = place.desk()
    assert [one.key[0] for one in claim(desk, 2)] == [1, 4]
    assert [one.key[0] for one in claim(desk, 3)] == [7, 22, 30]
    assert claim(desk, 0) == []
    assert [one.key[0] for one in claim(desk, 3)] == [100]


def test_more_rows_than_one_statement_takes(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    records = [{"id": number, "name": "x"} for number in range(1, 2601)]
    assert insert_rows(desk.engine, desk.rows, records, lambda count: None) == 2600
    claims = claim(desk, 2500)
    assert [one.key[0] for one in claims] == list(range(1, 2501))
    assert len({one.id for one in claims}) == len({one.rq_id for one in claims}) == 2500
    assert ready(desk) == 100
    started = start(desk, *claims[:1500], columns=["name"])
    assert sorted(row.claim.key[0] for row in started) == list(range(1, 1501))
    assert set(Claims(desk, "producer", 3).give_back()) == {one.rq_id for one in claims[1500:]}
    assert ready(desk) == 1100


def test_a_claim_is_a_record_of_the_ledger(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    before = Looks(desk).now()
    one, other = claim(desk, tries=7, producer="me")
    assert other.id > one.id > 0
    assert (one.key, one.attempt, one.failures, one.tries) == ((1,), 1, 0, 7)
    columns = "id, of_claim, source, row_key, open_key, attempt, failures, tries, rq_id, claimed_by, started_at, run"
    name = desk.rows.name
    assert place.attempts(*columns.split(", "), "outcome", "due_at") == [
        (one.id, None, desk.source.name, "[1]", open_key(name, (1,)), 1, 0, 7, one.rq_id, "me", *[None] * 4),
        (other.id, None, desk.source.name, "[2]", open_key(name, (2,)), 1, 0, 7, other.rq_id, "me", *[None] * 4),
    ]
    attempts = desk.ledger.attempts
    instants = desk.read(lambda c: c.execute(select(attempts.c.claimed_at, attempts.c.sent_at)).all())
    assert all(before <= claimed == sent <= Looks(desk).now() for claimed, sent in instants)
    assert Looks(desk).open_claims_up_to(9) == Looks(desk).open_claims_up_to(9, "me") == 2
    assert Looks(desk).open_claims_up_to(9, "other") == 0


def test_a_token_is_never_given_out_twice(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    seen = []
    for _ in range(3):
        (one,) = claim(desk)
        seen.append(one.id)
        Claims(desk, "", 0).give_back([one.id])  # deletes the record
    assert seen == sorted(set(seen))


# Claiming: --where

WHERES = [
    ("name LIKE 'n1%'", [1, 10]),
    ("name LIKE '%:%' -- the owner's remark", [2]),
    ("name = 'a:b%' OR name = 'n3'  -- 100% :sure", [2, 3]),
    ("id = 4 OR id = 5 OR id = 11", [4, 5]),
    ("name = '%(x)s' OR name = '%s' OR name = '?'", [6, 7, 8]),
    ("name = 'it''s'", [9]),
    ("id IN (SELECT max(j.id) - 1 FROM jobs AS j)", [10]),
    ("id > 9 /* a \n comment */", [10]),
]


def test_where_says_which_ready_rows_are_ours(place: Place) -> None:
    place.jobs(*["Pending"] * 10, "Done")
    for number, name in {2: "a:b%", 6: "%(x)s", 7: "%s", 8: "?", 9: "it's", 11: "n1"}.items():
        place.run("UPDATE jobs SET name = :n WHERE id = :i", n=name, i=number)
    for where, keys in WHERES:
        desk = place.desk(where=where)
        assert ready(desk) == len(keys), where
        claims = claim(desk)
        assert [one.key[0] for one in claims] == keys, where
        assert [number for number, word in place.states().items() if word == "Queued"] == keys, where
        assert len(start(desk, *claims)) == len(keys), where
        finish(desk, claims, Outcome.INTERRUPTED)


@pytest.mark.parametrize("where", ["colour = 1", "id =", "id = 1)", "id = 1; DROP TABLE jobs"])
def test_a_where_that_cannot_work_is_refused_at_once(place: Place, where: str) -> None:
    place.jobs("Pending")
    with pytest.raises(UsageError) as caught:
        place.desk(where=where)
    assert str(caught.value).startswith(f"--where {where!r} can't be used: ")
    assert "\n" not in str(caught.value)
    assert place.states() == {1: "Pending"}


# Claiming: at most one open claim


def test_the_database_itself_refuses_a_second_open_claim(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    attempts = desk.ledger.attempts
    record = {
        "source": "other",
        "row_key": "[1]",
        "attempt": 1,
        "failures": 0,
        "tries": 0,
        "claimed_at": datetime.now(UTC),
    }
    key = open_key(desk.rows.name, (1,))
    with pytest.raises(IntegrityError):
        desk.transact(lambda c: c.execute(insert(attempts).values(open_key=key, **record)))
    for _ in range(2):  # ended ones are as many as there are
        desk.transact(lambda c: c.execute(insert(attempts).values(open_key=None, **record)))
    with pytest.raises(IntegrityError):
        place.run(f"UPDATE nih_sched_attempts SET open_key = '{key}' WHERE id > {one.id}")


def test_an_owner_may_reset_a_row_that_has_not_begun(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (old,) = claim(desk)
    place.set(1, "Pending")
    (new,) = claim(desk)
    assert new.id > old.id
    assert new.key == old.key
    assert place.attempts("id", "outcome", "reason", "open_key", "finished_at IS NULL") == [
        (old.id, "cancelled", "its owner made the row ready again", None, False),
        (new.id, None, None, open_key(desk.rows.name, (1,)), True),
    ]
    assert start(desk, old) == []
    assert place.states() == {1: "Queued"}
    assert len(start(desk, new)) == 1


def test_an_owner_who_resets_a_running_row_gets_it_run_again_after_the_present_run(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk)
    start(desk, one)
    place.set(1, "Pending")
    for _ in range(3):
        assert claim(desk) == []
    assert place.states() == {1: "Pending"}
    assert finish(desk, one) == [Fate(State.DONE, 0)]
    assert place.states() == {1: "Pending"}  # the owner's word is kept
    (again,) = claim(desk)
    assert len(start(desk, again, run="run 2")) == 1
    finish(desk, again, run="run 2")
    assert place.states() == {1: "Done"}
    assert place.attempts("id", "outcome") == [(one.id, "done"), (again.id, "done")]


def test_rows_that_must_wait_do_not_hold_up_those_behind_them(place: Place) -> None:
    place.jobs(*["Pending"] * 8)
    desk = place.desk()
    claims = claim(desk, 3)
    start(desk, *claims)
    place.run("UPDATE jobs SET state = 'Pending' WHERE id <= 3")
    assert [one.key[0] for one in claim(desk, 1)] == [4]
    assert [one.key[0] for one in claim(desk, 3)] == [5, 6, 7]
    finish(desk, claims[1])
    assert [one.key[0] for one in claim(desk, 10)] == [2, 8]


@only("postgresql", "mariadb")
def test_rows_that_their_owner_has_locked_are_passed_over(place: Place) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    with place.engine.begin() as owner:
        owner.execute(text("UPDATE jobs SET name = 'mine' WHERE id IN (1, 3)"))
        began = time.monotonic()
        assert [one.key[0] for one in claim(desk)] == [2, 4]
        assert time.monotonic() - began < 30
    assert [one.key[0] for one in claim(desk)] == [1, 3]


@only("postgresql", "mariadb")
def test_a_claim_keeps_nobody_from_inserting(place: Place) -> None:
    # MariaDB's default isolation would lock the gaps between the keys.
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    query = desk.dialect.lock(Claims(desk, "", 0).select_ready(100), desk.rows.table, skip_locked=True)
    with desk.engine.begin() as ours:
        assert len(ours.execute(query).all()) == 3
        with place.engine.begin() as owner:
            wait = "innodb_lock_wait_timeout = 2" if place.name == "mariadb" else "lock_timeout = '2s'"
            owner.execute(text(f"SET {wait}"))
            owner.execute(text("INSERT INTO jobs VALUES (0, 'Pending', ''), (9, 'Pending', '')"))
    assert len(claim(desk)) == 5


def test_a_claim_that_the_database_refuses_claims_nothing(place: Place) -> None:
    place.jobs(
        "Pending",
        "Pending",
        create="CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20), name text, "
        "CHECK (id <> 2 OR state <> 'Queued'))",
    )
    desk = place.desk()
    with pytest.raises(DBAPIError) as caught:
        claim(desk, few=0)
    assert not desk.dialect.is_transient(caught.value)
    assert place.states() == {1: "Pending", 2: "Pending"}
    assert place.attempts("id") == []
    assert [one.key[0] for one in claim(desk, 1)] == [1]
    with pytest.raises(DBAPIError):
        claim(desk)
    assert place.states() == {1: "Queued", 2: "Pending"}


# Giving back


def test_what_has_not_begun_is_given_back_as_if_never_claimed(place: Place) -> None:
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    mine, theirs = claim(desk, 3, producer="me"), claim(desk, 1, producer="them")
    start(desk, mine[1])
    assert set(Claims(desk, "me", 3).give_back()) == {mine[0].rq_id, mine[2].rq_id}
    assert place.states() == {1: "Pending", 2: "Started", 3: "Pending", 4: "Queued", 5: "Pending"}
    assert place.attempts("id") == [(mine[1].id,), (theirs[0].id,)]
    assert start(desk, mine[0], mine[2], run="late") == []
    assert Claims(desk, "me", 3).give_back() == []
    assert [one.key[0] for one in claim(desk)] == [1, 3, 5]


def test_claims_may_be_given_back_by_their_ids(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    claims = claim(desk, producer="them")
    assert Claims(desk, "", 0).give_back([claims[1].id, 10**9]) == [claims[1].rq_id]
    assert place.states() == {1: "Queued", 2: "Pending", 3: "Queued"}
    assert Claims(desk, "", 0).give_back([]) == []


def test_a_job_is_void_once_it_carries_nothing(place: Place) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    claims = Claims(desk, "producer", 3)
    one, two, three, four = claims.claim(4, lambda count: ["batch"] * 3 + ["alone"], 0)
    assert claims.give_back([one.id, four.id]) == ["alone"]
    place.set(2, "Pending")
    anew = claims.claim(2, rq_ids)
    assert [claim.key for claim in anew] == [(1,), (2,)]
    assert claims.take_void() == []  # the batch still carries row 3
    start(desk, three)
    assert claims.give_back([two.id, three.id]) == []
    finish(desk, three)
    place.set(1, "Pending")
    assert len(claims.claim(1, rq_ids)) == 1
    assert claims.take_void() == [anew[0].rq_id]
    assert claims.take_void() == []


def test_giving_back_keeps_what_the_owner_wrote(place: Place) -> None:
    words = ["Cancelled", "queued", "Pending", "Started"]
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    claims = claim(desk)
    for number, word in enumerate(words, 1):
        place.set(number, word)
    assert set(Claims(desk, "producer", 3).give_back()) == {one.rq_id for one in claims}
    assert place.states() == dict(enumerate(words, 1))
    assert place.attempts("id") == []


def test_a_claim_that_has_spent_tries_stays_open_and_is_due_at_once(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    sent, unsent, later = claim(desk)
    start(desk, sent, unsent, later)
    finish(desk, [sent, unsent], Outcome.FAILED)
    finish(desk, later, Outcome.POSTPONED, postpone=60.0)
    due = all_due(desk, 2)
    (one,) = [found for found in due if found.claim.id == sent.id]
    assert Retries(desk).take(one, "sent again")
    assert Claims(desk, "producer", 3).give_back() == []
    assert place.states() == {1: "Queued", 2: "Queued", 3: "Queued"}
    due = all_due(desk, 2)
    assert {found.claim.id for found in due} == {sent.id, unsent.id}
    second = next_attempt(desk, sent, "second")
    assert (second.attempt, second.failures) == (2, 1)


def test_giving_back_right_after_sending_loses_no_retry(place: Place) -> None:
    # Within one tick of the database's clock, which on SQLite is a millisecond.
    place.jobs(*["Pending"] * 20)
    desk = place.desk()
    claims = failed(desk, 20)
    due = all_due(desk, 20)
    for one in due:
        Retries(desk).take(one, one.claim.rq_id)
        Claims(desk, "", 0).give_back([one.claim.id])
    eventually(lambda: len(Retries(desk).due(50)) == len(claims), timeout=30)


def test_a_start_and_a_give_back_at_once_agree(place: Place) -> None:
    place.jobs(*["Pending"] * 30)
    one, other = place.desk(), place.desk()
    claims = claim(one)
    barrier = threading.Barrier(2)
    started: set[int] = set()
    given: set[str] = set()

    def starter() -> None:
        for pair in zip(claims[::2], claims[1::2], strict=True):
            barrier.wait(30)
            started.update(row.claim.id for row in start(one, *pair))

    def giver() -> None:
        for pair in zip(claims[::2], claims[1::2], strict=True):
            barrier.wait(30)
            given.update(Claims(other, "", 0).give_back([two.id for two in pair]))

    threads = [threading.Thread(target=work) for work in (starter, giver)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {two.id for two in claims if two.rq_id in given} == {two.id for two in claims} - started
    expected = {two.key[0]: "Started" if two.id in started else "Pending" for two in claims}
    assert place.states() == expected
