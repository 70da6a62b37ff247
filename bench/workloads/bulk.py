"""Very many rows at once: end to end, and what grows meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from bench import counts, ours, plot, report, tables, trees
from bench.plan import OURS, Bench, Plan, Step

WORKERS = 2
PATIENCE = 60.0
EVERY = 0.5  # seconds between looks
LONGER = 5  # times --max-seconds
SERIES = ("rows run", "MB PSS of the scheduler", "MB of Redis", "keys in Redis", "RQ jobs that wait")


@contextmanager
def bulk(bench: Bench) -> Iterator[Plan]:
    """One INSERT into an idle scheduler on PostgreSQL."""
    rounds = iter(range(1, bench.options.rounds + 1))
    step = Step(OURS, lambda: _run(bench, next(rounds)))
    about = (
        f"{bench.options.bulk_rows:,} no-op rows, inserted by one statement while a scheduler of {WORKERS} workers "
        "waits for them; from the start of the INSERT to the last durable end. Sizes are looked at every "
        f"{EVERY:g} s, and drawn over time for the first round."
    )
    yield Plan([step], step.system, about)


def _run(bench: Bench, number: int) -> Mapping[str, float]:
    rows, count = bench.options.bulk_rows, counts.Counts()
    bench.rig.redis.flush()
    with bench.rig.database("postgresql") as database:
        tables.make(database)
        ours.init(bench, database)
        tables.fill(database, WORKERS)
        line = ours.command(bench, *ours.run_line("noop", WORKERS))
        with trees.running([line], ours.env(bench, database, count), ours.INSIDE) as tree:
            ready = tree.wait(PATIENCE, until=partial(_ran, count, WORKERS))
            bench.check(ready, f"bulk: its first rows didn't run\n{tree.output[-2000:]}")
            time.sleep(1.0)
            looks: list[tuple[float, ...]] = []
            began, started = time.monotonic(), time.time()
            tables.fill(database, rows)
            inserted = time.monotonic() - began
            end = began + bench.options.max_seconds * LONGER
            while not looks or (looks[-1][1] < rows and time.monotonic() < end):
                sizes = bench.rig.redis.sizes()
                ran = count.read().runs - WORKERS
                at = time.monotonic() - began
                looks.append((at, ran, tree.usage().pss, sizes["MB"], sizes["keys"], sizes["waiting"]))
                time.sleep(EVERY)
            whole = looks[-1][1] >= rows
            if whole:
                tree.wait(PATIENCE, until=lambda: tables.by_state(database).get("Done", 0) >= rows + WORKERS, every=0.5)
            quiet = tree.usage().pss
            tree.stop()
        book, runs = tables.ledger(database), count.read()
    if whole:
        bench.check(book.done == rows + WORKERS, f"bulk: the ledger has {book.done} done of {rows + WORKERS}")
        bench.check(runs.runs == rows + WORKERS, f"bulk: handlers counted {runs.runs} runs of {rows + WORKERS}")
    columns = list(zip(*looks, strict=True))
    most = dict(zip(SERIES, map(max, columns[1:]), strict=True))
    waiting = most["RQ jobs that wait"]
    bench.check(waiting <= bench.options.most_jobs, f"bulk: {waiting:.0f} RQ jobs waited in Redis")
    if number == 1:
        series = dict(zip(SERIES, columns[1:], strict=True))
        picture = plot.lines(f"bulk: {rows:,} rows at once", columns[0], series, report.number)
        (bench.out / "bulk-sizes.svg").write_text(picture, encoding="utf-8")
    seconds = (book.last or time.time()) - started
    return {
        "rows/s": (book.done - WORKERS) / seconds,
        "seconds to the last end": seconds,
        "seconds of the INSERT": inserted,
        "rows": book.done - WORKERS,
        **{f"{name}, at most": value for name, value in most.items() if name != "rows run"},
        "MB PSS of the scheduler, at the end": quiet,
    }


def _ran(count: counts.Counts, rows: int) -> bool:
    return count.read().runs >= rows
