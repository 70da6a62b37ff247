"""Status columns of every kind, the tables that are refused, and the index."""

from __future__ import annotations

import pytest
from sqlalchemy import event, inspect, select

from conformance.places import KINDS, Place, claim, finish, next_attempt, only, ready, run_once, start
from nih_sched.errors import AmbiguousStates, BadStateWord, NoPrimaryKey, NoSuchColumn, NoSuchTable, NotATable
from nih_sched.model import Outcome, State
from nih_sched.store import Claims, Desk, source_desk, source_facts
from nih_sched.store.rows import insert_rows

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
