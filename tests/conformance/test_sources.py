"""Sources on one table or several, in one schema or several."""

from __future__ import annotations

import string
from collections.abc import Iterator

import pytest
from servers import DatabaseServer
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, inspect

from conformance.places import Place, claim, finish, next_attempt, only, ready, run_once, start
from nih_sched import ledger
from nih_sched.errors import BadLedger, DatabaseRefused
from nih_sched.model import Fate, Outcome, State
from nih_sched.store import Looks, source_desk, source_facts
from nih_sched.store.rows import give_all_back

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
    assert len(inspect(place.engine).get_table_names(schema=elsewhere)) == 5
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
