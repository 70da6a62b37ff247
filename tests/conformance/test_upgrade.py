"""A ledger of version 1 becomes one of this version while schedulers of both versions run; a newer one is let be."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import DatabaseServer, eventually
from sqlalchemy import create_engine, event, insert, inspect, make_url, select, text, update
from sqlalchemy.exc import DBAPIError

from conformance.places import Place, all_due, apart, claim, fenced, finish, next_attempt, only, run_once, shape, start
from nih_sched import ledger
from nih_sched.dialects import After, Now, connect, dialect_of
from nih_sched.errors import DatabaseRefused, NewerLedger, NihError, OlderLedger
from nih_sched.model import Fate, Outcome, State, open_key
from nih_sched.settings import Settings
from nih_sched.store import Desk, Looks, Retries, open_desk, source_desk, source_facts
from nih_sched.store.running import orphaned, running

# What version 1 made, as it made it.
ATTEMPTS_V1 = """
CREATE TABLE {schema}nih_sched_attempts (
    id {id},
    of_claim BIGINT,
    source VARCHAR(190) NOT NULL,
    row_key {long} NOT NULL,
    open_key VARCHAR(40),
    attempt INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    tries SMALLINT NOT NULL,
    rq_id VARCHAR(64),
    claimed_by VARCHAR(190),
    claimed_at {instant} NOT NULL,
    sent_at {instant},
    due_at {instant},
    started_at {instant},
    run VARCHAR(32),
    worker VARCHAR(190),
    finished_at {instant},
    outcome VARCHAR(16),
    seconds FLOAT,
    reason {long},
    traceback {long},
    result {long},
    CONSTRAINT nih_sched_attempts_open UNIQUE (open_key)
){engine}
"""
OTHERS_V1 = [
    "CREATE INDEX nih_sched_attempts_claim ON {schema}nih_sched_attempts (of_claim){of_claim}",
    "CREATE INDEX nih_sched_attempts_due ON {schema}nih_sched_attempts (due_at){due_at}",
    "CREATE TABLE {schema}nih_sched_meta "
    "(name VARCHAR(190) NOT NULL, value VARCHAR(190) NOT NULL, PRIMARY KEY (name)){engine}",
    "CREATE TABLE {schema}nih_sched_sources "
    "(name VARCHAR(190) NOT NULL, facts {long} NOT NULL, updated_at {instant} NOT NULL, PRIMARY KEY (name)){engine}",
    "INSERT INTO {schema}nih_sched_meta (name, value) VALUES ('schema_version', '1')",
    "INSERT INTO {schema}nih_sched_meta (name, value) VALUES ('ledger_id', 'abcd1234')",
]
TYPES = {
    "sqlite": {"id": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "instant": "DATETIME", "long": "TEXT"},
    "postgresql": {"id": "BIGSERIAL PRIMARY KEY", "instant": "TIMESTAMP WITH TIME ZONE", "long": "TEXT"},
    "mariadb": {"id": "BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY", "instant": "DATETIME(6)", "long": "MEDIUMTEXT"},
}
ENGINE = "ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_bin"
COLUMNS_V1 = (
    "id, of_claim, source, row_key, open_key, attempt, failures, tries, rq_id, claimed_by, claimed_at, sent_at, "
    "due_at, started_at, run, worker, finished_at, outcome, seconds, reason, traceback, result"
)


def make_v1(place: Place, schema: str = "") -> None:
    """The tables of version 1, empty; `schema` with a dot behind it."""
    partial = place.name != "mariadb"
    words = {
        **TYPES[place.name],
        "engine": "" if partial else ENGINE,
        "of_claim": " WHERE of_claim IS NOT NULL" if partial else "",
        "due_at": " WHERE due_at IS NOT NULL" if partial else "",
        "schema": schema,
    }
    for statement in (ATTEMPTS_V1, *OTHERS_V1):
        place.run(statement.format_map(words))


class Old:
    """What a scheduler of version 1 writes: its own columns only, each statement as it was there."""

    def __init__(self, url: str, source: str, table: str) -> None:
        self.engine = connect(url)
        self.source, self.table = source, table
        self.attempts = ledger.tables().attempts

    def transact(self, *statements: Any) -> list[Any]:
        """Run these in one transaction, as often as version 1 would have; return their results."""
        deadline = time.monotonic() + 120
        while True:
            try:
                with self.engine.begin() as connection:
                    return [connection.execute(statement) for statement in statements]
            except DBAPIError as error:
                if not dialect_of(self.engine).is_transient(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def claim(self, number: int, tries: int = 3) -> int:
        """Open a claim on row `number`, sent; return its id."""
        hashed = open_key(self.table, (number,))
        values = {
            "source": self.source,
            "row_key": f"[{number}]",
            "open_key": hashed,
            "attempt": 1,
            "failures": 0,
            "tries": tries,
            "rq_id": f"rq {number}",
            "claimed_by": "old producer",
            "claimed_at": Now(),
            "sent_at": Now(),
        }
        self.transact(insert(self.attempts).values(values))
        return self.id_of(number)

    def id_of(self, number: int) -> int:
        """The open claim on row `number`."""
        query = select(self.attempts.c.id).where(self.attempts.c.open_key == open_key(self.table, (number,)))
        with self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def start(self, number: int) -> bool:
        """Begin it; the run is named after the row."""
        c = self.attempts.c
        mine = (c.open_key == open_key(self.table, (number,))) & c.started_at.is_(None)
        values = {"started_at": Now(), "run": f"run {number}", "worker": "old worker"}
        (result,) = self.transact(update(self.attempts).where(mine).values(values))
        return bool(result.rowcount)

    def close(self, number: int, outcome: str = "done") -> bool:
        """End it for good."""
        c = self.attempts.c
        mine = (c.open_key == open_key(self.table, (number,))) & (c.run == f"run {number}") & c.finished_at.is_(None)
        values = {"open_key": None, "failures": 0, "finished_at": Now(), "outcome": outcome, "seconds": 0.5}
        (result,) = self.transact(update(self.attempts).where(mine).values(values))
        return bool(result.rowcount)

    def go_on(self, number: int, seconds: float) -> None:
        """It has failed once and waits for its second attempt. Version 1 left sent_at as it was."""
        c = self.attempts.c
        claim_id = self.id_of(number)
        names = [name for name in COLUMNS_V1.split(", ") if name != "id"]
        with self.engine.connect() as connection:
            query = select(*(c[name] for name in names)).where(c.id == claim_id)
            past = dict(connection.execute(query).mappings().one())
        past |= {"of_claim": claim_id, "open_key": None, "failures": 1, "outcome": "failed", "finished_at": Now()}
        again = {"attempt": 2, "failures": 1, "due_at": After(seconds), "started_at": None, "run": None, "worker": None}
        if seconds < 0:
            again["sent_at"] = After(seconds - 1)  # no wait begins before its attempt was sent
        self.transact(insert(self.attempts).values(past), update(self.attempts).where(c.id == claim_id).values(again))

    def dispose(self) -> None:
        self.engine.dispose()


def facts_v1(table: str, name: str) -> dict[str, Any]:
    """What a producer of version 1 wrote down of its source: nothing of leases."""
    words = ["Pending", "Queued", "Started", "Done", "Failed", "Cancelled", "Queued"]
    return {
        "table": table,
        "status_key": "state",
        "key_columns": ["id"],
        "states": dict(zip((state.value for state in State), words, strict=True)),
        "backoff": [0.0, 2.0, 86400.0, 0.0],
        "timeout": 3600.0,
    }


SHAPES: dict[str, Any] = {}  # how tables that this version makes anew look on each database


class Grown:
    """A ledger of version 1 that has served for a while, and what was in it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        # Its source's name is what this version calls it, too: ask it on a copy of the ledger's identity.
        place.jobs(*["Pending"] * 8)
        desk = place.desk()
        self.table = desk.rows.name
        place.run("UPDATE nih_sched_meta SET value = 'abcd1234' WHERE name = 'ledger_id'")
        self.source = place.desk().source.name
        ledger.drop(desk.engine, desk.ledger)
        make_v1(place)
        facts = json.dumps(facts_v1(self.table, self.source))
        sources = ledger.tables().sources
        with desk.engine.begin() as connection:
            connection.execute(insert(sources).values(name=self.source, facts=facts, updated_at=Now()))
        self.old = Old(place.url, self.source, self.table)
        for number in range(1, 7):
            self.old.claim(number)
        for number in (1, 2, 4, 5, 6):
            self.old.start(number)
        self.old.close(1)
        self.old.close(2, "failed")
        # 3 is open and sent; 4 runs; 5 waits for a retry that is due; 6 for one that is not.
        self.old.go_on(5, -60.0)
        self.old.go_on(6, 600.0)
        words = {1: "Done", 2: "Failed", 3: "Queued", 4: "Started", 5: "Queued", 6: "Queued"}
        for number, word in words.items():
            place.set(number, word)
        self.before = self.records()

    def records(self) -> list[Any]:
        """Every record as version 1 sees it."""
        return self.place.attempts(COLUMNS_V1)

    def check(self, *, busy: bool = False) -> None:
        """The tables are this version's, and nothing that was there is lost or changed."""
        place = self.place
        engine, own = connect(place.url), ledger.tables()
        assert ledger.version(engine, own) == ledger.SCHEMA_VERSION
        assert ledger.identity(engine, own, "ledger_id") == "abcd1234"
        assert ledger.check_made(engine, own) is True
        found = self.records()
        assert found[: len(self.before)] == self.before
        assert busy or len(found) == len(self.before)
        assert shape(place) == SHAPES[place.name]
        assert fenced(place)
        engine.dispose()


