"""Rows that do nothing: what the way of a row costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from bench import ours, peers, tables
from bench.peers import running
from bench.plan import NAMES, OURS, Bench, Plan, Step

WORKERS = 2
CUT_OFF = "rows done when it was cut off"


@contextmanager
def noop(bench: Bench) -> Iterator[Plan]:
    """Ours on each database, then the peers."""
    steps, notes = [], {}
    for kind in bench.options.databases:
        if not bench.rig.has(kind):
            continue
        system = OURS.replace("PostgreSQL", NAMES[kind])
        steps.append(Step(system, partial(_ours, bench, kind)))
        notes[system] = f"{bench.options.rows:,} rows; durable: each row's state, each attempt in the ledger"
    for peer in peers.chosen(bench.options.peers):
        environment = running.install(peer, bench.options.venvs)
        jobs = running.size(bench, environment)
        system = f"{peer.name} {environment.version}"
        steps.append(Step(system, partial(_peer, bench, environment, jobs)))
        notes[system] = f"{jobs:,} jobs; {peer.settings}; durable: {peer.durable}"
    about = (
        f"Ready rows that do nothing, {WORKERS} worker processes, from the command's start to the last durable end: "
        "the workers' start is in it. Handlers count themselves; every row's end is checked."
    )
    yield Plan(steps, OURS, about, notes)


def _ours(bench: Bench, kind: str) -> Mapping[str, float]:
    rows = bench.options.rows
    with bench.rig.database(kind) as database:
        tables.make(database)
        ours.init(bench, database)
        tables.fill(database, rows)
        tables.analyze(database)
        line = ours.command(bench, *ours.run_line("noop", WORKERS, "--burst"))
        drained = ours.drain(bench, database, [line], ready=rows)
        if drained.whole:
            states = tables.by_state(database)
            bench.check(states == {"Done": rows}, f"noop on {kind}: rows by state {states}, not {rows} Done")
    return {
        "rows/s": drained.rate,
        "seconds to the last end": drained.seconds,
        "seconds to the exit": drained.exited,
        **({} if drained.whole else {CUT_OFF: drained.rows}),
    }


def _peer(bench: Bench, environment: running.Environment, jobs: int) -> Mapping[str, float]:
    ran = running.run(bench, environment, jobs, bench.options.max_seconds)
    cut_off = {} if ran.whole else {CUT_OFF: ran.jobs}
    return {"rows/s": ran.jobs / ran.seconds, "seconds to the last end": ran.seconds, **cut_off}
