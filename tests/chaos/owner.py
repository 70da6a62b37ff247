"""The table's owner: makes it, inserts the stream of rows, and edits rows at any time, with plain SQL."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from chaos.journal import Journal
from chaos.plan import Row

T = TypeVar("T")

TABLE = """
CREATE TABLE jobs (
    id INTEGER NOT NULL PRIMARY KEY,
    state VARCHAR(20) NOT NULL,
    length_ms INTEGER NOT NULL,
    fails INTEGER NOT NULL,
    final_fail INTEGER NOT NULL,
    note VARCHAR(40)
)
"""
FINAL = ("Done", "Failed", "Cancelled")
AGAIN = 0.2  # seconds until a statement that failed is tried again

# What an owner does in one visit: the edit, and the states among which its row is looked for, the first is preferred.
VISIT = (
    ("edit", ("Started", "Queued", "Pending", "Done")),
    ("reset", ("Done",)),
    ("reset", ("Started", "Queued", "Failed", "Done")),
    ("delete", ("Queued", "Pending", "Started", "Done")),
    ("cancel", ("Queued", "Pending")),
    ("cancel", ("Started", "Queued")),
)
SQL = {
    "edit": "UPDATE jobs SET note = :tag WHERE id = :key AND state = :seen",
    "reset": "UPDATE jobs SET note = :tag, state = 'Pending' WHERE id = :key AND state = :seen",
    "cancel": "UPDATE jobs SET note = :tag, state = 'Cancelled' WHERE id = :key AND state = :seen",
    "delete": "DELETE FROM jobs WHERE id = :key AND state = :seen",
}


@dataclass(frozen=True)
class _Edit:
    op: str
    key: int
    seen: str
    tag: str


class Owner:
    """Works on through every outage; says in the journal what it has done, once it is sure of it."""

    def __init__(self, url: str, journal: Journal) -> None:
        arguments = {"timeout": 60} if url.startswith("sqlite") else {}
        self._engine = create_engine(url, pool_pre_ping=True, connect_args=arguments)
        self._journal = journal
        self._over = threading.Event()

    def close(self) -> None:
        """Insert no more, and disconnect."""
        self._over.set()
        self._engine.dispose()

    def make_table(self) -> None:
        """An empty table with the index that anyone would give it."""
        with self._engine.begin() as connection:
            connection.execute(text(TABLE))
            connection.execute(text("CREATE INDEX jobs_state ON jobs (state)"))

    def insert_all(self, rows: Sequence[Row], begin: float) -> None:
        """Insert each row when its time has come."""
        left = sorted(rows, key=lambda row: row.at)
        while left and not self._over.is_set():
            due = [row for row in left if begin + row.at <= time.monotonic()]
            if due:
                self._insist(lambda c, due=due: self._insert(c, due))  # type: ignore[misc]
                self._journal.write("inserted", keys=[row.key for row in due])
                left = left[len(due) :]
            self._over.wait(0.05)

    def _insert(self, connection: Connection, rows: Sequence[Row]) -> None:
        # The one before may have been committed although its answer was lost.
        low, high = min(row.key for row in rows), max(row.key for row in rows)
        query = text("SELECT id FROM jobs WHERE id BETWEEN :low AND :high")
        there = set(connection.execute(query, {"low": low, "high": high}).scalars())
        statement = text("INSERT INTO jobs VALUES (:key, 'Pending', :length_ms, :fails, :final, NULL)")
        for row in rows:
            if row.key not in there:
                values = {"key": row.key, "length_ms": row.length_ms, "fails": row.fails, "final": int(row.final_fail)}
                connection.execute(statement, values)

    def _insist(self, work: Callable[[Connection], T]) -> T:
        while True:
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except DBAPIError:
                if self._over.is_set():
                    raise
                time.sleep(AGAIN)

    def unfinished(self) -> int:
        """How many rows aren't final."""
        query = text("SELECT count(*) FROM jobs WHERE state NOT IN ('Done', 'Failed', 'Cancelled')")
        return self._insist(lambda connection: int(connection.execute(query).scalar_one()))

    def visit(self, number: int, rng: random.Random) -> list[dict[str, object]]:
        """Edit, reset, delete and cancel a few rows; what was done to which, and when."""
        done: list[dict[str, object]] = []
        for turn, (op, states) in enumerate(VISIT):
            for seen in states:
                edit = self._choose(op, seen, f"{op} {number}.{turn}", rng, {one["key"] for one in done})
                if edit is None:
                    continue
                begin = time.monotonic()
                if self._apply(edit):
                    end = time.monotonic()
                    done.append({"op": op, "key": edit.key, "seen": seen, "tag": edit.tag, "begin": begin, "end": end})
                    break
        return done

    def _choose(self, op: str, seen: str, tag: str, rng: random.Random, but: Collection[object]) -> _Edit | None:
        query = text("SELECT id FROM jobs WHERE state = :seen ORDER BY id")
        found: list[int] = self._insist(lambda connection: list(connection.execute(query, {"seen": seen}).scalars()))
        keys = [key for key in found if key not in but]
        return _Edit(op, rng.choice(keys), seen, tag) if keys else None

    def _apply(self, edit: _Edit) -> bool:
        """Whether it was done; not if the row has left the state that we saw."""
        values = {"key": edit.key, "seen": edit.seen, "tag": edit.tag}
        if edit.op == "delete":
            del values["tag"]
        lost = False  # whether an answer was: then the row itself tells
        while True:
            try:
                with self._engine.begin() as connection:
                    done = bool(connection.execute(text(SQL[edit.op]), values).rowcount)
                    done = done or (lost and self._is_done(connection, edit))
            except DBAPIError:
                lost = True
                if self._over.is_set():
                    raise
                time.sleep(AGAIN)
            else:
                return done

    def _is_done(self, connection: Connection, edit: _Edit) -> bool:
        found = connection.execute(text("SELECT note FROM jobs WHERE id = :key"), {"key": edit.key}).all()
        return not found if edit.op == "delete" else bool(found) and found[0][0] == edit.tag
