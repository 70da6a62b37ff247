"""Several schedulers on one database: do they add up, and do they share?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from bench import counts, ours, tables, trees
from bench.plan import Bench, Plan, Step

PATIENCE = 60.0
RESERVE = 30_000  # rows a second: so many are there that no table runs out
FAIR = 20  # %
LONG = 10.0  # seconds: over fewer a share says nothing


@contextmanager
def scaling(bench: Bench) -> Iterator[Plan]:
    """One scheduler, and two on the same rows."""
    steps = [
        Step("1 scheduler of 2 workers", partial(_scale, bench, 1)),
        Step("2 schedulers of 2 workers", partial(_scale, bench, 2)),
    ]
    about = f"{bench.options.rows:,} no-op rows of one table on PostgreSQL, from the start to the last durable end."
    yield Plan(steps, steps[0].system, about)


def _scale(bench: Bench, schedulers: int) -> Mapping[str, float]:
    rows = bench.options.rows
    with bench.rig.database("postgresql") as database:
        tables.make(database)
        ours.init(bench, database)
        tables.fill(database, rows)
        tables.analyze(database)
        line = ours.command(bench, *ours.run_line("noop", 2, "--burst"))
        drained = ours.drain(bench, database, [line] * schedulers, ready=rows)
    return {"rows/s": drained.rate, "seconds to the last end": drained.seconds}


@contextmanager
def fairness(bench: Bench) -> Iterator[Plan]:
    """Two tables, each with a scheduler of one worker, on one database, one Redis and one machine."""
    about = (
        f"Two tables in one PostgreSQL database, one Redis, a scheduler of 1 worker for each, no-op rows, "
        f"{bench.options.fair_seconds:g} s while both have ready rows. Half each would be even; up to {FAIR} % from "
        "that is taken for fair."
    )
    step = Step("2 tables", partial(_share, bench))
    yield Plan([step], step.system, about)


def _share(bench: Bench) -> Mapping[str, float]:
    count = counts.Counts()
    bench.rig.redis.flush()
    names = ("left_jobs", "right_jobs")
    with bench.rig.database("postgresql") as database:
        for name in names:
            tables.make(database, name)
            ours.init(bench, database, "--table", name)
            tables.fill(database, int(bench.options.fair_seconds * RESERVE), name)
            tables.analyze(database, name)
        bench.rig.settle(database)
        lines = [ours.command(bench, *ours.run_line("noop", 1, "--table", name)) for name in names]

        def done() -> list[int]:
            return [tables.by_state(database, name).get("Done", 0) for name in names]

        with trees.running(lines, ours.env(bench, database, count), ours.INSIDE) as tree:
            bench.check(
                tree.wait(PATIENCE, until=lambda: min(done()) > 0, every=0.2), f"fairness: {tree.output[-2000:]}"
            )
            before, began = done(), time.monotonic()
            time.sleep(bench.options.fair_seconds)
            after, seconds = done(), time.monotonic() - began
            left = [tables.by_state(database, name).get("Pending", 0) for name in names]
    one, two = (late - early for early, late in zip(before, after, strict=True))
    share = 100 * one / (one + two) if one + two else float("nan")
    if bench.options.fair_seconds >= LONG:
        bench.check(min(left) > 0, f"fairness: a table ran out of ready rows: {dict(zip(names, left, strict=True))}")
        bench.check(abs(share - 50) <= FAIR / 2, f"fairness: {one} and {two} rows, a share of {share:.0f} %")
    return {"% for the first table": share, "rows/s of both": (one + two) / seconds}
