"""nih-sched, through its command line only, so that any version of it can be measured."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import servers

from bench import counts, tables, trees
from bench.plan import Bench

INSIDE = Path("/")


@functools.cache
def scheduler(path: str | None = None) -> tuple[str, ...]:
    """The command: the one beside this Python, or the one named."""
    beside = Path(path) if path else Path(sys.executable).parent / "scheduler"
    return (str(beside),) if path or beside.exists() else (sys.executable, "-m", "nih_sched")


def command(bench: Bench, *words: str) -> list[str]:
    """A `scheduler …` command."""
    return [*scheduler(bench.options.scheduler), *words]


def env(bench: Bench, database: servers.Database, count: counts.Counts) -> Mapping[str, str]:
    """Where its servers are."""
    return {**count.env, "DATABASE_URL": database.url, "REDIS_URL": bench.rig.redis.url}


@functools.cache
def can_ring(path: str | None, option: str = "--notify") -> bool:
    """Whether `scheduler init` has this option."""
    return option in trees.run([*scheduler(path), "init", "--help"], {}, INSIDE)


def init(bench: Bench, database: servers.Database, *words: str) -> None:
    """Our tables, and the index that is recommended."""
    trees.run(command(bench, "init", "--create-index", *words), {"DATABASE_URL": database.url}, INSIDE)


def run_line(handler: str, workers: int, *words: str) -> list[str]:
    """`scheduler run` with a handler of bench_work."""
    return ["run", "--job", f"bench_work:{handler}", "--max-concurrent-jobs", str(workers), "--quiet", *words]


@dataclass(frozen=True)
class Drained:
    """What it took to run all ready rows."""

    rows: int  # that were done
    seconds: float  # from the start of the command to the last finish
    exited: float  # to its exit
    runs: counts.Runs
    cpu: float  # seconds, of the command's tree
    server_cpu: float  # meanwhile, of the database's server and Redis
    whole: bool  # whether all were done; otherwise it was cut off

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds if self.seconds > 0 else 0.0


def drain(
    bench: Bench,
    database: servers.Database,
    commands: Sequence[Sequence[str]],
    *,
    before: int = 0,
    ready: int,
) -> Drained:
    """Run `scheduler run --burst` (or several commands) until nothing is left, or for --max-seconds; check all.

    The end is the last finish that the ledger knows, by the database's clock, which is this machine's.
    `ready` rows are ready now; `before` attempts are in the ledger already.
    """
    count = counts.Counts(spin=bench.options.spin)
    bench.rig.redis.flush()
    bench.rig.settle(database)
    server_cpu = bench.rig.cpu(database.name)
    with trees.running(commands, env(bench, database, count), INSIDE) as tree:
        whole = tree.wait(bench.options.max_seconds)
        spent = tree.stop()
        output = tree.output
    server_cpu = bench.rig.cpu(database.name) - server_cpu
    book = tables.ledger(database)
    runs = count.read()
    done = book.done - before
    what = f"{' '.join(commands[0][1:])} on {database.name}"
    if whole:
        bench.check(spent.codes == (0,) * len(commands), f"{what}: exit codes {spent.codes}\n{output[-2000:]}")
        bench.check(done == ready, f"{what}: {ready} rows were ready, the ledger has {done} done")
        bench.check(runs.runs == ready, f"{what}: {ready} rows were ready, handlers counted {runs.runs} runs")
        bench.check(book.other == 0, f"{what}: {book.other} attempts aren't done, or have no times")
    bench.check(done <= runs.runs, f"{what}: the ledger has {done} done, handlers counted {runs.runs} runs")
    bench.check(done > 0, f"{what}: no row was done\n{output[-2000:]}")
    seconds = float("nan") if book.last is None else book.last - spent.started
    return Drained(done, seconds, spent.seconds, runs, spent.cpu, server_cpu, whole)
