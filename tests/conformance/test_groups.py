"""Many attempts in one go: what is written of each, in few statements, and taken back of those not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select

from conformance.places import Events, Place, all_due, claim, finish, instants, next_attempt, only, start
from conformance.test_keys import CASES, make_jobs
from nih_sched import clock
from nih_sched.dialects.base import End
from nih_sched.model import Ended, Fate, Outcome, State
from nih_sched.store import Attempts, Claims, Desk, Looks
from nih_sched.store.rows import insert_rows

RESULTS = [
    *(None, "null", '"text"', "1.5", '{"größe": "🎈", "a": [1, {"b": null}]}', json.dumps("🎈é")),
    *("back\\slash \\n \\u0041 \\\\", 'it\'s "quoted" `so`', ":x :given %s %(y)s %%", "line\nline\r\ttab\x01\x7f"),
    *("", " ", "x" * 60_000, "ж" * 30_000, "a\0b", "-- ; /* */ {} [] $"),
]


@contextmanager
def statements(desk: Desk) -> Iterator[list[tuple[str, int]]]:
    """Those that are run meanwhile, each with how often."""
    seen: list[tuple[str, int]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        seen.append((statement.split(maxsplit=1)[0], len(parameters) if executemany else 1))

    event.listen(desk.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(desk.engine, "before_cursor_execute", note)


def few(seen: list[tuple[str, int]]) -> bool:
    """Whether a group was written as one: ledger and rows, and before them a look where that has to be."""
    words = [word for word, _ in seen if word not in ("SET", "BEGIN")]
    return words in (["UPDATE", "UPDATE"], ["SELECT", "UPDATE", "UPDATE"])


def kept(result: str | None) -> str | None:
    return None if result is None else result.replace("\0", "\\x00")


def check_instants(desk: Desk, ended: list[Ended], now: Any, passed: float) -> None:
    """Each began and ended when it told, by the database's clock."""
    found = {row[0]: row[1:] for row in instants(desk, "id", "started_at", "finished_at")}
    slack = timedelta(seconds=passed + 0.05)
    for one in ended:
        started, finished = found[one.claim.id]
        age = timedelta(seconds=clock.boot() - (one.at or 0.0))
        assert abs(now - age - finished) <= slack
        assert abs(finished - started - timedelta(seconds=one.seconds)) <= timedelta(milliseconds=3)


# Finish


def test_done_rows_are_written_together(place: Place, events: Events) -> None:
    place.jobs(*["Pending"] * 48)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    began = clock.boot()
    ended = [
        Ended(one, Outcome.DONE, result=RESULTS[n % len(RESULTS)], seconds=n / 1000, at=began - 60 - n / 10)
        for n, one in enumerate(claims)
    ]
    with statements(desk) as seen:
        fates = Attempts(desk, "run", "w" * 300).finish(ended)
    assert fates == [Fate(State.DONE, 0)] * 48
    assert few(seen)
    if place.name != "sqlite":  # which has no network to cross
        assert all(times == 1 for _, times in seen)
    check_instants(desk, ended, Looks(desk).now(), clock.boot() - began)
    assert set(place.states().values()) == {"Done"}
    facts = ("outcome", "ended_by", "open_key", "kept_key", "reason", "traceback", "interruptions", "due_at", "late")
    assert set(place.attempts(*facts)) == {("done", "w" * 190, None, None, None, None, 0, None, None)}
    assert place.attempts("seconds") == [(pytest.approx(n / 1000),) for n in range(48)]
    assert [row[0] for row in place.attempts("result")] == [kept(one.result) for one in ended]
    assert [name for name, _ in events] == ["ledger_created"]


