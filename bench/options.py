"""The command line of scripts/bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.peers import PEERS
from bench.peers.running import default_folder

QUICK = {
    "rounds": 1,
    "workloads": "noop,mixed,latency,growth,idle,scaling,fairness,bulk,operator",
    "rows": 20,
    "spaced_rows": 20,
    "probes": 3,
    "done": [10, 100],
    "growth_rows": 10,
    "idle_seconds": 0.5,
    "fair_seconds": 0.5,
    "bulk_rows": 20,
    "table_rows": 100,
    "busy_rate": 2.0,
    "max_seconds": 20.0,
    "databases": "postgresql",
    "peers": "none",
}


def parser(workloads: Sequence[str]) -> argparse.ArgumentParser:
    """All options; the defaults are those of a record."""
    found = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the scheduler, and others beside it, on private servers. docs/performance.md explains it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--workloads", default="all", help=f"all, or some by commas: {', '.join(workloads)}")
    add("--peers", default="none", help=f"none, all, or some by commas: {', '.join(PEERS)}")
    add("--databases", default="postgresql,sqlite,mariadb", help="on which ours runs")
    add("--rounds", type=int, default=3, help="each system's turns; at least 3 for a record")
    add("--max-seconds", type=float, default=120.0, help="a run is cut off then, its rate is of what it did")
    add("--rest", type=float, default=0.0, help="seconds of rest before each step, where work slows the machine down")
    add("--rows", type=int, default=200_000, help="noop and scaling: ready rows; of a peer at most so many")
    add("--spaced-rows", type=int, default=20_000, help="1ms: rows; 50ms and mixed take a twentieth of that")
    add("--spin", action="store_true", help="handlers burn their time instead of sleeping")
    add("--probes", type=int, default=200, help="latency: rows, each inserted alone")
    add("--busy-rate", type=float, default=50.0, help="latency while busy: other rows a second")
    add("--done", type=int, nargs=2, default=[1_000, 10_000_000], metavar="ROWS", help="growth: Done rows beside")
    add("--growth-rows", type=int, default=50_000, help="growth: ready rows in each round")
    add("--idle-seconds", type=float, default=60.0, help="idle: how long to look; 300 for a record, 10 at least")
    add("--fair-seconds", type=float, default=20.0, help="fairness: how long both tables are served")
    add("--bulk-rows", type=int, default=1_000_000, help="bulk: rows inserted at once")
    add("--table-rows", type=int, default=1_000_000, help="operator: rows of the table that is looked at")
    add("--most-jobs", type=int, default=2_000, help="bulk: more RQ jobs than these waiting in Redis are wrong")
    add("--out", type=Path, help="folder for results.md, results.json and the plots (default: a temporary one)")
    add("--venvs", type=Path, default=default_folder(), help="folder of the peers' virtual environments")
    add("--scheduler", help="another scheduler command to measure (default: the one in .venv)")
    add("--quick", action="store_true", help="under a minute, tiny: only to see that all of it works")
    return found


def parse(workloads: Sequence[str], arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; --quick changes defaults only."""
    one = parser(workloads)
    if one.parse_known_args(arguments)[0].quick:
        one.set_defaults(**QUICK)
    options = one.parse_args(arguments)
    options.databases = [word.strip() for word in options.databases.split(",")]
    names = list(workloads) if options.workloads == "all" else [word.strip() for word in options.workloads.split(",")]
    if unknown := [name for name in names if name not in workloads]:
        one.error(f"no workload {', '.join(unknown)}; there are {', '.join(workloads)}")
    options.workloads = names
    if options.rounds < 1:
        one.error("--rounds must be 1 or more")
    return options
