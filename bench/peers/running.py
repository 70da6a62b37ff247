"""Peers' own virtual environments, and their runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import servers
import sqlalchemy

from bench import counts, tables, trees
from bench.peers import APPS, Peer
from bench.plan import Bench

SETTLE = 15.0  # seconds for the last ends to be written, once all handlers have run
FIRST = 300  # jobs of the first try, by which the others are measured out
SECONDS = 15.0  # about so long shall a run take


def default_folder() -> Path:
    """Where the environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nih-sched-bench"


@dataclass(frozen=True)
class Environment:
    """A peer, installed."""

    peer: Peer
    folder: Path
    version: str

    def fill_in(self, word: str, redis_url: str) -> str:
        """A word of a command."""
        bin_ = self.folder / "bin"
        return word.format(python=bin_ / "python", bin=bin_, app=APPS / self.peer.app, redis=redis_url)


def install(peer: Peer, folder: Path) -> Environment:
    """Make its virtual environment, if it isn't there as it should be."""
    place = folder / re.sub(r"\W", "_", peer.name)
    stamp, wanted = place / "requires", "\n".join(peer.requires)
    python = place / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {peer.name} in {place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        subprocess.run([*map(str, pip), *peer.requires], check=True, stderr=subprocess.PIPE)
        stamp.write_text(wanted)
    name = re.split(r"[\[<>=]", peer.requires[0])[0]
    query = f"import importlib.metadata as m; print(m.version({name!r}))"
    version = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    return Environment(peer, place, version)


@dataclass(frozen=True)
class Ran:
    """What a peer did."""

    jobs: int
    seconds: float  # from its start to its last end
    runs: counts.Runs
    cpu: float
    whole: bool


def run(bench: Bench, environment: Environment, jobs: int, max_seconds: float) -> Ran:
    """Make so many jobs, run them all (or so long), stop it, and check."""
    peer = environment.peer
    count = counts.Counts(spin=bench.options.spin)
    bench.rig.redis.flush()
    with bench.rig.database("postgresql") as database:
        env = _env(bench, count, database, environment)
        app = str(APPS / peer.app)
        trees.run([str(environment.folder / "bin" / "python"), app, "fill", str(jobs)], env, APPS)
        tables.analyze(database, "")
        bench.rig.settle(database)
        with trees.running(_workers(bench, environment), env, APPS) as tree:
            tree.wait(max_seconds, until=lambda: count.read().runs >= jobs)
            whole = count.read().runs >= jobs
            if whole:
                _wait_for_ends(peer, database, jobs)
            output = tree.output
            try:
                spent = tree.stop()
            except RuntimeError as error:
                bench.check(False, f"{peer.name}: {error}")
                raise
        runs = count.read()
        if peer.ended is not None:
            ended, last = tables.ended(database, peer.ended)
        else:  # to its favour: its last job has run, and nobody knows when that was acknowledged
            ended, last = runs.runs, spent.started + (runs.last_ns - spent.started_ns) / 1e9
    if whole:
        bench.check(runs.runs == jobs, f"{peer.name}: {jobs} jobs, handlers counted {runs.runs} runs")
        bench.check(ended == jobs, f"{peer.name}: {jobs} jobs, it says that {ended} ended well")
    bench.check(ended > 0, f"{peer.name}: no job ended\n{output[-2000:]}")
    return Ran(ended, (last or time.time()) - spent.started, runs, spent.cpu, whole)


def probe(bench: Bench, environment: Environment, probes: int) -> tuple[list[float], str]:
    """Send so many jobs one by one to its idle workers: milliseconds until each began, and what the workers wrote."""
    count = counts.Counts()
    bench.rig.redis.flush()
    with bench.rig.database("postgresql") as database:
        env = {**_env(bench, count, database, environment), "BENCH_STAMPED": "1"}
        line = [str(environment.folder / "bin" / "python"), str(APPS / environment.peer.app)]
        trees.run([*line, "fill", "0"], env, APPS)
        bench.rig.settle(database)
        with trees.running(_workers(bench, environment), env, APPS) as tree:
            printed = trees.run([*line, "probe", str(probes)], env, APPS, timeout=60 + 2 * probes)
            return json.loads(printed.splitlines()[-1]), tree.output


def _workers(bench: Bench, environment: Environment) -> list[list[str]]:
    lines = environment.peer.workers
    return [[environment.fill_in(word, bench.rig.redis.url) for word in line] for line in lines]


def size(bench: Bench, environment: Environment) -> int:
    """How many jobs make a run of about 15 s, by a short try that isn't counted."""
    most, seconds = int(bench.options.rows), min(SECONDS, float(bench.options.max_seconds))
    first = min(FIRST, most)
    ran = run(bench, environment, first, bench.options.max_seconds)
    rate: float = ran.runs.runs / ran.runs.span if ran.runs.runs > 1 and ran.runs.span > 0 else 1.0
    if first < most and rate > 2 * FIRST:  # it took less than half a second, which says little
        ran = run(bench, environment, min(10 * FIRST, most), bench.options.max_seconds)
        rate = ran.runs.runs / ran.runs.span
    return max(min(most, round(rate * seconds)), min(most, 20))


def _env(bench: Bench, count: counts.Counts, database: servers.Database, environment: Environment) -> Mapping[str, str]:
    url = sqlalchemy.make_url(database.url)
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return {
        **count.env,
        "PYTHONPATH": os.pathsep.join([count.env["PYTHONPATH"], str(APPS)]),
        "PATH": os.pathsep.join([str(environment.folder / "bin"), os.environ["PATH"]]),
        "DATABASE_URL": database.url,
        "DATABASE_DSN": dsn,
        "REDIS_URL": bench.rig.redis.url,
        "PYTHONDONTWRITEBYTECODE": "",
    }


def _wait_for_ends(peer: Peer, database: servers.Database, jobs: int) -> None:
    if peer.ended is None:
        return
    end = time.monotonic() + SETTLE
    while tables.ended(database, peer.ended)[0] < jobs and time.monotonic() < end:
        time.sleep(0.2)