def test_a_group_is_written_only_where_it_is_still_ones_own(place: Place, events: Events) -> None:
    place.jobs(*["Pending"] * 9)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims[:4], claims[8])
    start(desk, *claims[4:6], run="another's")
    finish(desk, claims[1], Outcome.FAILED, final=True, reason="before")
    before = {row[0]: row for row in place.run("SELECT * FROM nih_sched_attempts")}
    place.set(3, "Mine")
    place.run("DELETE FROM jobs WHERE id = 4")
    told = [Ended(one, Outcome.DONE, result="x", seconds=0.5, at=clock.boot()) for one in claims]
    fates = Attempts(desk, "run", "other worker").finish(told)
    done = Fate(State.DONE, 0)
    assert fates == [done, None, done, done, None, None, None, None, done]
    words = "Done Failed Mine Started Started Queued Queued Done".split()
    assert place.states() == dict(zip((1, 2, 3, 5, 6, 7, 8, 9), words, strict=True))
    after = {row[0]: row for row in place.run("SELECT * FROM nih_sched_attempts")}
    assert [n for n, one in enumerate(claims) if after[one.id] != before[one.id]] == [0, 2, 3, 8]
    assert [name for name, _ in events].count("stale") == 5
    changed = place.run("SELECT * FROM nih_sched_attempts")
    assert Attempts(desk, "run", "other worker").finish(told) == fates  # the answer was lost: the same again
    assert place.run("SELECT * FROM nih_sched_attempts") == changed


def test_a_group_of_all_kinds_of_ends(place: Place) -> None:
    place.jobs(*["Pending"] * 12)
    desk = place.desk(delay=30.0)
    claims = claim(desk)
    start(desk, *claims)
    kinds = [Outcome.DONE, Outcome.FAILED, Outcome.DONE, Outcome.POSTPONED, Outcome.INTERRUPTED, Outcome.DONE] * 2
    told = [Ended(o, kind, at=clock.boot(), postpone=9.0) for o, kind in zip(claims, kinds, strict=True)]
    with statements(desk):
        fates = Attempts(desk, "run", "worker").finish(told)
    words = {Outcome.DONE: "Done", Outcome.INTERRUPTED: "Pending"}
    assert place.states() == {n: words.get(kind, "Queued") for n, kind in enumerate(kinds, 1)}
    assert [fate is not None and fate.claim_goes_on for fate in fates] == [
        kind in (Outcome.FAILED, Outcome.POSTPONED) for kind in kinds
    ]


REFUSALS = [
    pytest.param("sqlite", "CHECK", id="check-sqlite"),
    pytest.param("postgresql", "CHECK", id="check-postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", "CHECK", id="check-mariadb", marks=pytest.mark.mariadb),
    pytest.param("sqlite", "trigger", id="trigger-sqlite"),
    pytest.param("postgresql", "trigger", id="trigger-postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", "trigger", id="trigger-mariadb", marks=pytest.mark.mariadb),
]
TRIGGERS = {
    "sqlite": [
        """CREATE TRIGGER no BEFORE UPDATE ON jobs WHEN NEW.id = 3 AND NEW.state = '{word}'
           BEGIN SELECT RAISE(ABORT, 'not this one'); END"""
    ],
    "postgresql": [
        """CREATE FUNCTION no() RETURNS trigger AS $$ BEGIN
           IF NEW.id = 3 AND NEW.state = '{word}' THEN RAISE EXCEPTION 'not this one'; END IF; RETURN NEW;
           END $$ LANGUAGE plpgsql""",
        "CREATE TRIGGER no BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION no()",
    ],
    "mariadb": [
        """CREATE TRIGGER no BEFORE UPDATE ON jobs FOR EACH ROW
           IF NEW.id = 3 AND NEW.state = '{word}' THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'; END IF
        """
    ],
}


def refuse_row_3(place: Place, how: str, word: str) -> None:
    """Rows 1 to 6; the database won't have the third in this state."""
    check = f", CHECK (id <> 3 OR state <> '{word}')" if how == "CHECK" else ""
    create = f"CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name text{check})"
    place.jobs(*["Pending"] * 6, create=create)
    for statement in TRIGGERS[place.name] if how == "trigger" else []:
        place.run(statement.format(word=word))


@pytest.mark.parametrize(("database", "how"), REFUSALS, indirect=["database"])
def test_a_row_refused_at_its_end_takes_no_other_with_it(place: Place, how: str, events: Events) -> None:
    refuse_row_3(place, how, "Done")
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    assert finish(desk, claims, result="kept", at=clock.boot()) == [Fate(State.DONE, 0)] * 6
    assert place.states() == {n: "Started" if n == 3 else "Done" for n in range(1, 7)}
    assert place.attempts("outcome", "result", "open_key") == [("done", "kept", None)] * 6
    assert [name for name, _ in events] == ["ledger_created", "state_refused"]