@pytest.fixture(autouse=True)
def _shapes(place: Place) -> None:
    """Look once on each."""
    if place.name not in SHAPES:
        engine, own = connect(place.url), ledger.tables()
        ledger.ensure(engine, own)
        SHAPES[place.name] = shape(place)
        ledger.drop(engine, own)
        engine.dispose()


@pytest.fixture
def grown(place: Place) -> Iterator[Grown]:
    grown = Grown(place)
    yield grown
    grown.old.dispose()


def ensure(place: Place) -> bool:
    engine = connect(place.url)
    try:
        return ledger.ensure(engine, ledger.tables())
    finally:
        engine.dispose()


# What is there goes on


def test_an_old_ledger_is_upgraded_and_nothing_is_lost(grown: Grown) -> None:
    assert ensure(grown.place) is True
    grown.check()
    assert ensure(grown.place) is False


def test_what_was_open_goes_on_under_this_version(grown: Grown) -> None:
    place = grown.place
    desk = place.desk()
    assert desk.source.name == grown.source
    assert Looks(desk).open_claims_up_to(9) == 4
    # The claim that waits for a worker, in its RQ job of old.
    (waiting,) = [one for one in Retries(desk).unstarted() if one.key == (3,)]
    assert waiting.rq_id == "rq 3"
    (row,) = start(desk, waiting, run="new")
    assert (row.claim.attempt, row.claim.interruptions) == (1, 0)
    assert finish(desk, row.claim, run="new") == [Fate(State.DONE, 0)]
    # The one that runs under a worker of old, which nobody of this version may declare dead.
    assert orphaned(desk, ["any"], 10) == []
    assert [run for _, run in running(desk, [grown.old.id_of(4)], "old worker")] == ["run 4"]
    assert grown.old.close(4)
    # New rows.
    assert {one.key for one in claim(desk)} == {(7,), (8,)}
    assert place.states() == {
        1: "Done",
        2: "Failed",
        3: "Done",
        4: "Started",
        5: "Queued",
        6: "Queued",
        7: "Queued",
        8: "Queued",
    }


