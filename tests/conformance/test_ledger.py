"""Our own tables: their making, their version, their leaving."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
from sqlalchemy import Engine, event, inspect, select

from conformance.places import Place, claim, fenced, finish, ready, run_once, shape, start
from nih_sched import ledger
from nih_sched.dialects import connect
from nih_sched.errors import BadLedger, NewerLedger, NihError
from nih_sched.model import Fate, Outcome, State, encode_key
from nih_sched.settings import Settings
from nih_sched.store import Looks, open_desk
from nih_sched.store.rows import give_all_back


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
    indexes = {one["name"] for one in inspect(place.engine).get_indexes("nih_sched_attempts")}
    assert {f"nih_sched_attempts_{name}" for name in ("due", "claim", "kept")} <= indexes


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


def test_who_finds_our_tables_made_reads_their_version_once(place: Place) -> None:
    place.jobs("Pending")
    settings = Settings(database_url=place.url)
    open_desk(settings).close()
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        open_desk(settings).close()
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert sum("nih_sched_meta" in one for one in seen) == 1, seen


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
    known = ledger.SCHEMA_VERSION
    place.run("UPDATE nih_sched_meta SET value = :v WHERE name = 'schema_version'", v=str(known + 2))
    said = rf"have schema version {known + 2}; this nih-sched has {known}\. Upgrade nih-sched\."
    with pytest.raises(NewerLedger, match=said) as caught:
        place.desk()
    assert caught.value.exit_code == 2
    with pytest.raises(NewerLedger):
        ledger.ensure(desk.engine, desk.ledger)
    assert place.states() == {1: "Pending"}
    # The next version runs beside this one.
    place.run("UPDATE nih_sched_meta SET value = :v WHERE name = 'schema_version'", v=str(known + 1))
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


# Uninstalling


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


def test_a_key_longer_than_an_index_takes_is_claimed_and_found(place: Place) -> None:
    # As JSON it has six characters for each of these: PostgreSQL refuses such an entry.
    keys = ["".join(chr(0x4E00 + n * step % 20000) for n in range(650)) for step in (7, 11)]
    place.run("CREATE TABLE jobs (id varchar(700) PRIMARY KEY, state varchar(20))")
    for key in keys:
        place.run(f"INSERT INTO jobs VALUES ('{key}', 'Pending')")
    desk = place.desk()
    claims = claim(desk)
    assert sorted(one.key[0] for one in claims) == sorted(keys)
    attempts = desk.ledger.attempts
    for one in claims:
        query = select(attempts.c.id).where(ledger.of_row(attempts, encode_key(one.key)))
        assert desk.read(lambda c, query=query: c.execute(query).scalars().all()) == [one.id]