@pytest.mark.parametrize(("database", "how"), REFUSALS, indirect=["database"])
def test_a_row_refused_at_its_start_takes_no_other_with_it(place: Place, how: str) -> None:
    refuse_row_3(place, how, "Started")
    desk = place.desk()
    claims = claim(desk, tries=0)
    rows = start(desk, *claims)
    assert [row.claim for row in rows] == claims
    assert [row.claim.key for row in rows if row.refused] == [(3,)]
    assert place.states() == {n: "Queued" if n == 3 else "Started" for n in range(1, 7)}


# Close, as the dialect does it


def test_close_claims_closes_what_is_still_mine(place: Place) -> None:
    place.jobs(*["Pending"] * 6)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    attempts = desk.ledger.attempts
    with desk.engine.begin() as connection:
        connection.execute(attempts.update().where(attempts.c.id == claims[2].id).values(run="another's"))
    ends = [End(one.id, 0.25 * n, 5.0 * n, RESULTS[n]) for n, one in enumerate(claims)]
    values = {"outcome": "done", "ended_by": "%s :given 🎈", "reason": None, "open_key": None}
    for closed in ({one.id for one in claims if one is not claims[2]}, set[int]()):
        before = Looks(desk).now()
        with desk.engine.begin() as connection:
            assert desk.dialect.close_claims(connection, attempts, "run", values, ends) == closed
        if closed:
            at = before
    found = instants(desk, "seconds", "result", "outcome", "ended_by", "open_key", "started_at", "finished_at")
    for n, (seconds, result, outcome, by, open_key, started, finished) in enumerate(found):
        if n == 2:
            assert (seconds, result, outcome, by, finished) == (None,) * 5
            assert open_key
            continue
        assert (result, outcome, by, open_key) == (RESULTS[n], "done", "%s :given 🎈", None)
        assert seconds == pytest.approx(0.25 * n)
        assert abs(at - timedelta(seconds=5.0 * n) - finished) < timedelta(seconds=2)
        assert abs(finished - started - timedelta(seconds=0.25 * n)) <= timedelta(milliseconds=3)


# Take back


def test_what_was_begun_and_not_run_is_taken_back(place: Place) -> None:
    place.jobs(*["Pending"] * 6)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims[:4], lease=None)
    start(desk, claims[4], run="another's")
    finish(desk, claims[0])
    place.set(4, "Mine")
    kept_ones = {one.id: one for one in claims}
    before = {row[0]: row for row in place.run("SELECT * FROM nih_sched_attempts")}
    taken = Attempts(desk, "run", "worker").take_back(claims)
    assert {kept_ones[one].key for one in taken} == {(2,), (3,), (4,)}
    assert place.states() == {1: "Done", 2: "Queued", 3: "Queued", 4: "Mine", 5: "Started", 6: "Queued"}
    after = {row[0]: row for row in place.run("SELECT * FROM nih_sched_attempts")}
    assert {kept_ones[one].key for one in after if after[one] != before[one]} == {(2,), (3,), (4,)}
    nobody = place.attempts("started_at", "run", "worker", "lease", "finished_at", "attempt", "failures")[1:4]
    assert nobody == [(None, None, None, None, None, 1, 0)] * 3
    assert Attempts(desk, "run", "worker").take_back(claims) == []
    assert Attempts(desk, "run", "worker").take_back([]) == []
    assert finish(desk, claims[1]) == [None]  # it isn't that run's any more
    assert {row.claim for row in start(desk, *claims, run="later")} == {claims[1], claims[2], claims[5]}
    assert place.attempts("outcome")[3] == ("cancelled",)


@pytest.mark.parametrize("words", [{}, {"retrying_val": "Waiting"}, {"queued_val": "Busy", "started_val": "Busy"}])
def test_a_retry_that_is_taken_back_waits_as_before(place: Place, words: dict[str, str]) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk(**words)
    first, second = claim(desk)
    start(desk, first)
    finish(desk, first, Outcome.FAILED)
    again = next_attempt(desk, first, "again")
    start(desk, second, run="again")
    assert set(Attempts(desk, "again", "worker").take_back([again, second])) == {first.id, second.id}
    waiting, queued = desk.rows.words[State.RETRYING], desk.rows.words[State.QUEUED]
    assert place.states() == {1: waiting, 2: queued}
    assert place.attempts("attempt", "failures", "run")[:2] == [(2, 1, None), (1, 0, None)]
    # Then it can be given back as what was never begun can.
    Claims(desk, "", 0).give_back([first.id, second.id])
    assert place.states() == {1: waiting, 2: "Pending"}
    assert [due.claim.id for due in all_due(desk, 1)] == [first.id]
    assert next_attempt(desk, first, "third").attempt == 2