def test_a_retry_that_waited_under_the_old_version_is_sent_by_this_one(grown: Grown) -> None:
    desk = grown.place.desk()
    (due,) = all_due(desk, 1)
    assert (due.claim.key, due.claim.attempt, due.claim.failures, due.claim.tries) == ((5,), 2, 1, 3)
    assert Looks(desk).around(rows=False).due == 0.0
    assert Retries(desk).take(due, "anew")
    assert 300 < (Looks(desk).around(rows=False).due or 0.0) <= 600
    (row,) = start(desk, due.claim, run="new")
    assert finish(desk, row.claim, run="new") == [Fate(State.DONE, 1)]
    assert grown.place.states()[5] == "Done"


def test_a_retry_that_a_worker_of_the_old_version_wrote_after_the_upgrade_is_sent(grown: Grown) -> None:
    # Both run side by side until the last of the old ones is replaced.
    desk = grown.place.desk()
    before = {due.claim.key for due in Retries(desk).due(10)}
    grown.old.go_on(4, -1.0)
    assert {due.claim.key for due in Retries(desk).due(10)} == before | {(4,)}


def test_a_retry_that_the_old_version_had_sent_is_known_to_be_sent(grown: Grown) -> None:
    # It noted that beside due_at, which it left.
    place = grown.place
    c = grown.old.attempts.c
    statement = update(grown.old.attempts).where(c.id == grown.old.id_of(5)).values(sent_at=Now(), rq_id="sent by old")
    grown.old.transact(statement)
    desk = place.desk()
    assert (5,) not in {due.claim.key for due in Retries(desk).due(10)}
    # So that it can be sent again when its job is lost.
    assert {one.key: one.rq_id for one in Retries(desk).unstarted()}.get((5,)) == "sent by old"


