"""The store's contract, the same on every database: who gets a row, what is written, and what changes nothing."""

from __future__ import annotations

import multiprocessing
import secrets
import string
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from servers import Database, DatabaseServer, eventually
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from nih_sched import get_jobs, ledger, telemetry
from nih_sched.dialects import connect
from nih_sched.errors import (
    AmbiguousStates,
    BadLedger,
    BadStateWord,
    DatabaseRefused,
    KeysDontMatch,
    NewerLedger,
    NihError,
    NoPrimaryKey,
    NoSuchColumn,
    NoSuchTable,
    NotATable,
    UnusableKey,
    UsageError,
)
from nih_sched.model import Claim, Ended, Fate, Outcome, StartedRow, State, open_key
from nih_sched.settings import Settings
from nih_sched.store import Attempts, Claims, Desk, Due, Looks, Retries, open_desk, source_desk, source_facts
from nih_sched.store.attempts import running
from nih_sched.store.desk import register
from nih_sched.store.rows import give_all_back, insert_rows

SIMPLE = "CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(100))"


class Place:
    """A database with our own hand on it, as the table's owner has."""

    def __init__(self, database: Database) -> None:
        self.name, self.url = database.name, database.url
        self.engine = create_engine(database.url)
        self._desks: list[Desk] = []
        if self.name == "sqlite":
            event.listen(self.engine, "connect", lambda c, record: c.execute("PRAGMA busy_timeout = 20000"))

    def run(self, sql: str, **values: Any) -> list[Any]:
        """Run the owner's SQL in a transaction of its own; return its rows."""
        with self.engine.begin() as connection:
            result = connection.execute(text(sql), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    def jobs(self, *words: str, create: str = SIMPLE) -> None:
        """Make the simple table, its rows 1, 2, … in these states."""
        self.run(create)
        for number, word in enumerate(words, 1):
            self.run("INSERT INTO jobs (id, state, name) VALUES (:i, :w, :n)", i=number, w=word, n=f"n{number}")

    def states(self) -> dict[Any, Any]:
        """{id: word} of the simple table."""
        return dict(self.run("SELECT id, state FROM jobs ORDER BY id"))

    def set(self, number: int, word: str) -> None:
        """The owner changes a row's word."""
        self.run("UPDATE jobs SET state = :w WHERE id = :i", w=word, i=number)

    def desk(self, **settings: Any) -> Desk:
        """A desk of its own engine, as another process has it; the source is written down."""
        desk = open_desk(Settings(database_url=self.url, **{"delay": 0.0, **settings}))
        self._desks.append(desk)
        register(desk)
        return desk

    def attempts(self, *columns: str) -> list[tuple[Any, ...]]:
        """These columns of the ledger's attempts, oldest record first."""
        return self.run(f"SELECT {', '.join(columns)} FROM nih_sched_attempts ORDER BY id")

    def close(self) -> None:
        for desk in self._desks:
            desk.close()
        self.engine.dispose()


@pytest.fixture
def place(database: Database) -> Iterator[Place]:
    place = Place(database)
    yield place
    place.close()


def only(*kinds: str) -> pytest.MarkDecorator:
    """Run the test on these kinds of database alone."""
    marks = {"postgresql": [pytest.mark.postgresql], "mariadb": [pytest.mark.mariadb]}
    return pytest.mark.parametrize(
        "database", [pytest.param(kind, marks=marks.get(kind, [])) for kind in kinds], indirect=True
    )


@pytest.fixture
def events() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What is emitted meanwhile."""
    heard: list[tuple[str, dict[str, Any]]] = []
    telemetry.unsubscribe_all()
    telemetry.subscribe(lambda event, facts: heard.append((event, facts)))
    yield heard
    telemetry.unsubscribe_all()


def rq_id() -> str:
    return secrets.token_hex(10)


def claim(desk: Desk, limit: int = 100, *, producer: str = "producer", tries: int = 3) -> list[Claim]:
    return Claims(desk, producer, tries).claim(limit, rq_id)


def start(desk: Desk, *claims: Claim, run: str = "run", columns: Sequence[str] = ()) -> list[StartedRow]:
    return Attempts(desk, run, "worker").start([claim.id for claim in claims], columns)


def finish(
    desk: Desk, claims: Claim | Sequence[Claim], outcome: Outcome = Outcome.DONE, *, run: str = "run", **facts: Any
) -> list[Fate | None]:
    claims = [claims] if isinstance(claims, Claim) else claims
    return Attempts(desk, run, "worker").finish([Ended(claim, outcome, **facts) for claim in claims])


def run_once(desk: Desk, outcome: Outcome = Outcome.DONE, **facts: Any) -> Fate | None:
    """Claim the first ready row and run it to its end."""
    (one,) = claim(desk, 1)
    (row,) = start(desk, one)
    return finish(desk, row.claim, outcome, **facts)[0]


def next_attempt(desk: Desk, one: Claim, run: str) -> Claim:
    """Start a claim's next attempt once it is due."""
    (row,) = eventually(lambda: start(desk, one, run=run), timeout=5, every=0.005)
    return row.claim


def ready(desk: Desk) -> int:
    return Looks(desk).ready()


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
    assert Looks(desk).open_claims() == Looks(desk).open_claims("me") == 2
    assert Looks(desk).open_claims("other") == 0


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
        assert time.monotonic() - began < 5
    assert [one.key[0] for one in claim(desk)] == [1, 3]


@only("postgresql", "mariadb")
def test_a_claim_keeps_nobody_from_inserting(place: Place) -> None:
    # MariaDB's default isolation would lock the gaps between the keys.
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    query = desk.dialect.lock_ready(Claims(desk, "", 0).select_ready(100), desk.rows.table)
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
        claim(desk)
    assert not desk.dialect.is_transient(caught.value)
    assert place.states() == {1: "Pending", 2: "Pending"}
    assert place.attempts("id") == []
    assert [one.key[0] for one in claim(desk, 1)] == [1]


# Start


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


def test_a_deleted_row_is_not_started(place: Place, events: list[tuple[str, dict[str, Any]]]) -> None:
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
    desk = place.desk(delay=0.5)
    (one,) = claim(desk)
    start(desk, one)
    assert finish(desk, one, Outcome.FAILED) == [Fate(State.RETRYING, 1, 0.5)]
    began = time.monotonic()
    tries = 0
    while not (rows := start(desk, one, run="early")):
        assert place.attempts("run", "started_at")[0] == (None, None)
        tries += 1
        time.sleep(0.02)
    assert tries > 3
    assert 0.4 <= time.monotonic() - began < 5
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


# Finish


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
    assert Looks(desk).open_claims() == 0
    assert Looks(desk).ended_since(before) == {"done": 1}
    assert Looks(desk).ended_since(before, "producer") == {"done": 1}
    assert Looks(desk).ended_since(before, "other") == {}
    assert Looks(desk).by_word() == {"Done": 1}


def snapshot(place: Place) -> tuple[Any, Any]:
    return place.states(), place.run("SELECT * FROM nih_sched_attempts ORDER BY id")


def test_a_stale_finish_changes_nothing(place: Place, events: list[tuple[str, dict[str, Any]]]) -> None:
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
    assert Looks(desk).open_claims() == 1
    assert Looks(desk).ended_since(datetime(2000, 1, 1)) == {}

    second = next_attempt(desk, one, "second")
    assert (second.id, second.attempt, second.failures, second.tries) == (one.id, 2, 1, 1)
    (fate,) = finish(desk, second, Outcome.TIMED_OUT, run="second", reason="slow")
    assert fate == Fate(State.FAILED, 2)
    assert place.states() == {1: "Failed"}
    assert place.attempts(*columns)[0] == (None, None, 2, 2, 1, "second", "timed out", "slow", None)
    assert Looks(desk).ended_since(datetime(2000, 1, 1)) == {"timed out": 1}
    (failure,) = Looks(desk).last_failures(10)
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
    assert run_once(desk, Outcome.INTERRUPTED) == Fate(State.READY, 0)
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
    assert finish(desk, second, Outcome.INTERRUPTED, run="second") == [Fate(State.RETRYING, 1, 0.0)]
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
    assert 0.25 <= time.monotonic() - began < 3
    assert (second.attempt, second.failures) == (2, 0)
    assert finish(desk, second, Outcome.POSTPONED, run="second", postpone=100 * 365 * 86400.0)[0] is not None
    assert start(desk, one, run="third") == []
    seconds = Retries(desk).seconds_to_next()
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
def test_a_refused_row_keeps_its_outcome_and_harms_no_other(
    place: Place, how: str, events: list[tuple[str, dict[str, Any]]]
) -> None:
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


# Retries


def failed(desk: Desk, count: int = 1, tries: int = 3) -> list[Claim]:
    """Claims whose first attempt has failed."""
    claims = claim(desk, count, tries=tries)
    start(desk, *claims)
    finish(desk, claims, Outcome.FAILED)
    return claims


def all_due(desk: Desk, count: int) -> list[Due]:
    """What is due, once there are `count` of them."""
    return eventually(lambda: len(found := Retries(desk).due(100)) == count and found, timeout=5, every=0.001)


def test_only_what_is_due_is_due_and_the_longest_due_comes_first(place: Place) -> None:
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    retries = Retries(desk)
    assert retries.due(10) == []
    assert retries.seconds_to_next() is None
    claims = claim(desk)
    start(desk, *claims[:4])
    for one, seconds in ((claims[2], 0.1), (claims[0], 0.3), (claims[1], 60.0)):
        finish(desk, one, Outcome.POSTPONED, postpone=seconds)
    assert retries.due(10) == []
    left = retries.seconds_to_next()
    assert left is not None
    assert 0 <= left <= 0.1
    (first,) = eventually(lambda: retries.due(10), timeout=5, every=0.005)
    assert (first.claim_id, first.rq_id, first.failures, first.tries) == (claims[2].id, claims[2].rq_id, 0, 3)
    assert 0 <= first.overdue < 0.2
    both = all_due(desk, 2)
    assert [one.claim_id for one in both] == [claims[2].id, claims[0].id]
    assert both[0].overdue > 0.19
    assert [one.claim_id for one in retries.due(1)] == [claims[2].id]
    assert all(retries.take(one, rq_id()) for one in both)
    assert retries.due(10) == []
    left = retries.seconds_to_next()
    assert left is not None
    assert 50 < left <= 60


def test_another_sources_retries_are_its_own(place: Place) -> None:
    place.jobs("Pending", "other")
    one, other = place.desk(), place.desk(ready_val="other")
    failed(one)
    all_due(one, 1)
    assert Retries(other).due(10) == []
    assert Retries(other).seconds_to_next() is None


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
                taken.append((one.claim_id, mine))

    threads = [threading.Thread(target=producer, args=(desk,)) for desk in desks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(number for number, _ in taken) == sorted(one.claim_id for one in due)
    assert dict(taken) == dict(place.run("SELECT id, rq_id FROM nih_sched_attempts WHERE of_claim IS NULL"))


def test_a_claim_that_has_begun_or_ended_meanwhile_is_not_taken(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    one, other = failed(desk, 2)
    due = {found.claim_id: found for found in all_due(desk, 2)}
    next_attempt(desk, one, "second")
    place.set(2, "Pending")
    claim(desk)  # closes the old claim
    assert not Retries(desk).take(due[one.id], rq_id())
    assert not Retries(desk).take(due[other.id], rq_id())
    assert not Retries(desk).take(Due(10**9, "x", 0, 0, 0.0), rq_id())


def test_a_claim_that_was_carried_elsewhere_is_not_taken_by_its_old_id(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = failed(desk)
    (due,) = all_due(desk, 1)
    assert Retries(desk).carry(one.id, "new id")
    assert not Retries(desk).take(due, rq_id())
    (due,) = Retries(desk).due(10)
    assert due.rq_id == "new id"
    assert Retries(desk).take(due, "newer id")
    assert not Retries(desk).carry(one.id, "late")
    assert place.attempts("rq_id")[0] == ("newer id",)


def test_a_retry_may_come_again_and_again(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = failed(desk, tries=6)
    for attempt in range(2, 7):
        (due,) = all_due(desk, 1)
        assert due.failures == attempt - 1
        assert Retries(desk).take(due, due.rq_id)
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
    assert {one.claim_id for one in all_due(desk, 1)} == {
        claims[2].id
    }  # not the ended, nor one that waits for its time
    assert len(start(desk, claims[2], run="again")) == 1
    Retries(desk).put_off([claims[1].id, claims[2].id], 60.0)  # that one runs
    assert Retries(desk).due(10) == []
    assert place.attempts("due_at IS NULL")[1:3] == [(False,), (True,)]


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
    (one,) = [found for found in due if found.claim_id == sent.id]
    assert Retries(desk).take(one, "sent again")
    assert Claims(desk, "producer", 3).give_back() == []
    assert place.states() == {1: "Queued", 2: "Queued", 3: "Queued"}
    due = all_due(desk, 2)
    assert {found.claim_id for found in due} == {sent.id, unsent.id}
    second = next_attempt(desk, sent, "second")
    assert (second.attempt, second.failures) == (2, 1)


def test_giving_back_right_after_sending_loses_no_retry(place: Place) -> None:
    # Within one tick of the database's clock, which on SQLite is a millisecond.
    place.jobs(*["Pending"] * 20)
    desk = place.desk()
    claims = failed(desk, 20)
    due = all_due(desk, 20)
    for one in due:
        Retries(desk).take(one, one.rq_id)
        Claims(desk, "", 0).give_back([one.claim_id])
    eventually(lambda: len(Retries(desk).due(50)) == len(claims), timeout=2)


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


def test_uninstalling_gives_everything_back(place: Place) -> None:
    place.jobs(*["Pending"] * 6, "new", "Done")
    desk, other = place.desk(), place.desk(ready_val="new", queued_val="taken")
    claims = claim(desk, 5)
    claim(other)
    start(desk, *claims[1:])
    finish(desk, claims[1])
    finish(desk, claims[2], Outcome.POSTPONED, postpone=60.0)
    place.set(5, "Cancelled")
    count, sources = give_all_back(desk.engine, desk.ledger)
    assert (count, set(sources)) == (4, {desk.source.name, other.source.name})
    assert place.states() == {
        1: "Pending",
        2: "Done",
        3: "Pending",
        4: "Pending",
        5: "Cancelled",
        6: "Pending",
        7: "new",
        8: "Done",
    }
    assert place.run("SELECT count(*) FROM nih_sched_attempts WHERE open_key IS NOT NULL") == [(0,)]
    assert finish(desk, claims[3]) is not None
    ledger.drop(desk.engine, desk.ledger)
    assert inspect(place.engine).get_table_names() == ["jobs"]
    ledger.drop(desk.engine, desk.ledger)


def test_uninstalling_keeps_words_that_only_look_like_ours(place: Place) -> None:
    collate = " COLLATE NOCASE" if place.name == "sqlite" else ""
    place.jobs("Pending", create=f"CREATE TABLE jobs (id int PRIMARY KEY, state varchar(20){collate}, name text)")
    desk = place.desk()
    claim(desk)
    place.set(1, "queued")
    assert give_all_back(desk.engine, desk.ledger)[0] == 0
    assert place.states() == {1: "queued"}


def test_uninstalling_works_after_a_table_is_gone(place: Place) -> None:
    place.jobs("Pending")
    place.run("CREATE TABLE mails (id integer PRIMARY KEY, state varchar(20))")
    place.run("INSERT INTO mails VALUES (1, 'Pending')")
    desk, other = place.desk(), place.desk(table="mails")
    claim(desk)
    claim(other)
    place.run("DROP TABLE jobs")
    count, sources = give_all_back(desk.engine, desk.ledger)
    assert (count, set(sources)) == (1, {desk.source.name, other.source.name})
    assert place.run("SELECT state FROM mails") == [("Pending",)]


# Keys

U = [uuid.UUID(int=number << 64 | 7) for number in (1, 2, 3)]
TEXTS = ["it's", '"q"', "a b", "größe", "🎈", "%s %(x)s :x", "back\\slash", "a,b", "\t\n", "null", "", "0"]
INT = ["id integer"]
KEYS: dict[str, tuple[str, list[str], list[tuple[Any, ...]]]] = {
    # id: kinds of database, key columns with types, keys in the order in which they are claimed
    "integer": ("spm", INT, [(-5,), (0,), (7,)]),
    "bigint": ("spm", ["id bigint"], [(-(2**63),), (2**53 + 1,), (2**63 - 1,)]),
    "text": ("spm", ["id varchar(50)"], [(text_,) for text_ in TEXTS]),
    "long text": ("spm", ["id varchar(700)"], [("x" * 699 + "1",), ("x" * 699 + "2",)]),
    "char": ("spm", ["id char(10)"], [("a",), ("b b",), ("c" * 10,)]),
    "case": ("sp", ["id varchar(50)"], [("A",), ("a",), ("a ",), ("á",)]),
    "binary text": ("m", ["id varchar(50) COLLATE utf8mb4_bin"], [("A",), ("a",), ("á",), ("🎈",), ("🎉",)]),
    "uuid": ("p", ["id uuid"], [(one,) for one in U]),
    "uuid of MariaDB": ("m", ["id uuid"], [(one,) for one in U]),
    "odd types": ("s", ["id UUID", "other STRING"], [("1-a", "x"), ("1-b", 7), ("x", "x")]),
    "char uuid": ("sm", ["id char(36)"], [(str(one),) for one in U]),
    "binary uuid": ("m", ["id binary(16)"], [(one.bytes,) for one in U]),
    "bytes": ("sp", ["id {bytes}"], [(b"\0",), (b"\0\xff'",), (b"a",)]),
    "decimal": ("spm", ["id numeric(12,3)"], [(Decimal("-1.500"),), (Decimal("0.001"),), (Decimal("123456789.123"),)]),
    "date": ("spm", ["id date"], [(datetime(2023, 1, 2).date(),), (datetime(2024, 2, 29).date(),)]),
    "timestamp": ("spm", ["id {timestamp}"], [(datetime(2024, 2, 29, 1, 2, 3),), (datetime(2024, 2, 29, 1, 2, 4, 5),)]),
    "timestamptz": (
        "p",
        ["id timestamptz"],
        [(datetime(2024, 2, 29, 1, 2, 3, 4, UTC),), (datetime(2025, 1, 1, tzinfo=UTC),)],
    ),
    "integer, text": (
        "spm",
        ["region integer", "id varchar(50)"],
        [(1, "it's"), (1, "x"), (2, "a,b"), (2, "x"), (3, "")],
    ),
    "uuid, integer": ("pm", ["tenant uuid", "id integer"], [(U[0], 1), (U[0], 2), (U[1], 1)]),
    "three": (
        "spm",
        ["a integer", "b varchar(9)", "c date"],
        [(1, "x", datetime(2024, 1, 1).date()), (1, "y", datetime(2023, 1, 1).date())],
    ),
}
KINDS = {"s": "sqlite", "p": "postgresql", "m": "mariadb"}
CASES = [
    pytest.param(
        KINDS[letter],
        name,
        marks=getattr(pytest.mark, KINDS[letter]) if letter != "s" else [],
        id=f"{name}-{KINDS[letter]}",
    )
    for name, (letters, _, _) in KEYS.items()
    for letter in letters
]


@pytest.mark.parametrize(("database", "name"), CASES, indirect=["database"])
def test_keys_of_every_kind(place: Place, name: str) -> None:
    _, columns, keys = KEYS[name]
    types = {
        "bytes": {"postgresql": "bytea"}.get(place.name, "blob"),
        "timestamp": {"mariadb": "datetime(6)"}.get(place.name, "timestamp"),
    }
    names = [column.split()[0] for column in columns]
    definition = ", ".join(f"{column} NOT NULL" for column in columns).format_map(types)
    collate = " CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" if name == "text" and place.name == "mariadb" else ""
    place.run(f"CREATE TABLE jobs ({definition}, state varchar(20), PRIMARY KEY ({', '.join(names)})){collate}")
    desk = place.desk()
    shuffled = sorted(keys, key=lambda key: hash(repr(key)))
    insert_rows(desk.engine, desk.rows, [dict(zip(names, key, strict=True)) for key in shuffled], lambda count: None)

    claims = claim(desk)
    assert len(claims) == len(keys)
    found = [tuple(part.rstrip() if name == "char" else part for part in one.key) for one in claims]
    assert set(found) == set(keys)
    assert [type(part) for part in found[0]] == [type(part) for part in keys[0]]
    if "text" not in name and name != "case":  # databases order texts by their own lights
        assert found == keys
    # Each key finds its own row and no other, in every statement.
    last = claims[-1]
    rows = start(desk, *claims[:-1], columns=names)
    assert sorted(map(repr, (row.claim for row in rows))) == sorted(map(repr, claims[:-1]))
    assert all(tuple(row.values[column] for column in names) == row.claim.key for row in rows)
    assert Looks(desk).by_word() == {"Started": len(keys) - 1, "Queued": 1}
    finish(desk, claims[0], Outcome.DONE)
    assert Looks(desk).by_word().get("Done") == 1
    if len(claims) > 2:
        finish(desk, claims[1:-1], Outcome.FAILED)
        for one in claims[1:-1]:
            assert finish(desk, next_attempt(desk, one, "second"), run="second") == [Fate(State.DONE, 1)]
    assert Claims(desk, "producer", 0).give_back() == [last.rq_id]
    assert Looks(desk).by_word() == {"Done": len(keys) - 1, "Pending": 1}
    assert [one.key for one in claim(desk)] == [last.key]
    assert give_all_back(desk.engine, desk.ledger)[0] == 1
    assert Looks(desk).by_word() == {"Done": len(keys) - 1, "Pending": 1}


def test_many_composite_keys_in_one_statement(place: Place) -> None:
    place.run("CREATE TABLE jobs (a integer, b varchar(20), state varchar(20), PRIMARY KEY (a, b))")
    desk = place.desk()
    insert_rows(desk.engine, desk.rows, [{"a": n % 7, "b": f"k{n}"} for n in range(1500)], lambda count: None)
    claims = claim(desk, 1500)
    assert len({one.key for one in claims}) == 1500
    assert len(start(desk, *claims, columns=["a", "b"])) == 1500
    finish(desk, claims[:50], Outcome.INTERRUPTED)
    assert len(claim(desk, 100)) == 50


# Status columns

CODES = {
    "ready_val": "0",
    "queued_val": "1",
    "started_val": "2",
    "done_val": "3",
    "failed_val": "4",
    "retrying_val": "5",
}
WORDS = ["Pending", "Queued", "Started", "Done", "Failed", "Cancelled"]
LISTED = ", ".join(f"'{word}'" for word in WORDS)
SHORT = {"ready_val": "new", "started_val": "busy", "done_val": "ok", "failed_val": "bad"}
STATUS: dict[str, tuple[str, list[str], str, dict[str, str]]] = {
    "varchar": ("spm", [], "varchar(20)", {}),
    "text": ("spm", [], "text", {}),
    "char": ("spm", [], "char(12)", {}),
    "not null and default": ("spm", [], "varchar(20) DEFAULT 'Pending' NOT NULL", {}),
    "check": ("spm", [], f"varchar(20) CHECK (state IN ({LISTED}))", {}),
    "integer": ("spm", [], "integer", CODES),
    "smallint": ("spm", [], "smallint", CODES),
    "tinyint": ("m", [], "tinyint unsigned", CODES),
    "numeric": ("spm", [], "numeric(3)", CODES),
    "integer check": ("spm", [], "integer NOT NULL CHECK (state BETWEEN 0 AND 5)", CODES),
    "enum": ("p", [f"CREATE TYPE word AS ENUM ({LISTED})"], "word", {}),
    "enum of odd name": ("p", [f'CREATE TYPE "odd Word\'s" AS ENUM ({LISTED})'], '"odd Word\'s"', {}),
    "enum elsewhere": ("p", ['CREATE SCHEMA "Else"', f'CREATE TYPE "Else".word AS ENUM ({LISTED})'], '"Else".word', {}),
    "enum with check": (
        "p",
        [f"CREATE TYPE word AS ENUM ({LISTED})"],
        "word NOT NULL CHECK (state <> 'Cancelled')",
        {},
    ),
    "short enum": ("p", ["CREATE TYPE word AS ENUM ('new', 'busy', 'ok', 'bad')"], "word", SHORT),
    "domain": ("p", [f"CREATE DOMAIN word AS text CHECK (VALUE IN ({LISTED}))"], "word", {}),
    "enum of MariaDB": ("m", [], f"enum({LISTED})", {}),
    "short enum of MariaDB": ("m", [], "enum('new', 'busy', 'ok', 'bad') NOT NULL CHECK (state <> '')", SHORT),
    "string": ("s", [], "STRING", {}),
    "no type": ("s", [], "", {}),
}
STATUS_CASES = [
    pytest.param(
        KINDS[letter],
        name,
        marks=getattr(pytest.mark, KINDS[letter]) if letter != "s" else [],
        id=f"{name}-{KINDS[letter]}",
    )
    for name, (letters, _, _, _) in STATUS.items()
    for letter in letters
]


@pytest.mark.parametrize(("database", "name"), STATUS_CASES, indirect=["database"])
def test_status_columns_of_every_kind(place: Place, name: str) -> None:
    _, before, kind, settings = STATUS[name]
    for statement in before:
        place.run(statement)
    place.run(f"CREATE TABLE jobs (id integer PRIMARY KEY, state {kind}, note varchar(9))")
    words = {
        state: settings.get(f"{state}_val", state.capitalize()) for state in ("ready", "started", "done", "failed")
    }
    words["ready"] = settings.get("ready_val", "Pending")
    words["queued"] = settings.get("queued_val", "Queued" if not settings else words["started"])
    words["retrying"] = settings.get("retrying_val", words["queued"])
    for number in range(1, 5):
        quoted = words["ready"] if settings is CODES else f"'{words['ready']}'"
        place.run(f"INSERT INTO jobs (id, state) VALUES ({number}, {quoted})")
    desk = place.desk(**settings)
    # A worker knows its words from the ledger.
    facts = source_facts(desk.engine, desk.ledger, desk.source.name)
    assert facts is not None
    worker = source_desk(desk.engine, desk.ledger, desk.source.name, facts)

    def states() -> list[str]:
        return [str(word).strip() for word in place.states().values()]

    assert ready(desk) == 4
    claims = claim(desk, 3, tries=1)
    assert [one.key[0] for one in claims] == [1, 2, 3]
    assert states() == [*[words["queued"]] * 3, words["ready"]]
    assert len(start(worker, *claims, columns=["state", "id"])) == 3
    assert states() == [*[words["started"]] * 3, words["ready"]]
    finish(worker, claims[0])
    finish(worker, claims[1], Outcome.FAILED)
    finish(worker, claims[2], Outcome.INTERRUPTED)
    assert states() == [words["done"], words["retrying"], words["ready"], words["ready"]]
    finish(worker, next_attempt(worker, claims[1], "second"), Outcome.FAILED, run="second")
    assert states() == [words["done"], words["failed"], words["ready"], words["ready"]]
    later = claim(desk, 1)
    assert Claims(desk, "producer", 0).give_back() == [later[0].rq_id]
    assert states()[2] == words["ready"]
    with desk.engine.connect() as connection:
        assert ready(desk) == 2
        assert (
            connection.scalar(select(desk.rows.table.c.id).where(desk.rows.status == desk.rows.words[State.DONE])) == 1
        )


# Refusals


def test_every_default_that_does_not_fit_is_named_in_one_message(place: Place) -> None:
    place.run("CREATE TABLE jobs (id integer PRIMARY KEY, state integer)")
    with pytest.raises(BadStateWord) as caught:
        place.desk(ready_val="0")
    assert str(caught.value) == (
        "Column state of jobs can't hold our default for --started-val, --done-val, --failed-val. "
        "Its type is INTEGER. Set --started-val, --done-val, --failed-val."
    )
    with pytest.raises(BadStateWord) as caught:
        place.desk(ready_val="0", done_val="two", started_val="1")
    text_ = str(caught.value)
    assert "the done word 'two' (not a whole number)" in text_
    assert "our default for --failed-val" in text_
    desk = place.desk(ready_val="0", started_val="1", done_val="2", failed_val="3")
    assert desk.rows.words == {
        State.READY: 0,
        State.QUEUED: 1,
        State.STARTED: 1,
        State.DONE: 2,
        State.FAILED: 3,
        State.CANCELLED: 3,
        State.RETRYING: 1,
    }


def test_words_that_are_too_long_are_all_named(place: Place) -> None:
    place.run("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(4))")
    with pytest.raises(BadStateWord) as caught:
        place.desk(done_val="finished")
    text_ = str(caught.value)
    assert "the ready word 'Pending' (longer than 4 characters); the done word 'finished' (longer" in text_
    assert "our default for --started-val, --failed-val" in text_
    assert place.desk(ready_val="new", started_val="busy", failed_val="bad").rows.words[State.DONE] == "Done"


def test_a_word_is_as_long_as_it_has_characters(place: Place) -> None:
    place.run("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(7))")
    place.run("INSERT INTO jobs VALUES (1, 'größe🎈.')")
    assert len(claim(place.desk(ready_val="größe🎈.", cancelled_val="Failed"))) == 1


@only("postgresql", "mariadb")
def test_a_number_beyond_the_column_is_refused(place: Place) -> None:
    codes = {"ready_val": "0", "started_val": "1", "failed_val": "3"}
    kinds = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63, "numeric(4)": 10**4}
    if place.name == "mariadb":
        kinds |= {"tinyint": 2**7, "tinyint unsigned": 2**8, "integer unsigned": 2**32}
    for number, (kind, beyond) in enumerate(kinds.items()):
        place.run(f"CREATE TABLE jobs{number} (id integer PRIMARY KEY, state {kind})")
        with pytest.raises(BadStateWord, match=rf"the done word '{beyond}' \(beyond its range\)"):
            place.desk(table=f"jobs{number}", done_val=str(beyond), **codes)
        desk = place.desk(table=f"jobs{number}", done_val=str(beyond - 1), **codes)
        place.run(f"INSERT INTO jobs{number} VALUES (1, 0)")
        run_once(desk)
        assert place.run(f"SELECT state FROM jobs{number}") == [(beyond - 1,)]


@only("postgresql", "mariadb")
def test_an_enum_says_which_words_it_has(place: Place) -> None:
    values = "('pending', 'Started', 'Done')"
    if place.name == "postgresql":
        place.run(f"CREATE TYPE word AS ENUM {values}")
    kind = "word" if place.name == "postgresql" else f"enum{values}"
    place.run(f"CREATE TABLE jobs (id integer PRIMARY KEY, state {kind})")
    with pytest.raises(BadStateWord) as caught:
        place.desk()
    assert "the ready word 'Pending' (not one of its values); our default for --failed-val" in str(caught.value)
    with pytest.raises(BadStateWord) as caught:
        place.desk(ready_val="pending", failed_val="no")
    assert str(caught.value).endswith("Its values: pending, Started, Done.")


def test_no_other_word_may_be_the_ready_word(place: Place) -> None:
    place.jobs("Pending")
    for state in ("queued", "started", "done", "failed", "cancelled", "retrying"):
        with pytest.raises(AmbiguousStates, match=f"Set --{state}-val to another word") as caught:
            place.desk(**{f"{state}_val": "Pending"})
        assert "both are 'Pending'" in str(caught.value)
        place.desk(**{f"{state}_val": "pending"})
    assert place.states() == {1: "Pending"}


def test_tables_that_cannot_be_served_are_told_apart(place: Place) -> None:
    place.jobs("Pending")
    place.run("CREATE VIEW seen AS SELECT * FROM jobs")
    place.run("CREATE TABLE keyless (id integer, state varchar(20))")
    place.run("CREATE TABLE stateless (id integer PRIMARY KEY, status varchar(20))")
    with pytest.raises(NoSuchTable, match=r"There is no table Jobs_ in .*\. It has: jobs, keyless, stateless\."):
        place.desk(table="Jobs_")
    with pytest.raises(NoSuchTable, match=r"no table nowhere\.jobs in .*\."):
        place.desk(table="nowhere.jobs")
    with pytest.raises(NotATable, match="seen is a view"):
        place.desk(table="seen")
    with pytest.raises(NoSuchColumn, match=r"Table stateless has no column 'state' \(default\)\. It has: id, status\."):
        place.desk(table="stateless")
    with pytest.raises(NoPrimaryKey, match="Table keyless has no primary key"):
        place.desk(table="keyless")
    with pytest.raises(NoSuchColumn, match="has no column 'number'"):
        place.desk(table="keyless", primary_key="id, number")
    with pytest.raises(NoSuchColumn, match="has no column 'kind'"):
        place.desk(job_column="kind")
    assert not any(name.startswith("nih_sched") for name in inspect(place.engine).get_table_names())
    place.run("INSERT INTO keyless VALUES (5, 'Pending')")
    assert [one.key for one in claim(place.desk(table="keyless", primary_key="id"))] == [(5,)]


def test_an_empty_database_is_told_how_to_begin(place: Place) -> None:
    with pytest.raises(NoSuchTable, match=r"It has no tables\. `scheduler init --sample` makes one"):
        place.desk()


# Identifiers

ODD_COLUMNS = ["order", "Select", "größe", "per cent %", "%s", "%(x)s", "a:b", ":x", 'q"uote', "back`tick", "it's"]
ODD_COLUMNS += [
    "br(ack)et[s]",
    "dot.ted",
    "full name",
    "--",
    "back\\slash",
    "nih_sched_status",
    "nih_sched_0",
    "param_1",
]


ODD_TABLES = ["Order", "select", "größe", "a b:c%d", "dot.ted", "q\"u`o'te", "%s", "%(x)s"]


def test_identifiers_of_any_characters(place: Place) -> None:
    for table in ODD_TABLES:
        goes_the_whole_way(place, table)


def goes_the_whole_way(place: Place, table: str) -> None:
    key, number, status = "Key:%(k)s", "NO %", "st:a%t(e)"
    # SQLAlchemy reads a backtick in a column's name as two on MariaDB.
    odd = [name for name in ODD_COLUMNS if name != "back`tick" or place.name != "mariadb"]
    made = Table(
        table,
        MetaData(),
        Column(key, String(20), primary_key=True),
        Column(number, Integer, primary_key=True, autoincrement=False),
        Column(status, String(20)),
        *(Column(name, String(30)) for name in odd),
    )
    made.create(place.engine)
    records = [{key: "k", number: n, status: "Pending", **{c: f"{c} {n}" for c in odd}} for n in (1, 2, 3)]
    with place.engine.begin() as connection:
        for record in records:
            connection.execute(insert(made), record)
    desk = place.desk(table=table, status_key=status)
    assert desk.rows.columns == (key, number, status, *odd)
    claims = claim(desk, 2)
    assert [one.key for one in claims] == [("k", 1), ("k", 2)]
    rows = start(desk, *claims, columns=desk.rows.columns)
    found = sorted((dict(row.values) for row in rows), key=lambda values: values[number])
    assert found == [{**record, status: "Started"} for record in records[:2]]
    finish(desk, claims[0])
    finish(desk, claims[1], Outcome.FAILED)
    finish(desk, next_attempt(desk, claims[1], "second"), Outcome.FAILED, run="second", final=True)
    assert Looks(desk).by_word() == {"Done": 1, "Failed": 1, "Pending": 1}
    (last,) = claim(desk)
    assert Claims(desk, "producer", 0).give_back() == [last.rq_id]
    assert insert_rows(desk.engine, desk.rows, [{key: "k", number: 9, "%s": "x"}], lambda count: None) == 1
    facts = source_facts(desk.engine, desk.ledger, desk.source.name)
    assert facts is not None
    worker = source_desk(desk.engine, desk.ledger, desk.source.name, facts)
    assert len(start(worker, *claim(desk), columns=["%s"])) == 2
    assert give_all_back(desk.engine, desk.ledger)[0] == 2, table
    ddl = desk.dialect.index_ddl(desk.rows.table, desk.rows.status, "Pending", desk.rows.keys)
    with desk.engine.begin() as connection:
        connection.execute(text(ddl.replace(":", "\\:")))
    assert len(inspect(place.engine).get_indexes(table)) == 1


def test_a_key_named_by_hand_may_have_any_name(place: Place) -> None:
    place.run(
        "CREATE TABLE jobs (id integer, state varchar(20), "
        + ("`Key %` " if place.name == "mariadb" else '"Key %" ')
        + "varchar(20) UNIQUE)"
    )
    place.run("INSERT INTO jobs VALUES (1, 'Pending', 'x')")
    assert [one.key for one in claim(place.desk(primary_key="Key %"))] == [("x",)]


def test_a_key_that_is_another_name_for_the_same_row_is_refused(place: Place) -> None:
    place.run(
        "CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(20) UNIQUE, f double precision)"
    )
    with pytest.raises(UnusableKey, match=r"the table has a primary key, id\. Use that"):
        place.desk(primary_key="name")
    place.run("CREATE TABLE floats (f double precision, state varchar(20))")
    with pytest.raises(UnusableKey, match="floating-point"):
        place.desk(table="floats", primary_key="f")


def test_a_key_that_doesnt_tell_rows_apart_claims_nothing(place: Place) -> None:
    place.run("CREATE TABLE jobs (name varchar(20), state varchar(20))")
    place.run("INSERT INTO jobs VALUES ('x', 'Pending'), ('x', 'Done')")
    with pytest.raises(KeysDontMatch, match="of 1 it took 2"):
        claim(place.desk(primary_key="name"))
    place.run("UPDATE jobs SET name = NULL")
    with pytest.raises(KeysDontMatch, match="of 1 it took 0"):
        claim(place.desk(primary_key="name"))
    assert sorted(row[0] for row in place.run("SELECT state FROM jobs")) == ["Done", "Pending"]


# Schemas


@pytest.fixture
def elsewhere(place: Place, request: pytest.FixtureRequest) -> Iterator[str]:
    """Another schema of the same database server."""
    name = 'Else "where"' if place.name == "postgresql" else "else_" + str(place.engine.url.database)
    quoted = place.engine.dialect.identifier_preparer.quote_identifier(name)
    place.run(f"CREATE SCHEMA {quoted}")
    yield name
    if place.name == "mariadb":  # there it is a database of its own
        server: DatabaseServer = request.getfixturevalue("mariadb_server")
        server.sql(f"DROP DATABASE {quoted}")


def odd_table(place: Place, schema: str | None, name: str = "Mixed Case") -> Table:
    made = Table(name, MetaData(), Column("id", Integer, primary_key=True), Column("state", String(20)), schema=schema)
    made.create(place.engine)
    with place.engine.begin() as connection:
        connection.execute(insert(made), [{"id": number, "state": "Pending"} for number in (1, 2, 3)])
    return made


@only("postgresql", "mariadb")
def test_a_table_of_another_schema(place: Place, elsewhere: str) -> None:
    made = odd_table(place, elsewhere)
    desk = place.desk(table=f"{elsewhere}.Mixed Case")
    assert desk.rows.name == f"{elsewhere}.Mixed Case"
    claims = claim(desk, 2)
    assert len(start(desk, *claims, columns=["id"])) == 2
    finish(desk, claims[0])
    assert Looks(desk).by_word() == {"Done": 1, "Started": 1, "Pending": 1}
    facts = source_facts(desk.engine, desk.ledger, desk.source.name)
    assert facts is not None
    assert source_desk(desk.engine, desk.ledger, desk.source.name, facts).rows.name == desk.rows.name
    assert give_all_back(desk.engine, desk.ledger)[0] == 1
    ddl = desk.dialect.index_ddl(desk.rows.table, desk.rows.status, "Pending", desk.rows.keys)
    place.run(ddl)
    assert len(inspect(place.engine).get_indexes("Mixed Case", schema=elsewhere)) == 1
    assert made.schema == elsewhere


@only("postgresql", "mariadb")
def test_tables_of_one_name_in_two_schemas_are_two(place: Place, elsewhere: str) -> None:
    odd_table(place, None, "jobs")
    odd_table(place, elsewhere, "jobs")
    one, other = place.desk(), place.desk(table=f"{elsewhere}.jobs")
    assert one.source.name != other.source.name
    assert len(claim(one)) == 3
    assert ready(other) == 3
    assert len(claim(other)) == 3


def test_two_spellings_of_one_table_are_one(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    default = inspect(place.engine).default_schema_name
    one, other = place.desk(), place.desk(table=f"{default}.jobs", where="1 = 1")
    assert one.rows.name == other.rows.name == f"{default}.jobs"
    assert place.desk(table=f"{default}.jobs").source.name == one.source.name != other.source.name
    claims = claim(one, 2)
    start(one, *claims)
    place.run("UPDATE jobs SET state = 'Pending'")
    assert [found.key for found in claim(other)] == [(3,)]


@only("postgresql", "mariadb")
def test_our_tables_may_stand_in_another_schema(place: Place, elsewhere: str) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk(ledger_schema=elsewhere)
    assert inspect(place.engine).get_table_names() == ["jobs"]
    assert len(inspect(place.engine).get_table_names(schema=elsewhere)) == 3
    (one, _) = claim(desk)
    start(desk, one)
    assert finish(desk, one, Outcome.FAILED) == [Fate(State.RETRYING, 1, 0.0)]
    assert finish(desk, next_attempt(desk, one, "second"), run="second") == [Fate(State.DONE, 1)]
    assert place.desk(ledger_schema=elsewhere).source.name == desk.source.name
    assert give_all_back(desk.engine, desk.ledger)[0] == 1
    ledger.drop(desk.engine, desk.ledger)
    assert inspect(place.engine).get_table_names(schema=elsewhere) == []


@only("postgresql", "mariadb")
def test_a_schema_for_our_tables_that_is_not_there(place: Place) -> None:
    place.jobs("Pending")
    with pytest.raises(DatabaseRefused, match=r"refused to create our tables nih_sched_\*: .*nowhere") as caught:
        place.desk(ledger_schema="nowhere")
    assert "`scheduler init --print-sql`" in str(caught.value)
    assert "\n" not in str(caught.value)


# Sources


def test_two_sources_on_one_table_never_both_run_a_row(place: Place) -> None:
    place.jobs("new", "redo", "new")
    one, other = place.desk(ready_val="new"), place.desk(ready_val="redo")
    assert one.source.name != other.source.name
    first = claim(one)
    assert [found.key[0] for found in first] == [1, 3]
    assert [found.key[0] for found in claim(other)] == [2]
    # While it runs for one, its owner makes it the other's.
    start(one, first[0])
    place.set(1, "redo")
    assert claim(other) == []
    finish(one, first[0])
    (again,) = claim(other)
    assert again.key == (1,)
    # It waits for one, its owner makes it the other's.
    place.set(3, "redo")
    (third,) = claim(other)
    assert start(one, first[1], run="late") == []
    assert len(start(other, again, third, run="now")) == 2
    assert place.states() == {1: "Started", 2: "Queued", 3: "Started"}


def test_one_sources_words_may_be_anothers_ready_word(place: Place) -> None:
    place.jobs("Pending", "Pending")
    first = place.desk(done_val="checked")
    second = place.desk(ready_val="checked")
    thief = place.desk(ready_val="Queued", queued_val="Stolen")
    (one, two) = claim(first)
    start(first, one)
    finish(first, one)
    assert [found.key for found in claim(second)] == [(1,)]
    (stolen,) = [found for found in claim(thief) if found.key == (2,)]
    assert start(first, two) == []  # the thief's claim is the open one
    assert len(start(thief, stolen)) == 1
    assert place.states()[2] == "Started"


def test_sources_are_told_apart_by_all_that_chooses_their_rows(place: Place) -> None:
    place.jobs()
    place.run("CREATE TABLE mails (id integer PRIMARY KEY, state varchar(20), other varchar(20))")
    wheres = [None, "id > 1", "id > 2"]
    desks = [
        *[place.desk(where=where) for where in wheres],
        place.desk(ready_val="new"),
        place.desk(table="mails"),
        place.desk(table="mails", status_key="other"),
    ]
    names = [desk.source.name for desk in desks]
    assert len(set(names)) == len(names)
    assert place.desk(tries=9, delay=9.0, done_val="x").source.name == names[0]
    allowed = set(string.ascii_letters + string.digits + "_-")
    assert all(set(name) <= allowed and len(name) <= 80 for name in names)
    assert names[0].startswith("jobs-Pending-")


def test_two_ledgers_sources_have_two_names(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    assert place.desk().source.name == desk.source.name
    ledger.drop(desk.engine, desk.ledger)
    assert place.desk().source.name != desk.source.name


def test_what_a_producer_wrote_down_is_what_a_worker_reads(place: Place) -> None:
    place.jobs("new")
    desk = place.desk(
        ready_val="new", done_val="fertig ✓", delay=0.25, backoff=3.0, max_delay=9.0, jitter=0.5, timeout=7.5
    )
    facts = source_facts(desk.engine, desk.ledger, desk.source.name)
    assert facts is not None
    assert source_desk(desk.engine, desk.ledger, desk.source.name, facts).source == desk.source
    assert source_facts(desk.engine, desk.ledger, "nothing") is None
    # Its producer comes back with other words.
    place.desk(ready_val="new", done_val="over")
    facts = source_facts(desk.engine, desk.ledger, desk.source.name)
    assert facts is not None
    worker = source_desk(desk.engine, desk.ledger, desk.source.name, facts)
    assert run_once(worker) == Fate(State.DONE, 0)
    assert place.states() == {1: "over"}
    place.run("DROP TABLE jobs")
    with pytest.raises(BadLedger, match=f"Source {desk.source.name}: There is no table "):
        source_desk(desk.engine, desk.ledger, desk.source.name, facts)


# The ledger's own tables


def _ensure(url: str, barrier: Any, answers: Any) -> None:
    engine = connect(url)
    own = ledger.tables()
    barrier.wait(60)
    try:
        answers.put((ledger.ensure(engine, own), ledger.identity(engine, own, "ledger_id")))
    except NihError as error:
        answers.put((str(error), ""))


def test_eight_processes_make_our_tables_at_once(place: Place) -> None:
    place.engine.dispose()
    processes = multiprocessing.get_context("fork")
    barrier, answers = processes.Barrier(8), processes.Queue()
    children = [processes.Process(target=_ensure, args=(place.url, barrier, answers), daemon=True) for _ in range(8)]
    for child in children:
        child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(30)
    assert all(made in (True, False) for made, _ in found), found
    assert any(made for made, _ in found)
    assert len({identity for _, identity in found}) == 1
    assert len(place.run("SELECT name FROM nih_sched_meta")) == 2
    assert fenced(place)
    indexes = inspect(place.engine).get_indexes("nih_sched_attempts")
    assert {"nih_sched_attempts_due", "nih_sched_attempts_claim"} <= {one["name"] for one in indexes}


def fenced(place: Place) -> bool:
    """Whether open_key is unique, by constraint or by index."""
    found = inspect(place.engine)
    unique = [*found.get_unique_constraints("nih_sched_attempts"), *found.get_indexes("nih_sched_attempts")]
    return any(one["column_names"] == ["open_key"] and one.get("unique", True) for one in unique)


def test_ensure_says_whether_it_made_anything(place: Place) -> None:
    engine = connect(place.url)
    own = ledger.tables()
    assert not ledger.exists(engine, own)
    assert ledger.ensure(engine, own) is True
    identity = ledger.identity(engine, own, "ledger_id")
    assert ledger.ensure(engine, own) is False
    assert ledger.identity(engine, own, "ledger_id") == identity
    assert ledger.identity(engine, own, "schema_version") == str(ledger.SCHEMA_VERSION)
    ledger.drop(engine, own)
    assert ledger.ensure(engine, own) is True
    assert ledger.identity(engine, own, "ledger_id") != identity
    engine.dispose()


def test_a_half_made_ledger_is_never_without_its_fence(place: Place) -> None:
    # Killed between two statements, where DDL isn't part of a transaction.
    engine = connect(place.url)
    own = ledger.tables()
    (first,) = [sql for sql in ledger.ddl(engine, own) if sql.startswith("CREATE TABLE nih_sched_attempts")]
    place.run(first)
    assert ledger.ensure(engine, own) is True
    assert fenced(place)
    engine.dispose()


def test_a_newer_schema_is_refused_and_an_older_minor_one_is_not(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    place.run("UPDATE nih_sched_meta SET value = '2' WHERE name = 'schema_version'")
    with pytest.raises(NewerLedger, match=r"have schema version 2; this nih-sched knows up to 1\. Upgrade") as caught:
        place.desk()
    assert caught.value.exit_code == 2
    with pytest.raises(NewerLedger):
        ledger.ensure(desk.engine, desk.ledger)
    assert place.states() == {1: "Pending"}
    place.run("UPDATE nih_sched_meta SET value = '1' WHERE name = 'schema_version'")
    assert len(claim(place.desk())) == 1


def test_columns_that_a_newer_version_adds_harm_nobody(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    place.run("ALTER TABLE nih_sched_attempts ADD COLUMN newer varchar(20) DEFAULT 'x'")
    assert run_once(desk, Outcome.FAILED) == Fate(State.RETRYING, 1, 0.0)
    assert place.attempts("newer") == [("x",), ("x",)]


def test_a_ledger_without_identity_is_refused_clearly(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    place.run("DELETE FROM nih_sched_meta WHERE name = 'ledger_id'")
    with pytest.raises(BadLedger, match="has no ledger_id: drop it and init anew"):
        ledger.identity(desk.engine, desk.ledger, "ledger_id")


def shape(place: Place) -> Any:
    found = inspect(place.engine)
    tables = ("nih_sched_attempts", "nih_sched_meta", "nih_sched_sources")
    columns = {t: [(c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(t)] for t in tables}
    indexes = {t: sorted((i["name"], i["column_names"], i["unique"]) for i in found.get_indexes(t)) for t in tables}
    return columns, indexes, {t: found.get_pk_constraint(t)["constrained_columns"] for t in tables}


def test_the_ddl_that_we_print_makes_the_same_tables(place: Place) -> None:
    engine = connect(place.url)
    own = ledger.tables()
    statements = ledger.ddl(engine, own)
    for statement in statements:
        place.run(statement)
    assert ledger.ensure(engine, own) is False
    printed = shape(place)
    ledger.drop(engine, own)
    ledger.ensure(engine, own)
    assert shape(place) == printed
    assert fenced(place)
    place.jobs("Pending")
    assert run_once(place.desk()) == Fate(State.DONE, 0)
    engine.dispose()


def test_reading_without_our_tables_makes_none(place: Place) -> None:
    place.jobs("Pending", "Done")
    desk = open_desk(Settings(database_url=place.url), create_ledger=False)
    assert ready(desk) == 1
    assert Looks(desk).by_word() == {"Pending": 1, "Done": 1}
    desk.close()
    assert inspect(place.engine).get_table_names() == ["jobs"]


# The index


def plan(desk: Desk, limit: int = 10) -> str:
    query = Claims(desk, "", 0).select_ready(limit)
    sql = str(query.compile(desk.engine, compile_kwargs={"literal_binds": True})).replace("%%", "%")
    return desk.read(lambda connection: desk.dialect.plan(connection, sql))


@pytest.mark.parametrize("kind", ["varchar(20)", "integer"])
def test_the_recommended_index_is_used(place: Place, kind: str) -> None:
    place.run(f"CREATE TABLE jobs (id integer PRIMARY KEY, state {kind}, name varchar(100))")
    codes = {"ready_val": "0", "started_val": "1", "done_val": "2", "failed_val": "3"} if kind == "integer" else {}
    desk = place.desk(**codes)
    done = desk.rows.words[State.DONE]
    records = ({"id": n, "state": desk.rows.words[State.READY] if n % 2000 == 0 else done} for n in range(20_000))
    insert_rows(desk.engine, desk.rows, records, lambda count: None)
    ddl = desk.dialect.index_ddl(desk.rows.table, desk.rows.status, desk.rows.words[State.READY], desk.rows.keys)
    assert "nih_sched_jobs_ready" not in plan(desk)
    place.run(ddl)
    place.run("ANALYZE TABLE jobs" if place.name == "mariadb" else "ANALYZE")
    ready(desk)  # SQLite explains with the schema that it has read last
    assert "nih_sched_jobs_ready" in plan(desk)
    seen: list[str] = []
    event.listen(desk.engine, "before_cursor_execute", lambda c, cursor, sql, values, *rest: seen.append(sql))
    assert len(claim(desk, 5)) == 5
    # The statement that really runs has the ready word in its text: no database uses a partial index for a parameter.
    word = repr(desk.rows.words[State.READY])
    assert any(f"= {word}" in sql and "FROM jobs" in sql for sql in seen)


@only("postgresql", "sqlite")
def test_the_index_holds_ready_rows_alone(place: Place) -> None:
    place.jobs()
    desk = place.desk(ready_val="it's 100% :x")
    ddl = desk.dialect.index_ddl(desk.rows.table, desk.rows.status, "it's 100% :x", desk.rows.keys)
    assert ddl == ("CREATE INDEX nih_sched_jobs_ready ON jobs (id) WHERE state = 'it''s 100% :x'")


def test_get_jobs_reads_what_the_store_wrote(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    run_once(desk)
    with Session(place.engine) as session:
        assert [row["id"] for row in get_jobs(session, "state", "Done", ["id"])] == [1]


# Transactions


@only("postgresql", "mariadb")
def test_a_transaction_whose_connection_is_lost_begins_anew(
    place: Place, events: list[tuple[str, dict[str, Any]]]
) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    events.clear()
    turns = 0

    def work(connection: Any) -> int:
        nonlocal turns
        turns += 1
        connection.execute(text("UPDATE jobs SET name = 'ours' WHERE id = 1"))
        if turns < 3:
            mine = "pg_backend_pid()" if place.name == "postgresql" else "connection_id()"
            number = connection.scalar(text(f"SELECT {mine}"))
            place.run(f"SELECT pg_terminate_backend({number})" if place.name == "postgresql" else f"KILL {number}")
        connection.execute(text("UPDATE jobs SET name = 'ours' WHERE id = 2"))
        return turns

    assert desk.transact(work) == 3
    assert place.run("SELECT name FROM jobs") == [("ours",), ("ours",)]


@only("postgresql", "mariadb")
def test_a_deadlock_is_nobodys_failure(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desks = [place.desk(), place.desk()]
    barrier = threading.Barrier(2)
    done: list[int] = []

    def work(desk: Desk, order: tuple[int, int]) -> None:
        met = False

        def turn(connection: Any) -> None:
            nonlocal met
            for number in order:
                connection.execute(text(f"UPDATE jobs SET name = 'x' WHERE id = {number}"))
                if not met:
                    met = True
                    barrier.wait(30)
            done.append(order[0])

        desk.transact(turn)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(desks, [(1, 2), (2, 1)], strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == [1, 2]


def test_an_error_that_will_not_pass_is_let_through_at_once(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    turns = []

    def work(connection: Any) -> None:
        turns.append(1)
        connection.execute(text("UPDATE jobs SET nothing = 1"))

    began = time.monotonic()
    with pytest.raises(DBAPIError) as caught:
        desk.transact(work)
    assert not desk.dialect.is_transient(caught.value)
    assert len(turns) == 1
    assert time.monotonic() - began < 2


def test_a_busy_database_is_waited_for_and_said_to_be(
    place: Place, events: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs("Pending")
    desk = place.desk()
    events.clear()
    monkeypatch.setattr("nih_sched.store.desk.LOUD_AFTER", 0.03)
    turns = []

    def work(connection: Any) -> str:
        turns.append(1)
        if len(turns) < 6:
            error: Any = {
                "sqlite": lambda: type("Busy", (Exception,), {"sqlite_errorcode": 5})("database is locked"),
                "postgresql": lambda: type("Locked", (Exception,), {"sqlstate": "55P03"})("lock timeout"),
                "mariadb": lambda: Exception(1205, "Lock wait timeout exceeded"),
            }[place.name]()
            raise OperationalError("UPDATE", {}, error)
        return "at last"

    assert desk.transact(work) == "at last"
    assert [event for event, _ in events] == ["database_lost", "database_back"]
    turns.clear()
    with pytest.raises(OperationalError):
        desk.transact(work, patience=0.02)
    assert 1 < len(turns) < 6
