"""Does a row cost more in a table that has grown? CPU seconds of everything that has a part in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import servers

from bench import ours, tables
from bench.plan import Bench, Plan, Step

WORKERS = 2


@contextmanager
def growth(bench: Bench) -> Iterator[Plan]:
    """Two tables on PostgreSQL, with few and with many Done rows; the same ready rows are added in each round."""
    with ExitStack() as stack:
        steps = []
        for done in bench.options.done:
            database = stack.enter_context(bench.rig.database("postgresql"))
            _fill(bench, database, done)
            steps.append(Step(f"{done:,} Done rows", partial(_run, bench, database, [done])))
        about = (
            f"{bench.options.growth_rows:,} no-op rows in each round, {WORKERS} workers, PostgreSQL, beside Done rows, "
            "each with its record in the ledger. CPU: of all processes: the scheduler's tree to its last child, the "
            "database's server with all that it does in the background, and Redis."
        )
        yield Plan(steps, steps[0].system, about)


def _fill(bench: Bench, database: servers.Database, done: int) -> None:
    tables.make(database)
    ours.init(bench, database)
    tables.fill(database, 1)
    ours.drain(bench, database, [ours.command(bench, *ours.run_line("noop", 1, "--burst"))], ready=1)
    tables.copy_attempts(database, done - 1)
    tables.fill(database, done - 1, state="Done")
    tables.analyze(database, "")


def _run(bench: Bench, database: servers.Database, before: list[int]) -> Mapping[str, float]:
    rows = bench.options.growth_rows
    tables.fill(database, rows)
    tables.analyze(database)
    line = ours.command(bench, *ours.run_line("noop", WORKERS, "--burst"))
    ready = tables.by_state(database).get("Pending", 0)
    drained = ours.drain(bench, database, [line], before=before[0], ready=ready)
    before[0] += drained.rows
    if drained.whole:
        states = tables.by_state(database)
        bench.check(states == {"Done": before[0]}, f"growth: rows by state {states}, not {before[0]} Done")
    cpu = drained.cpu + drained.server_cpu
    return {
        "CPU µs/row": 1e6 * cpu / drained.rows,
        "CPU µs/row, scheduler": 1e6 * drained.cpu / drained.rows,
        "CPU µs/row, database and Redis": 1e6 * drained.server_cpu / drained.rows,
        "rows/s": drained.rate,
    }
