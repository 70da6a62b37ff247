"""How soon a row runs: from the return of its INSERT's COMMIT to its handler's first line."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import servers
import sqlalchemy
from sqlalchemy import text

from bench import counts, ours, peers, ring, tables, trees
from bench.peers import running
from bench.plan import NAMES, Bench, Plan, Step
from bench.work.bench_work import PATIENCE, waits

WORKERS = 2


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
    """Each database, with its bell if this version has one, and without; then the peers."""
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
    notes = {}
    for peer in peers.chosen(bench.options.peers):
        environment = running.install(peer, bench.options.venvs)
        system = f"{peer.name} {environment.version}"
        steps.append(Step(system, partial(_peer, bench, environment)))
        notes[system] = f"{peer.settings}; durable: {peer.durable}"
    about = (
        f"One row at a time into {WORKERS} workers, {bench.options.probes} rows: from the return of COMMIT to the "
        "handler's first line, both on CLOCK_MONOTONIC. The pause before each row is random, so that it meets a poll "
        f"at any point. Busy: {bench.options.busy_rate:g} other rows a second keep flowing, which do nothing. Of a "
        "peer: from the return of its own call that sends a job, by a process that stays."
    )
    yield Plan(steps, cases[0].system, about, notes)


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
            found = _probe(bench, engine, count, ringer)
            drowned = _drowned(found)
            bench.check(case.busy or not drowned, f"{case.system}: a row hasn't begun\n{tree.output[-2000:]}")
    return _figures(found) | ({"probes until it drowned": len(found)} if drowned else {})


def _peer(bench: Bench, environment: running.Environment) -> Mapping[str, float]:
    found, output = running.probe(bench, environment, bench.options.probes)
    bench.check(not _drowned(found), f"{environment.peer.name}: a job hasn't begun\n{output[-2000:]}")
    return _figures(found)


def _drowned(found: Sequence[float]) -> bool:
    return found[-1] == PATIENCE * 1000


def _figures(found: Sequence[float]) -> Mapping[str, float]:
    ordered = sorted(found)
    return {
        "ms, p50": statistics.median(ordered),
        "ms, p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "ms, most": ordered[-1],
    }


def _probe(
    bench: Bench, engine: sqlalchemy.Engine, count: counts.Counts, ringer: Callable[[], None] | None
) -> list[float]:
    insert = text("INSERT INTO jobs (payload) VALUES ('a probe')")
    with engine.connect() as connection:

        def send() -> tuple[int, int]:
            row = _insert(connection, insert)
            committed = time.monotonic_ns()
            if ringer is not None:
                ringer()
            return row, committed

        return waits(count.stamps, send, bench.options.probes)


def _insert(connection: sqlalchemy.Connection, insert: sqlalchemy.TextClause) -> int:
    if connection.dialect.name == "postgresql":
        row = connection.execute(text(f"{insert.text} RETURNING id")).scalar_one()
    else:
        row = connection.execute(insert).lastrowid
    connection.commit()
    return int(row)


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
