"""Rows that take time: how much of the workers' time goes into them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from bench import ours, tables
from bench.plan import NAMES, OURS, Bench, Plan, Step

LENGTHS = (0, 1, 5, 50, 500)  # ms, of `mixed`
SEED = 11
_HOW = (
    "Counted from the first handler's start to the last one's end. Ideal: the sum of the rows' lengths, shared by the "
    "workers without a gap. Inside: the time that handlers really took, as a part of the workers' time; on a busy "
    "core a row takes a little longer than it says."
)


@contextmanager
def one_ms(bench: Bench) -> Iterator[Plan]:
    """1 ms each, 2 workers: 2,000/s would be ideal."""
    lengths = [1.0] * bench.options.spaced_rows
    yield _plan(bench, "take_1ms", 2, lengths, f"{len(lengths):,} rows of 1 ms, 2 workers; ideal: 2,000/s.")


@contextmanager
def fifty_ms(bench: Bench) -> Iterator[Plan]:
    """50 ms each, 4 workers: 80/s would be ideal."""
    lengths = [50.0] * _twentieth(bench)
    yield _plan(bench, "take_50ms", 4, lengths, f"{len(lengths):,} rows of 50 ms, 4 workers; ideal: 80/s.")


@contextmanager
def mixed(bench: Bench) -> Iterator[Plan]:
    """Lengths by chance, always the same ones."""
    lengths = [float(one) for one in random.Random(SEED).choices(LENGTHS, k=_twentieth(bench))]
    words = ", ".join(map(str, LENGTHS))
    about = (
        f"{len(lengths):,} rows of {words} ms, by chance with a fixed seed, 4 workers; sum {sum(lengths) / 1000:.1f} s."
    )
    yield _plan(bench, "take_its_own", 4, lengths, about)


def _twentieth(bench: Bench) -> int:
    return max(4, int(bench.options.spaced_rows) // 20)


def _plan(bench: Bench, handler: str, workers: int, lengths: Sequence[float], about: str) -> Plan:
    kinds = [kind for kind in bench.options.databases if bench.rig.has(kind)]
    steps = [
        Step(OURS.replace("PostgreSQL", NAMES[kind]), partial(_run, bench, kind, handler, workers, lengths))
        for kind in kinds
    ]
    sleeping = "Handlers burn their time." if bench.options.spin else "Handlers sleep."
    return Plan(steps, steps[0].system, f"{about} {sleeping} {_HOW}")


def _run(bench: Bench, kind: str, handler: str, workers: int, lengths: Sequence[float]) -> Mapping[str, float]:
    with bench.rig.database(kind) as database:
        tables.make(database, more="ms double precision")
        ours.init(bench, database)
        tables.fill_lengths(database, lengths)
        tables.analyze(database)
        line = ours.command(bench, *ours.run_line(handler, workers, "--burst"))
        drained = ours.drain(bench, database, [line], ready=len(lengths))
    runs = drained.runs
    asked = sum(lengths) / 1000 if drained.whole else runs.inside  # cut off, nobody knows which rows ran
    return {
        "% of the ideal": 100 * asked / workers / runs.span if runs.span else float("nan"),
        "% inside": 100 * runs.inside / workers / runs.span if runs.span else float("nan"),
        "rows/s": runs.runs / runs.span if runs.span else float("nan"),
    }
