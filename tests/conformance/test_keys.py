"""Keys and identifiers of every kind go the whole way."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, inspect, text

from conformance.places import KINDS, Place, claim, finish, next_attempt, start
from nih_sched.errors import KeysDontMatch, UnusableKey
from nih_sched.model import Fate, Outcome, State
from nih_sched.store import Claims, Looks, source_desk, source_facts
from nih_sched.store.rows import give_all_back, insert_rows

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


def make_jobs(place: Place, name: str) -> tuple[list[str], Any]:
    """An empty table jobs with keys of this kind; return its key columns, and keys for it."""
    _, columns, keys = KEYS[name]
    types = {
        "bytes": {"postgresql": "bytea"}.get(place.name, "blob"),
        "timestamp": {"mariadb": "datetime(6)"}.get(place.name, "timestamp"),
    }
    names = [column.split()[0] for column in columns]
    definition = ", ".join(f"{column} NOT NULL" for column in columns).format_map(types)
    collate = " CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" if name == "text" and place.name == "mariadb" else ""
    place.run(f"CREATE TABLE jobs ({definition}, state varchar(20), PRIMARY KEY ({', '.join(names)})){collate}")
    return names, keys


@pytest.mark.parametrize(("database", "name"), CASES, indirect=["database"])
def test_keys_of_every_kind(place: Place, name: str) -> None:
    names, keys = make_jobs(place, name)
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
