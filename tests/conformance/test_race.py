"""Real processes race for the same rows: each row is claimed once and started once, none is lost."""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Database, eventually
from sqlalchemy import Engine, create_engine, event, text

from conformance.places import apart, rq_ids
from nih_sched.settings import Settings
from nih_sched.store import Attempts, Claims, open_desk

PROCESSES = 4


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    """The owner's own."""
    engine = create_engine(database.url)
    if database.name == "sqlite":
        event.listen(engine, "connect", lambda c, record: c.execute("PRAGMA busy_timeout = 30000"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(20))"))
    yield engine
    engine.dispose()


def add(engine: Engine, numbers: range) -> None:
    rows = [{"n": number} for number in numbers]
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO jobs VALUES (:n, 'Pending', 'x')"), rows)


def count(engine: Engine, word: str) -> int:
    with engine.connect() as connection:
        return connection.execute(text("SELECT count(*) FROM jobs WHERE state = :w"), {"w": word}).scalar_one()


def race(work: Callable[..., None], *args: Any, meanwhile: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Run `work` in several processes that begin at the same moment; return what each of them got."""
    barrier, answers = apart.Barrier(PROCESSES), apart.Queue()
    children = [
        apart.Process(target=work, args=(*args, number, barrier, answers), daemon=True) for number in range(PROCESSES)
    ]
    for child in children:
        child.start()
    try:
        meanwhile()
        found: dict[int, list[int]] = dict(answers.get(timeout=180) for _ in children)
    finally:
        for child in children:
            child.join(10)
            child.kill()
    assert [child.exitcode for child in children] == [0] * PROCESSES
    return [found[number] for number in range(PROCESSES)]


def claimer(url: str, number: int, barrier: Any, answers: Any) -> None:
    desk = open_desk(Settings(database_url=url))
    claims = Claims(desk, f"producer {number}", 3)
    dice = random.Random(number)
    mine: list[int] = []
    barrier.wait(180)
    idle = 0
    while idle < 20:  # its owner may still be inserting
        got = claims.claim(dice.choice([1, 7, 40, 100]), rq_ids)
        mine += [claim.key[0] for claim in got]
        time.sleep(0.002)  # SQLite's writers don't queue: one that never rests would take all
        idle = 0 if got else idle + 1
    desk.close()
    answers.put((number, mine))


def test_each_row_is_claimed_once_and_none_is_lost(database: Database, engine: Engine) -> None:
    open_desk(Settings(database_url=database.url)).close()  # makes our tables
    add(engine, range(1500))

    def insert_more() -> None:
        eventually(lambda: count(engine, "Queued"), timeout=60, every=0.005)
        for at in range(1500, 2000, 50):
            add(engine, range(at, at + 50))

    found = race(claimer, database.url, meanwhile=insert_more)
    desk = open_desk(Settings(database_url=database.url))
    late = [claim.key[0] for claim in Claims(desk, "late", 3).claim(2000, rq_ids)]
    desk.close()
    counts = Counter(key for keys in [*found, late] for key in keys)
    assert [key for key, times in counts.items() if times > 1] == []
    assert set(counts) == set(range(2000))
    assert count(engine, "Queued") == 2000
    with engine.connect() as connection:
        ledger = connection.execute(
            text("SELECT count(*), count(DISTINCT row_key), count(DISTINCT open_key) FROM nih_sched_attempts")
        ).one()
    assert tuple(ledger) == (2000, 2000, 2000)
    assert sum(map(len, found)) >= 1500
    assert sum(len(keys) > 0 for keys in found) > 1  # it was a race


def starter(url: str, ids: list[int], number: int, barrier: Any, answers: Any) -> None:
    desk = open_desk(Settings(database_url=url))
    dice = random.Random(number)
    mine: list[int] = []
    barrier.wait(180)
    for at in range(0, len(ids), 4):
        group = ids[at : at + 4 + number]  # they overlap, so that a group is lost in part, too
        dice.shuffle(group)
        if at:
            barrier.wait(180)
        mine += [
            row.claim.id for row in Attempts(desk, secrets.token_hex(8), f"worker {number}").start(group, ["name"])
        ]
    desk.close()
    answers.put((number, mine))


def test_each_claim_is_started_once(database: Database, engine: Engine) -> None:
    add(engine, range(240))
    desk = open_desk(Settings(database_url=database.url))
    ids = [claim.id for claim in Claims(desk, "producer", 3).claim(240, rq_ids)]
    found = race(starter, database.url, ids)
    begun = {number for numbers in found for number in numbers}
    # Workers that meet at a row may both stand back from it: then it is put off, and starts the next time.
    late = Attempts(desk, "late", "late")
    for number in set(ids) - begun:
        eventually(lambda number=number: late.start([number], ["name"]), timeout=60)  # type: ignore[misc]
    desk.close()
    assert sorted(number for numbers in [*found, set(ids) - begun] for number in numbers) == ids
    assert count(engine, "Started") == 240
    with engine.connect() as connection:
        by_worker = dict(
            connection.execute(text("SELECT worker, count(*) FROM nih_sched_attempts GROUP BY worker")).all()
        )
    by_worker.pop("late", None)
    assert by_worker == {f"worker {number}": len(ids) for number, ids in enumerate(found) if ids}
    assert len(by_worker) > 1  # it was a race
