"""Statements straight on the driver, and rows that one statement claims or begins."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    Uuid,
    bindparam,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from conformance.places import Place, claim, finish, only, rq_ids, start, take
from nih_sched.dialects import quick
from nih_sched.errors import KeysDontMatch
from nih_sched.model import Outcome, open_keys_of
from nih_sched.store import Claims, Desk
from nih_sched.store.records import LeaseLost


@contextmanager
def statements(desk: Desk) -> Iterator[list[str]]:
    """What is said to the database meanwhile."""
    said: list[str] = []

    def note(connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        said.append(sql)

    event.listen(desk.engine, "before_cursor_execute", note)
    yield said
    event.remove(desk.engine, "before_cursor_execute", note)


THINGS = Table(
    "things", MetaData(), Column("id", Integer, primary_key=True), Column("code", Uuid()), Column("name", String(20))
)
CODES = [uuid.UUID(int=number) for number in range(4)]


@pytest.fixture
def things(place: Place) -> Iterator[Connection]:
    """A connection of ours in a transaction, on a table with values that SQLAlchemy translates."""
    place.jobs()
    desk = place.desk()
    with desk.engine.begin() as connection:
        THINGS.create(connection)
        rows = [{"id": i, "code": code, "name": f"n{i}"} for i, code in enumerate(CODES, 1)]
        connection.execute(insert(THINGS), rows)
    with desk.engine.connect() as connection:
        connection.begin()
        yield connection
        connection.rollback()


def test_a_statement_gives_the_same_whoever_runs_it(things: Connection) -> None:
    query = select(THINGS.c.code, THINGS.c.id).where(THINGS.c.code.in_(bindparam("codes", expanding=True)))
    query = query.where(THINGS.c.name != "n3").order_by(THINGS.c.id)
    for some in (CODES[:1], CODES[1:], CODES[:1], [], CODES, CODES * 10):
        ran = quick.run(things, query, {"codes": some})
        assert list(map(tuple, ran.rows)) == list(map(tuple, things.execute(query, {"codes": some}).all()))
    change = THINGS.update().where(THINGS.c.id >= bindparam("least")).values(name=bindparam("new"))
    assert quick.run(things, change, {"least": 3, "new": "x"}) == ((), 2)
    assert quick.run(things, change, {"least": 9, "new": "x"}) == ((), 0)


def test_what_the_database_refuses_is_raised_as_ever(things: Connection) -> None:
    statement = insert(THINGS).values(id=bindparam("its_id"), name=bindparam("secret"))
    with pytest.raises(IntegrityError) as caught:
        quick.run(things, statement, {"its_id": 1, "secret": "hush"})
    assert "things" in str(caught.value.statement)
    assert "hush" not in str(caught.value)
    assert not caught.value.connection_invalidated


@only("mariadb")
def test_a_server_that_keeps_no_statements_reads_them_each_time(things: Connection, place: Place) -> None:
    query = select(THINGS.c.id).where(THINGS.c.id == bindparam("its_id"))
    ((most,),) = place.run("SELECT @@max_prepared_stmt_count")
    place.run("SET GLOBAL max_prepared_stmt_count = 0")
    try:
        for its_id in (1, 2):
            assert list(map(tuple, quick.run(things, query, {"its_id": its_id}).rows)) == [(its_id,)]
    finally:
        place.run(f"SET GLOBAL max_prepared_stmt_count = {most}")
    with pytest.raises(DBAPIError, match="nowhere") as caught:
        quick.run(things, text("SELECT nowhere FROM things WHERE id = :its_id"), {"its_id": 1})
    assert str(caught.value.statement).startswith("SELECT nowhere")


@only("mariadb")
def test_some_statements_are_read_once(things: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "PREPARED", 1)
    named = select(THINGS.c.id).where(THINGS.c.name.like("%2"), THINGS.c.id > bindparam("least"))
    all_of_them, third = select(THINGS.c.id), select(THINGS.c.id).where(THINGS.c.id == 3)

    def prepared() -> int:
        found = things.exec_driver_sql("SHOW SESSION STATUS LIKE 'Com_prepare_sql'").all()
        return int(found[0][1])

    for least, found in ((0, [2]), (1, [2]), (2, [])):
        assert [row[0] for row in quick.run(things, named, {"least": least}).rows] == found
    assert prepared() == 1
    assert len(quick.run(things, all_of_them, {}).rows) == 4  # one too many to be kept
    assert prepared() == 1
    things.commit()
    things.exec_driver_sql("ALTER TABLE things ADD COLUMN more int FIRST")
    assert [row[0] for row in quick.run(things, named, {"least": 0}).rows] == [2]
    things.invalidate()
    things.rollback()
    assert [row[0] for row in quick.run(things, third, {}).rows] == [3]  # kept by the new connection
    assert prepared() == 1
    assert [row[0] for row in quick.run(things, named, {"least": 0}).rows] == [2]


@only("postgresql", "mariadb")
def test_a_connection_that_is_cut_in_a_statement_is_not_used_again(things: Connection) -> None:
    query = select(THINGS.c.id).where(THINGS.c.id == bindparam("its_id"))
    assert quick.run(things, query, {"its_id": 1}).rows
    driver: Any = things.connection.driver_connection
    sock = getattr(driver, "_sock", None)
    if sock is not None:
        sock.shutdown(2)
    else:
        driver.pgconn.finish()
    with pytest.raises(DBAPIError) as caught:
        quick.run(things, query, {"its_id": 1})
    assert caught.value.connection_invalidated
    assert things.invalidated


CLAIM = {"postgresql": ["WITH found"], "mariadb": ["INSERT INT", "UPDATE job"]}
START = {"postgresql": ["WITH fit A"], "mariadb": ["SELECT STR", "UPDATE nih"]}


def heads(said: list[str]) -> list[str]:
    """How each statement begins."""
    return [sql[:10].replace("\n", " ") for sql in said]


@only("postgresql", "mariadb")
def test_a_row_that_comes_alone_is_claimed_and_begun_by_few_statements(place: Place) -> None:
    place.run("CREATE TABLE jobs (id bigint PRIMARY KEY, state varchar(20), name text)")
    desk = place.desk()
    for key in (1, -7, 2**62):
        place.run("INSERT INTO jobs VALUES (:k, 'Pending', 'a name')", k=key)
        with statements(desk) as said:
            (one,) = claim(desk, 10, few=2)
        assert heads(said) == CLAIM[place.name]
        assert place.attempts("row_key", "open_key", "rq_id", "claimed_by", "tries")[-1] == (
            f"[{key}]",
            *open_keys_of(desk.rows.name, [f"[{key}]"]),
            one.rq_id,
            "producer",
            3,
        )
        assert place.states()[key] == "Queued"
        with statements(desk) as said:
            (row,) = start(desk, one, columns=["name", "state", "id"])
        assert heads(said) == START[place.name]
        assert row.values == {"name": "a name", "state": "Started", "id": key}
        finish(desk, row.claim)
    with statements(desk) as said:
        assert claim(desk, 10, few=2) == []
    assert len(said) == 1


@only("mariadb")
def test_what_others_lock_in_a_small_table_keeps_no_other_row_from_beginning(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    claims = claim(desk, 3)
    with place.engine.begin() as owner:
        owner.execute(text("UPDATE jobs SET name = 'held' WHERE id IN (1, 3)"))
        with statements(desk) as said:
            assert [row.claim.key for row in start(desk, claims[1])] == [(2,)]
        assert heads(said) == START["mariadb"]
    with desk.engine.begin() as ours:  # another worker's, in the middle of its start
        ours.execute(text("SELECT * FROM jobs JOIN nih_sched_attempts ON row_key = '[1]' WHERE jobs.id = 1 FOR UPDATE"))
        other = place.desk()
        with statements(other) as said:
            assert [row.claim.key for row in start(other, claims[2])] == [(3,)]
        assert heads(said) == START["mariadb"]


@only("mariadb")
def test_a_claim_that_needs_more_care_gets_it(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = claim(desk, 1)
    place.set(1, "Pending")  # its owner has set it back: the claim is void
    (again,) = claim(desk, 1)
    assert (again.key, again.id != one.id) == ((1,), True)
    start(desk, again)
    finish(desk, again, Outcome.INTERRUPTED)
    (third,) = claim(desk, 1)
    assert third.interruptions == 0
    (row,) = start(desk, third)
    assert row.claim.interruptions == 1  # it was kept in mind


@only("postgresql")
def test_after_more_than_a_few_they_are_claimed_together(place: Place) -> None:
    place.jobs(*["Pending"] * 9)
    desk = place.desk()
    claims = Claims(desk, "producer", 3)
    claims.finds_many = False
    assert len(claims.claim(6, rq_ids, 2)) == 6
    with statements(desk) as said:
        assert len(claims.claim(6, rq_ids, 2)) == 3
    assert not any(sql.startswith("WITH found") for sql in said)
    place.set(1, "Pending")
    claims.claim(1, rq_ids, 2)
    with statements(desk) as said:
        assert claims.claim(6, rq_ids, 2) == []
    assert [sql[:10] for sql in said] == ["WITH found"]


@only("postgresql")
def test_two_that_travel_together_begin_together_as_far_as_nothing_stands_against_it(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    claims = claim(desk, 3)
    place.set(2, "Cancelled")
    with place.engine.begin() as owner:
        owner.execute(text("UPDATE jobs SET name = 'held' WHERE id = 3"))
        assert [row.claim.key for row in start(desk, *claims)] == [(1,)]
    assert place.states() == {1: "Started", 2: "Cancelled", 3: "Queued"}
    assert [outcome for (outcome,) in place.attempts("outcome")] == [None, "cancelled", None]


@only("postgresql")
def test_a_lease_that_is_renewed_by_the_start_and_one_that_is_lost(place: Place) -> None:
    place.jobs(*["Pending"] * 2)
    desk = place.desk()
    take(desk, "kept", "lost")
    place.run("UPDATE nih_sched_leases SET died = 'gone' WHERE id = 'lost'")
    one, two = claim(desk, 2)
    with statements(desk) as said:
        start(desk, one, lease="kept")
    assert len(said) == 1
    assert place.run("SELECT beat, horse, horse_born FROM nih_sched_leases WHERE id = 'kept'") == [(1, 77, 88)]
    with pytest.raises(LeaseLost):
        start(desk, two, lease="lost")
    assert place.states() == {1: "Started", 2: "Queued"}


@only("postgresql", "mariadb")
def test_a_start_that_waits_in_the_owners_trigger_keeps_no_keeper_waiting(place: Place) -> None:
    place.jobs("Pending")
    place.run("CREATE TABLE totals (id integer PRIMARY KEY, n integer)")
    place.run("INSERT INTO totals VALUES (1, 0)")
    count = "UPDATE totals SET n = n + 1 WHERE id = 1"
    if place.name == "postgresql":
        place.run(f"CREATE FUNCTION tally() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {count}; RETURN NEW; END'")
        place.run("CREATE TRIGGER count BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION tally()")
    else:
        place.run(f"CREATE TRIGGER count BEFORE UPDATE ON jobs FOR EACH ROW {count}")
    desk = place.desk()
    leases = take(desk, "kept")
    (one,) = claim(desk)
    begun: list[Any] = []
    with place.engine.begin() as owner:
        owner.execute(text(count))
        starting = threading.Thread(target=lambda: begun.extend(start(desk, one, lease="kept")))
        starting.start()
        time.sleep(0.5)
        renewing = threading.Thread(target=lambda: leases.renew(["kept"], 60.0), daemon=True)
        renewing.start()
        renewing.join(5)
        assert not begun
        assert not renewing.is_alive()
    starting.join(20)
    assert [row.claim.key for row in begun] == [(1,)]


@only("postgresql")
def test_a_start_is_tried_no_longer_than_any_other_transaction(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs("Pending")
    desk = place.desk()
    one = claim(desk)[0]
    monkeypatch.setattr("nih_sched.store.swift.postgresql.PATIENCE", 0.2)
    tried: list[int] = []

    def cut(*_: Any) -> None:
        tried.append(1)
        if len(tried) > 100:
            pytest.fail("it is tried for ever")
        raise OperationalError("", None, Exception("cut"), connection_invalidated=True)

    monkeypatch.setattr(type(desk.dialect), "read", cut)
    with pytest.raises(OperationalError):
        start(desk, one)
    assert len(tried) > 1


@only("postgresql")
def test_a_table_that_lets_no_row_be_queued_without_a_word(place: Place) -> None:
    place.jobs("Pending")
    place.run("CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    place.run("CREATE TRIGGER no BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION no()")
    with pytest.raises(KeysDontMatch):
        claim(place.desk())


@only("postgresql")
def test_a_prepared_statement_survives_its_tables_change(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()

    def prepared() -> int:
        count = text("SELECT count(*) FROM pg_prepared_statements")
        with desk.dialect.reading(desk.engine) as connection:
            return int(connection.execute(count).scalar_one())

    for number in (1, 2):
        (one,) = claim(desk, 1)
        (row,) = start(desk, one, columns=["name"])
        assert row.values == {"name": f"n{number}"}
        assert prepared()
        place.run("ALTER TABLE jobs ALTER COLUMN name TYPE text")
        finish(desk, one)
    (one,) = claim(desk, 1)
    assert [row.values for row in start(desk, one, columns=["name"])] == [{"name": "n3"}]