def test_a_worker_reads_a_source_that_an_old_producer_wrote_down(grown: Grown) -> None:
    place = grown.place
    engine, own = connect(place.url), ledger.tables()
    ledger.ensure(engine, own)
    facts = source_facts(engine, own, grown.source)
    assert facts is not None
    desk = source_desk(engine, own, grown.source, facts)
    assert (desk.source.lease, desk.source.max_interruptions) == (120.0, 10)
    (one,) = [one for one in Retries(desk).unstarted() if one.key == (3,)]
    (row,) = start(desk, one, columns=["name"])
    assert row.values == {"name": "n3"}
    assert finish(desk, row.claim, Outcome.INTERRUPTED) == [Fate(State.READY, 0, interruptions=1)]
    engine.dispose()


def test_the_old_versions_statements_still_work(grown: Grown) -> None:
    place, old = grown.place, grown.old
    desk = place.desk()
    old.claim(7)
    assert old.start(7)
    old.go_on(7, 0.0)
    assert old.start(7)
    assert old.close(7)
    old.claim(8)
    assert [one.key for one in Retries(desk).unstarted() if one.key == (8,)] == [(8,)]
    assert old.start(8)
    # What this version wrote, the old one reads and ends: a claim of ours with its retry waiting.
    place.set(8, "Started")
    assert finish(desk, running(desk, [old.id_of(8)], "old worker")[0][0], Outcome.FAILED, run="run 8") != [None]
    ((due_at, sent_at),) = place.run(
        "SELECT due_at, sent_at FROM nih_sched_attempts WHERE row_key = '[8]' AND open_key IS NOT NULL"
    )
    assert due_at is not None
    assert sent_at is None  # so does the old one's "waiting" look
    assert old.start(8)
    assert old.close(8)


# At once, and under traffic


class Traffic:
    """A thread that goes on claiming, starting and ending as version 1 does, until told to stop."""

    def __init__(self, grown: Grown, first: int) -> None:
        self.done: list[int] = []
        self.errors: list[BaseException] = []
        self._over = threading.Event()
        self._grown, self._first = grown, first
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()

    def _go(self) -> None:
        old = Old(self._grown.place.url, self._grown.source, self._grown.table)
        number = self._first
        try:
            while not self._over.is_set():
                old.claim(number)
                assert old.start(number), number
                if number % 3 == 0:
                    old.go_on(number, 0.0)
                    assert old.start(number), number
                assert old.close(number), number
                self.done.append(number)
                number += 1
        except BaseException as error:
            self.errors.append(error)
        finally:
            old.dispose()

    def goes_on(self, by: int = 5) -> None:
        """Wait until it has done so many more."""
        wanted = len(self.done) + by
        eventually(lambda: self.errors or len(self.done) >= wanted, timeout=120)
        assert self.errors == []

    def stop(self) -> None:
        self._over.set()
        self._thread.join(120)
        assert self.errors == []
        assert not self._thread.is_alive()


def upgraded_in_a_process(url: str, barrier: Any, answers: Any) -> None:
    engine = connect(url)
    own = ledger.tables()
    barrier.wait(60)
    try:
        answers.put((ledger.ensure(engine, own), ledger.version(engine, own)))
    except NihError as error:
        answers.put((str(error), 0))


