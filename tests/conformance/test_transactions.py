"""Transactions: what is tried again, and what is let through."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import servers
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from conformance.places import Events, Place, claim, only, start
from nih_sched.dialects import connect
from nih_sched.dialects.base import IDLE
from nih_sched.errors import UnreachableDatabase
from nih_sched.store import Desk


@only("postgresql", "mariadb")
def test_a_transaction_whose_connection_is_lost_begins_anew(place: Place, events: Events) -> None:
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
def test_a_connection_that_died_unused_is_no_outage(place: Place, events: Events) -> None:
    place.jobs("Pending")
    desk = place.desk()
    events.clear()
    mine = text("SELECT pg_backend_pid()" if place.name == "postgresql" else "SELECT connection_id()")
    for use in (desk.read, desk.transact):
        number = desk.read(lambda connection: connection.scalar(mine))
        place.run(f"SELECT pg_terminate_backend({number})" if place.name == "postgresql" else f"KILL {number}")
        assert use(lambda connection: connection.scalar(mine)) != number
    assert events == []


@only("postgresql", "mariadb")
def test_a_database_that_goes_while_a_table_is_opened_is_out_of_reach_not_refusing(place: Place) -> None:
    place.jobs("Pending")
    place.desk().close()  # our tables are there
    for last in range(1, 100):
        count, cut = 0, False

        def lose(connection: Any, *_: Any, last: int = last) -> None:
            nonlocal count, cut
            count += 1
            if count == last:
                driver = connection.connection.driver_connection
                cut = True
                if place.name == "postgresql":
                    place.run(f"SELECT pg_terminate_backend({driver.info.backend_pid}, 5000)")
                else:
                    place.run(f"KILL {driver.thread_id()}")

        event.listen(Engine, "before_cursor_execute", lose)
        try:
            place.desk().close()
        except UnreachableDatabase:
            assert cut
        finally:
            event.remove(Engine, "before_cursor_execute", lose)
        if not cut:
            break
    assert 5 < last < 99


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
    assert time.monotonic() - began < 20


def test_a_busy_database_is_waited_for_and_said_to_be(
    place: Place, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs("Pending")
    desk = place.desk()
    events.clear()
    monkeypatch.setattr("nih_sched.store.desk.LOUD_AFTER", 0.03)
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    # No time passes but by waiting: a slow machine has as many turns.
    monkeypatch.setattr("nih_sched.store.desk.time.sleep", sleep)
    monkeypatch.setattr("nih_sched.store.desk.clock.monotonic", lambda: now)
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
        desk.transact(work, patience=0.1)
    assert 1 < len(turns) < 6


@only("sqlite")
def test_who_may_not_wait_for_long_gives_up_on_a_file_that_another_writes_to(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    held, over = threading.Event(), threading.Event()

    def hold(connection: Any) -> None:
        held.set()
        over.wait(20)

    holder = threading.Thread(target=lambda: desk.transact(hold))
    holder.start()
    assert held.wait(10)
    with pytest.raises(OperationalError, match="locked"):
        desk.transact(lambda connection: connection.execute(text("SELECT 1")), patience=0.5)
    assert holder.is_alive()  # it gave up before that, as it may
    over.set()
    holder.join()
    assert desk.transact(lambda connection: connection.scalar(text("SELECT 1")), patience=0.5) == 1


@only("mariadb")
def test_tls_on_the_loopback_is_for_those_who_ask(place: Place) -> None:
    connect(place.url).dispose()
    with pytest.raises(UnreachableDatabase, match="SSL"):  # the server has none
        connect(f"{place.url}&ssl_check_hostname=false")


@only("postgresql", "mariadb")
def test_a_frozen_transaction_keeps_its_locks_for_some_seconds_only(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    turns = 0
    locked = threading.Event()

    def work(connection: Any) -> int:
        nonlocal turns
        turns += 1
        connection.execute(text("UPDATE jobs SET name = 'ours' WHERE id = 1"))
        if turns == 1:
            locked.set()
            time.sleep(IDLE + 3)
        connection.execute(text("UPDATE jobs SET name = 'ours again' WHERE id = 1"))
        return turns

    ended: list[int] = []
    frozen = threading.Thread(target=lambda: ended.append(desk.transact(work)))
    frozen.start()
    assert locked.wait(10)
    place.run("UPDATE jobs SET name = 'theirs' WHERE id = 1")
    assert ended == []
    assert place.run("SELECT name FROM jobs") == [("theirs",)]
    frozen.join()
    assert ended == [2]
    assert place.run("SELECT name FROM jobs") == [("ours again",)]


class LazyPostgreSQL(servers.PostgreSQL):
    """Writes what needn't be on the disk at once 10 seconds later, so that a crash surely loses it."""

    def command(self) -> list[str]:
        """The last word of a setting counts."""
        return [*super().command(), "-c", "wal_writer_delay=10000"]


@pytest.mark.postgresql
def test_a_claim_that_a_crash_undid_is_as_if_it_had_never_been_and_a_start_makes_it_last() -> None:
    server = LazyPostgreSQL().start()
    try:
        with server.fresh() as database:
            place = Place(database)
            place.jobs("Pending", "Pending")
            desk = place.desk()
            for last in (False, True):
                (one, two) = claim(desk)
                if last:
                    start(desk, two)
                desk.close()
                place.engine.dispose()
                server.kill()
                server.revive()
                if not last:
                    assert place.states() == {1: "Pending", 2: "Pending"}
                    assert place.attempts("id") == []
                    assert start(desk, one, two) == []  # their job comes late: it carries nothing
            assert place.states() == {1: "Queued", 2: "Started"}
            assert place.attempts("id") == [(one.id,), (two.id,)]
            assert [row.claim.key for row in start(desk, one)] == [(1,)]
            place.close()
    finally:
        server.kill()
