"""One run: workload after workload, in each the systems in turn, round after round."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import servers

from bench import options as options_
from bench import ours, peers, plan, report, trees, usage
from bench.rig import Rig, filesystem
from bench.workloads import WORKLOADS


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all was measured, 1 something was wrong, 2 a mistake in usage."""
    options = options_.parse(list(WORKLOADS), arguments)
    try:
        peers.chosen(options.peers)
    except ValueError as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        return 2
    for name in list(os.environ):  # no setting of the developer's, and not what led Python to this package
        if name.startswith("NIH_SCHED_") or name in ("DATABASE_URL", "REDIS_URL", "WEB_CONCURRENCY", "PYTHONPATH"):
            del os.environ[name]
    out = options.out or Path(tempfile.mkdtemp(prefix="nih-sched-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    bench = plan.Bench(options, Rig(), out)
    began = time.monotonic()
    sections: list[report.Section] = []
    try:
        facts = report.machine() | {
            "nih-sched": trees.run([*ours.scheduler(options.scheduler), "--version"], {}, ours.INSIDE).strip(),
            "files": f"{filesystem(servers.base())} under {servers.base().parent}",
            "load at the start": usage.load(),
        }
        for fact, value in facts.items():
            print(f"{fact}: {value}", flush=True)
        for name in options.workloads:
            section = one(bench, name)
            if section is not None:
                sections.append(section)
                facts |= bench.rig.versions() | {"took": f"{time.monotonic() - began:,.0f} s"}
                report.write(out, sections, facts, bench.problems)  # so that a run that breaks off leaves what it has
        print(f"\n{report.write(out, sections, facts, bench.problems)}\nwritten to {out}/results.md")
    finally:
        servers.finish()
    return 1 if bench.problems else 0


def one(bench: plan.Bench, name: str) -> report.Section | None:
    """Measure a workload; what it can't is a problem, and the others go on."""
    before = usage.load()
    print(f"\n{name}: {before}", flush=True)
    section: report.Section | None = None
    try:
        with WORKLOADS[name](bench) as this:
            section = report.Section(name, this, [])
            section.figures.extend(plan.measure(bench, name, this))
    except Exception as error:  # a loop's top
        traceback.print_exc()
        bench.check(False, f"{name}: {error}")
    if section is None or not section.figures:
        return None
    section.loads = (before, usage.load())
    section.plots += [path.name for path in sorted(bench.out.glob(f"{name}-*.svg"))]
    report.bars(section, bench.out)
    return section


if __name__ == "__main__":
    sys.exit(main())