def test_eight_processes_upgrade_at_once_while_old_ones_write(grown: Grown) -> None:
    place = grown.place
    barrier, answers = apart.Barrier(8), apart.Queue()
    children = [
        apart.Process(target=upgraded_in_a_process, args=(place.url, barrier, answers), daemon=True) for _ in range(8)
    ]
    traffic = [Traffic(grown, 1000), Traffic(grown, 100_000)]
    try:
        for one in traffic:
            one.goes_on()
        for child in children:
            child.start()
        found = [answers.get(timeout=180) for _ in children]
        for one in traffic:
            one.goes_on()
    finally:
        for child in children:
            if child.pid is not None:
                child.join(30)
                child.kill()
        for one in traffic:
            one.stop()
    assert [number for _, number in found] == [ledger.SCHEMA_VERSION] * 8, found
    assert any(upgraded is True for upgraded, _ in found)
    grown.check(busy=True)
    for one in traffic:
        rows = {f"[{number}]" for number in one.done}
        query = "SELECT row_key, count(*) FROM nih_sched_attempts WHERE outcome = 'done' GROUP BY row_key"
        done = {row_key: count for row_key, count in place.run(query) if row_key in rows}
        assert done == dict.fromkeys(rows, 1)
    thirds = sum(number % 3 == 0 for one in traffic for number in one.done)
    assert place.run("SELECT count(*) FROM nih_sched_attempts WHERE of_claim > 6") == [(thirds,)]


def test_claims_of_both_versions_go_on_during_the_upgrade(grown: Grown) -> None:
    # Until the upgrade is through, this version's own columns come one by one: who needs them waits for ensure().
    place = grown.place
    traffic = Traffic(grown, 1000)
    try:
        traffic.goes_on()
        desk = place.desk()
        for _ in range(2):
            assert run_once(desk) == Fate(State.DONE, 0)
            traffic.goes_on()
    finally:
        traffic.stop()
    grown.check(busy=True)


