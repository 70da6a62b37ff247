"""How soon a row runs: from the return of its INSERT's COMMIT to its handler's first line."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import servers
import sqlalchemy
from sqlalchemy import text

from bench import counts, ours, ring, tables, trees
from bench.plan import NAMES, Bench, Plan, Step

WORKERS = 2
WARM_UP = 5
PATIENCE = 30.0  # seconds; a row that hasn't begun by then counts as so late, and no more are tried


@dataclass(frozen=True)
class Case:
    """A way to hear of a row."""

    kind: str
    bell: str  # "", "notify" or "ring"
    busy: bool = False

    @property
    def system(self) -> str:
        """For the table."""
        bells = {"": "no bell", "notify": "init --notify", "ring": "nih_sched.ring"}
        return f"{NAMES[self.kind]}, {bells[self.bell]}, {'busy' if self.busy else 'idle'}"


@contextmanager
def latency(bench: Bench) -> Iterator[Plan]:
    """Each database, with its bell if this version has one, and without."""
    cases = []
    for kind in bench.options.databases:
        if not bench.rig.has(kind):
            continue
        bell = "notify" if kind == "postgresql" and ours.can_ring(bench.options.scheduler) else ""
        if kind != "postgresql" and ring.found() is not None:
            bell = "ring"
        cases += [Case(kind, bell)] if bell else []
        cases.append(Case(kind, ""))
        cases.append(Case(kind, "", busy=True))
    steps = [Step(case.system, partial(_run, bench, case)) for case in cases]
    about = (
        f"One row at a time into {WORKERS} workers, {bench.options.probes} rows: from the return of COMMIT to the "
        "handler's first line, both on CLOCK_MONOTONIC. The pause before each row is random, so that it meets a poll "
        f"at any point. Busy: {bench.options.busy_rate:g} other rows a second keep flowing, which do nothing."
    )
    yield Plan(steps, cases[0].system, about)


def _run(bench: Bench, case: Case) -> Mapping[str, float]:
    count = counts.Counts()
    bench.rig.redis.flush()
    with bench.rig.database(case.kind) as database, tables.engine_of(database) as engine:
        tables.make(database)
        ours.init(bench, database, *(["--notify"] if case.bell == "notify" else []))
        bench.rig.settle(database)
        ringer = ring.ringer(engine, database, bench.rig.redis.url) if case.bell == "ring" else None
        line = ours.command(bench, *ours.run_line("stamp", WORKERS))
        env = ours.env(bench, database, count)
        with trees.running([line], env, ours.INSIDE) as tree, _others(bench, case, database):
            waits = list(_probe(bench, engine, count, ringer))
            drowned = waits[-1:] == [PATIENCE * 1000]
            bench.check(case.busy or not drowned, f"{case.system}: a row hasn't begun\n{tree.output[-2000:]}")
    waits.sort()
    return {
        "ms, p50": statistics.median(waits),
        "ms, p99": waits[min(len(waits) - 1, int(len(waits) * 0.99))],
        "ms, most": waits[-1],
        **({"probes until it drowned": len(waits)} if drowned else {}),
    }


def _probe(
    bench: Bench, engine: sqlalchemy.Engine, count: counts.Counts, ringer: Callable[[], None] | None
) -> Iterator[float]:
    chance = random.Random(7)
    insert = text("INSERT INTO jobs (payload) VALUES ('a probe')")
    with engine.connect() as connection:
        for number in range(WARM_UP + bench.options.probes):
            row = _insert(connection, insert)
            committed = time.monotonic_ns()
            if ringer is not None:
                ringer()
            began = _wait_for(count, row)
            if began is None:
                yield PATIENCE * 1000
                return
            if number >= WARM_UP:
                yield (began - committed) / 1e6
            time.sleep(chance.uniform(0.1, 0.6))


def _insert(connection: sqlalchemy.Connection, insert: sqlalchemy.TextClause) -> int:
    if connection.dialect.name == "postgresql":
        row = connection.execute(text(f"{insert.text} RETURNING id")).scalar_one()
    else:
        row = connection.execute(insert).lastrowid
    connection.commit()
    return int(row)


def _wait_for(count: counts.Counts, row: int) -> int | None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (began := count.stamp_of(row)) is not None:
            return began
        time.sleep(0.002)
    return None


@contextmanager
def _others(bench: Bench, case: Case, database: servers.Database) -> Iterator[None]:
    if not case.busy:
        yield
        return
    over = threading.Event()

    def feed() -> None:
        insert = text("INSERT INTO jobs (payload) VALUES ('another')")
        with tables.engine_of(database) as engine, engine.connect() as connection:
            due = time.monotonic()
            while not over.is_set():
                connection.execute(insert)
                connection.commit()
                due += 1 / bench.options.busy_rate
                over.wait(max(0.0, due - time.monotonic()))

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield
    finally:
        over.set()
        feeder.join(5)