# Keys


def whole_way(place: Place, desk: Desk) -> None:
    """Begin and end all rows together, but one; each group finds its rows and no others."""
    claims = claim(desk)
    query = select(*desk.rows.keys)
    for some in (claims[:1], claims[1:], claims[::2], claims):
        with desk.engine.connect() as connection:
            found = connection.execute(query.where(desk.keyed([one.key for one in some]))).all()
        assert sorted(map(repr, (tuple(row) for row in found))) == sorted(repr(one.key) for one in some)
    last = claims.pop()
    assert len(start(desk, *claims)) == len(claims)
    assert Looks(desk).by_word() == {"Started": len(claims), "Queued": 1}
    with statements(desk) as seen:
        finish(desk, claims)
    assert len(claims) == 1 or few(seen)
    assert Looks(desk).by_word() == {"Done": len(claims), "Queued": 1}
    start(desk, last)
    Attempts(desk, "run", "worker").take_back([last])
    assert Looks(desk).by_word() == {"Done": len(claims), "Queued": 1}


@pytest.mark.parametrize(("database", "name"), CASES, indirect=["database"])
def test_a_group_of_keys_of_every_kind(place: Place, name: str) -> None:
    names, keys = make_jobs(place, name)
    desk = place.desk()
    insert_rows(desk.engine, desk.rows, [dict(zip(names, key, strict=True)) for key in keys], lambda count: None)
    whole_way(place, desk)


ENUM = "it''s", "b", "größe", "a,b"


@only("postgresql", "mariadb")
def test_a_group_of_enum_keys(place: Place) -> None:
    values = ", ".join(f"'{one}'" for one in ENUM)
    if place.name == "postgresql":
        place.run(f"CREATE TYPE kind AS ENUM ({values})")
    kind = "kind" if place.name == "postgresql" else f"ENUM ({values}) CHARACTER SET utf8mb4"
    place.run(f"CREATE TABLE jobs (id {kind} PRIMARY KEY, state varchar(20))")
    for one in ENUM:
        place.run(f"INSERT INTO jobs VALUES ('{one}', 'Pending')")
    whole_way(place, place.desk())


@only("postgresql")
@pytest.mark.parametrize("kind", ["kind", '"char"', "name", 'text COLLATE "C"'])
def test_a_group_of_keys_of_postgresqls_own_kinds(place: Place, kind: str) -> None:
    place.run("CREATE DOMAIN kind AS varchar(20)")
    place.run(f"CREATE TABLE jobs (id {kind} PRIMARY KEY, state varchar(20))")
    for one in ("a", "b", "c"):
        place.run(f"INSERT INTO jobs VALUES ('{one}', 'Pending')")
    whole_way(place, place.desk())


def test_a_group_of_big_numeric_keys_next_to_each_other(place: Place) -> None:
    place.run("CREATE TABLE jobs (id numeric(18, 0) PRIMARY KEY, state varchar(20))")
    for n in range(5):
        place.run("INSERT INTO jobs VALUES (:n, 'Pending')", n=10**14 + n)
    whole_way(place, place.desk())


def test_no_statement_of_a_rows_way_is_compiled_twice(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.jobs(*["Pending"] * 30)
    desk = place.desk()
    desk.engine.echo = True  # SQLAlchemy says of each statement whether it had it compiled

    def way(run: str) -> str:
        caplog.clear()
        claims = claim(desk, 10)
        assert len(start(desk, *claims, run=run, columns=["name"])) == 10
        finish(desk, claims, run=run)
        assert Looks(desk).around(rows=True).ready
        return caplog.text

    assert "[generated in" in way("one")
    again = way("two")
    assert "[cached since" in again
    assert "[generated in" not in again
    assert "[no key" not in again