class Upgrading:
    """An upgrade in a thread, while somebody holds a lock that it needs."""

    def __init__(self, place: Place, lock: str, needs: str) -> None:
        self.engine = connect(place.url)
        self.tries: list[str] = []  # statements that begin as `needs` does
        self.answers: list[bool | BaseException] = []
        event.listen(self.engine, "before_cursor_execute", self._note)
        self._needs = needs
        self._holder = place.engine.connect()
        self._holder.begin()
        self._holder.execute(text(lock))
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()

    def _note(self, connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        if sql.startswith(self._needs):
            self.tries.append(sql)

    def _go(self) -> None:
        try:
            self.answers.append(ledger.ensure(self.engine, ledger.tables()))
        except BaseException as error:
            self.answers.append(error)

    def tries_again(self, times: int) -> None:
        """Wait until it has tried so often; it must not have come to an end meanwhile."""
        eventually(lambda: self.answers or len(self.tries) >= times, timeout=120)
        assert self.answers == []

    def release(self) -> None:
        """The lock is let go: the upgrade comes to its end."""
        self._holder.rollback()
        eventually(lambda: self.answers, timeout=120)
        assert self.answers == [True]

    def close(self) -> None:
        self._holder.close()
        self._thread.join(120)
        self.engine.dispose()


@only("postgresql", "mariadb")
def test_a_long_transaction_on_our_table_delays_the_upgrade_and_nobody_else(grown: Grown) -> None:
    place = grown.place
    upgrading = Upgrading(place, "UPDATE nih_sched_attempts SET worker = 'held' WHERE id = 1", "ALTER TABLE")
    traffic = Traffic(grown, 1000)
    try:
        upgrading.tries_again(1)
        first = len(traffic.done)
        # It gives up and tries again; between its tries and after each, what others write goes through.
        upgrading.tries_again(3)
        eventually(lambda: traffic.errors or len(traffic.done) > first, timeout=120)
        upgrading.release()
        traffic.goes_on()
    finally:
        upgrading.close()
        traffic.stop()
    grown.check(busy=True)


@only("postgresql", "mariadb")
def test_a_lock_on_the_version_itself_delays_the_upgrade(grown: Grown) -> None:
    lock = "UPDATE nih_sched_meta SET value = 'held' WHERE name = 'schema_version'"
    upgrading = Upgrading(grown.place, lock, "UPDATE nih_sched_meta")
    try:
        upgrading.tries_again(2)
        upgrading.release()
    finally:
        upgrading.close()
    grown.check()


# Halfway


def test_an_upgrade_that_was_killed_is_taken_up_again(grown: Grown) -> None:
    # MySQL commits at each DDL statement; wherever it ends, the next one goes on from there.
    place = grown.place
    engine, own = connect(place.url), ledger.tables()
    statements = ledger.ddl(engine, own)
    assert len(statements) > 5
    for statement in statements[:-1]:
        place.run(statement)
        assert grown.records() == grown.before
        with pytest.raises(OlderLedger):
            ledger.check_made(engine, own)
        remaining = ledger.ddl(engine, own)
        assert remaining == statements[len(statements) - len(remaining) :]
        assert statement not in remaining
    assert ledger.ensure(engine, own) is True
    grown.check()
    engine.dispose()


def test_an_upgrade_may_be_killed_anywhere(place: Place) -> None:
    engine, own = connect(place.url), ledger.tables()
    make_v1(place)
    count = len(ledger.ddl(engine, own))
    for done in range(count):
        ledger.drop(engine, own)
        make_v1(place)
        for statement in ledger.ddl(engine, own)[:done]:
            place.run(statement)
        assert ledger.ensure(engine, own) is True, done
        assert shape(place) == SHAPES[place.name], done
        assert ledger.ensure(engine, own) is False, done
    engine.dispose()


def test_a_ledger_that_the_old_version_left_half_made_is_completed(place: Place) -> None:
    # It was killed after its first statement, or makes the rest at this moment.
    engine, own = connect(place.url), ledger.tables()
    make_v1(place)
    place.run("DROP TABLE nih_sched_meta")
    place.run("DROP TABLE nih_sched_sources")
    assert ledger.ensure(engine, own) is True
    assert shape(place) == SHAPES[place.name]
    place.jobs("Pending")
    assert run_once(place.desk()) == Fate(State.DONE, 0)
    engine.dispose()


# By hand


def test_what_is_printed_for_a_half_made_ledger_completes_it(place: Place) -> None:
    engine, own = connect(place.url), ledger.tables()
    whole = ledger.ddl(engine, own)
    for done in range(1, len(whole)):
        for statement in whole[:done]:
            place.run(statement)
        for statement in ledger.ddl(engine, own):
            place.run(statement)
        assert ledger.check_made(engine, own) is True, done
        assert shape(place) == SHAPES[place.name], done
        assert ledger.ensure(engine, own) is False, done
        ledger.drop(engine, own)
    engine.dispose()


def test_the_printed_upgrade_makes_the_same_tables(grown: Grown) -> None:
    place = grown.place
    engine, own = connect(place.url), ledger.tables()
    for statement in ledger.ddl(engine, own):
        assert ";" not in statement
        place.run(statement)
    grown.check()
    assert ledger.ddl(engine, own) == []
    assert ledger.ensure(engine, own) is False
    engine.dispose()


def test_nothing_is_printed_for_tables_of_this_version(place: Place) -> None:
    engine, own = connect(place.url), ledger.tables()
    ledger.ensure(engine, own)
    assert ledger.ddl(engine, own) == []
    engine.dispose()


@only("postgresql", "mariadb")
def test_an_old_ledger_in_a_schema_of_its_own_is_upgraded_there(place: Place, request: pytest.FixtureRequest) -> None:
    name = "Else" if place.name == "postgresql" else f"else_{place.engine.url.database}"
    quoted = place.engine.dialect.identifier_preparer.quote_identifier(name)
    place.run(f"CREATE SCHEMA {quoted}")
    try:
        make_v1(place, f"{quoted}.")
        place.jobs("Pending", "Pending")
        desk = place.desk(ledger_schema=name)
        assert run_once(desk, Outcome.FAILED) == Fate(State.RETRYING, 1, 0.0)
        assert inspect(place.engine).get_table_names() == ["jobs"]
        found = {column["name"] for column in inspect(place.engine).get_columns("nih_sched_attempts", schema=name)}
        assert found == set(ledger.tables().attempts.columns.keys())
        assert ledger.ddl(desk.engine, desk.ledger) == []
    finally:
        if place.name == "mariadb":  # there it is a database of its own
            place.close()
            server: DatabaseServer = request.getfixturevalue("mariadb_server")
            server.sql(f"DROP DATABASE {quoted}")


@only("postgresql")
def test_who_may_not_alter_the_tables_is_told_what_to_do(place: Place) -> None:
    role = f"poor_{secrets.token_hex(4)}"
    make_v1(place)
    place.run(f"CREATE ROLE {role} LOGIN")
    place.run(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    place.run(f"GRANT ALL ON SCHEMA public TO {role}")
    engine, own = create_engine(make_url(place.url).set(username=role)), ledger.tables()
    try:
        with pytest.raises(DatabaseRefused, match=r"refused to upgrade our tables nih_sched_\*: .*owner") as caught:
            ledger.ensure(engine, own)
        assert "`scheduler init --print-sql`" in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        engine.dispose()
        place.run(f"DROP OWNED BY {role}")
        place.run(f"DROP ROLE {role}")


# For those who only look


def look(place: Place) -> Desk:
    desk = open_desk(Settings(database_url=place.url), create_ledger=False)
    desk.close()
    return desk


def test_who_only_looks_upgrades_nothing_and_says_so(grown: Grown) -> None:
    place = grown.place
    before = shape(place)
    with pytest.raises(OlderLedger) as caught:
        look(place)
    assert "\n" not in str(caught.value)
    assert f"expected version {ledger.SCHEMA_VERSION}" in str(caught.value)
    assert "scheduler init" in str(caught.value)
    assert caught.value.exit_code == 2
    assert shape(place) == before
    assert grown.records() == grown.before
    ensure(place)
    assert look(place).source.name == grown.source


def test_who_only_looks_sees_that_there_is_nothing(place: Place) -> None:
    engine, own = connect(place.url), ledger.tables()
    assert ledger.check_made(engine, own) is False
    assert ledger.ensure(engine, own) is True
    assert ledger.check_made(engine, own) is True
    engine.dispose()


# Newer ones


def set_version(place: Place, number: int) -> None:
    place.run("UPDATE nih_sched_meta SET value = :v WHERE name = 'schema_version'", v=str(number))


def test_the_next_versions_ledger_is_accepted_and_let_be(place: Place) -> None:
    place.jobs(*["Pending"] * 4)
    engine, own = connect(place.url), ledger.tables()
    ledger.ensure(engine, own)
    set_version(place, ledger.SCHEMA_VERSION + 1)
    for table in ("attempts", "leases", "sources"):
        place.run(f"ALTER TABLE nih_sched_{table} ADD COLUMN newer varchar(20)")
    place.run("CREATE TABLE nih_sched_newer (id integer PRIMARY KEY)")
    before = shape(place)
    assert ledger.ensure(engine, own) is False
    assert ledger.check_made(engine, own) is True
    assert ledger.ddl(engine, own) == []
    desk = place.desk(max_interruptions=2)
    assert look(place).source.name == desk.source.name
    outcomes = [Outcome.DONE, Outcome.FAILED, Outcome.INTERRUPTED]
    claims = [row.claim for row in start(desk, *claim(desk, 3))]
    for one, outcome in zip(claims, outcomes, strict=True):
        assert finish(desk, one, outcome) != [None]
    assert finish(desk, next_attempt(desk, claims[1], "second"), run="second") == [Fate(State.DONE, 1)]
    assert run_once(desk, Outcome.INTERRUPTED) == Fate(State.FAILED, 0, interruptions=2)
    assert place.states() == {1: "Done", 2: "Done", 3: "Failed", 4: "Pending"}
    assert {newer for (newer,) in place.attempts("newer")} == {None}
    assert shape(place) == before
    assert ledger.version(engine, own) == ledger.SCHEMA_VERSION + 1
    engine.dispose()


def test_a_ledger_two_versions_ahead_is_refused_in_a_line(place: Place) -> None:
    place.jobs("Pending")
    engine, own = connect(place.url), ledger.tables()
    ledger.ensure(engine, own)
    set_version(place, ledger.SCHEMA_VERSION + 2)
    before = shape(place)
    ways: list[Callable[[], Any]] = [
        lambda: ledger.ensure(engine, own),
        lambda: ledger.check_made(engine, own),
        lambda: ledger.version(engine, own),
        place.desk,
        lambda: look(place),
    ]
    for way in ways:
        with pytest.raises(NewerLedger) as caught:
            way()
        said = str(caught.value)
        assert f"have schema version {ledger.SCHEMA_VERSION + 2}; this nih-sched has {ledger.SCHEMA_VERSION}." in said
        assert said.endswith("Upgrade nih-sched.")
        assert "\n" not in said
        assert caught.value.exit_code == 2
    assert shape(place) == before
    assert place.states() == {1: "Pending"}
    engine.dispose()
