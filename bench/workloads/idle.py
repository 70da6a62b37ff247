"""What waiting costs: an idle scheduler's CPU time, its look-ups, its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import servers
import sqlalchemy

from bench import counts, ours, tables, trees
from bench.plan import Bench, Plan, Step

CALM = 10.0  # seconds after the first rows until it counts as idle: for 5 it looks for more as often as while they come
FIRST = 10  # rows, so that every worker has had one
PATIENCE = 60.0


@contextmanager
def idle(bench: Bench) -> Iterator[Plan]:
    """1 and 5 workers on PostgreSQL, with its bell if this version has one."""
    measures = bench.options.idle_seconds >= CALM  # else it is only to be seen that it works
    bells = ["", "--notify"] if measures and ours.can_ring(bench.options.scheduler) else [""]
    steps = []
    for bell in bells:
        pss: dict[int, float] = {}
        for workers in (1, 5):
            system = f"{workers} worker{'s' if workers > 1 else ''}{', init ' + bell if bell else ''}"
            steps.append(Step(system, partial(_run, bench, workers, bell, pss)))
    about = (
        f"A scheduler on PostgreSQL that has run {FIRST} rows and then sees none for {bench.options.idle_seconds:g} s. "
        "CPU: % of one core. Transactions: as the database counts them, in a database that nobody else uses. PSS: all "
        "memory, shared pages divided among those that share them."
    )
    yield Plan(steps, steps[0].system, about, rotate=False)


def _run(bench: Bench, workers: int, bell: str, pss: dict[int, float]) -> Mapping[str, float]:
    count = counts.Counts()
    bench.rig.redis.flush()
    with bench.rig.database("postgresql") as database:
        tables.make(database)
        ours.init(bench, database, *([bell] if bell else []))
        tables.fill(database, FIRST)
        line = ours.command(bench, *ours.run_line("take_50ms", workers))
        with trees.running([line], ours.env(bench, database, count), ours.INSIDE) as tree:
            ran = tree.wait(PATIENCE, until=lambda: count.read().runs >= FIRST)
            bench.check(ran, f"idle, {workers} workers: its first rows didn't run\n{tree.output[-2000:]}")
            time.sleep(min(CALM, bench.options.idle_seconds))
            before, server, commits, began = (
                tree.usage(),
                bench.rig.cpu("postgresql"),
                transactions(bench, database),
                time.monotonic(),
            )
            time.sleep(bench.options.idle_seconds)
            seconds = time.monotonic() - began
            after = tree.usage()
            server = bench.rig.cpu("postgresql") - server
            commits = transactions(bench, database) - commits
    pss[workers] = after.pss
    found = {
        "CPU %": 100 * (after.cpu - before.cpu) / seconds,
        "CPU %, database and Redis": 100 * server / seconds,
        "transactions/s": commits / seconds,
        "MB PSS": after.pss,
        "processes": after.count,
    }
    if workers == 5 and 1 in pss:
        found["MB PSS for each further worker"] = (pss[5] - pss[1]) / 4
    return found


def transactions(bench: Bench, database: servers.Database) -> int:
    """Committed and rolled back ones in this database, asked from another."""
    name = sqlalchemy.make_url(database.url).database
    query = f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{name}'"
    return int(bench.rig.postgresql.sql(query)[0][0])
