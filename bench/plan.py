"""What a workload is: systems that are measured in turn, and the figures that come out."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.rig import Rig

OURS = "nih-sched, PostgreSQL"
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}


@dataclass
class Bench:
    """A run of the benchmark."""

    options: argparse.Namespace
    rig: Rig
    out: Path
    problems: list[str] = field(default_factory=list)  # whatever was not as it must be: exit code 1

    def check(self, holds: bool, what: str) -> None:
        """Note a problem."""
        if not holds:
            self.problems.append(what)
            print(f"WRONG: {what}", flush=True)


@dataclass(frozen=True)
class Step:
    """One system's turn in each round."""

    system: str
    run: Callable[[], Mapping[str, float]]  # metric → value; the metric's name carries its unit


@dataclass(frozen=True)
class Plan:
    """A workload, set up."""

    steps: Sequence[Step]
    baseline: str  # the system that the ratios are to
    about: str
    notes: Mapping[str, str] = field(default_factory=dict)  # system → what to know of it
    rotate: bool = True  # whether each round begins with another system


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    workload: str
    round: int
    system: str
    metric: str
    value: float


Workload = Callable[[Bench], AbstractContextManager[Plan]]


def measure(bench: Bench, name: str, plan: Plan) -> Iterator[Figure]:
    """Every system in turn, round after round."""
    for number in range(bench.options.rounds):
        turn = number % len(plan.steps) if plan.rotate else 0
        for step in [*plan.steps[turn:], *plan.steps[:turn]]:
            time.sleep(bench.options.rest)
            try:
                found = step.run()
            except Exception as error:  # a loop's top
                traceback.print_exc()
                bench.check(False, f"{name}, {step.system}: {error}")
                continue
            for metric, value in found.items():
                print(f"  {name} round {number + 1} · {step.system} · {metric}: {value:,.4g}", flush=True)
                yield Figure(name, number + 1, step.system, metric, value)
