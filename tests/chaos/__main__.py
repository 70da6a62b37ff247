"""scripts/chaos: plan, run, check."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from chaos import check, plan
from chaos.rig import Broken, Options, started

USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0 clean, 1 a promise was broken, 2 a mistake in usage, or the rig doesn't work."""
    options = _options(arguments)
    workers = options.schedulers * options.workers
    planned = plan.make(options.seed, options.seconds, options.kinds, lease=options.lease, workers=workers)
    _say(f"seed {planned.seed}, {planned.seconds:g} s on {options.database}, plan {planned.digest}:")
    _say(f"{len(planned.rows)} rows; {len(planned.faults)} faults: {' '.join(fault.kind for fault in planned.faults)}")
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="nih-sched-chaos-"))).resolve()
    how = Options(options.database, options.lease, options.schedulers, options.workers, options.preload, folder)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(USAGE))  # so that the servers are ended
    clean = False
    try:
        with started(how, _say) as rig:
            rig.run(planned)
            verdict = check.check(folder, rig.url)
        _say("\n".join(verdict.lines[:-1]))
        _say(f"tracebacks in the schedulers' logs: {_tracebacks(folder)}")
        _say(verdict.lines[-1])
        clean = not verdict.breaches
    except (Broken, pytest.skip.Exception, pytest.fail.Exception) as error:
        _say(str(error))
        return USAGE
    finally:
        if clean and options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            _say(f"files: {folder}")
    return 0 if clean else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Run schedulers under seeded faults; check that no row is lost, run twice at once, or stuck.",
        epilog="Exit codes: 0 clean, 1 a promise was broken, 2 a mistake in usage, or the rig doesn't work.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=random.randrange(10000), help="the same seed plans the same run; by default any")
    add("--seconds", type=float, default=60.0, help="how long faults go on (60)")
    add("--database", choices=plan.DATABASES, default="postgresql", help="(postgresql)")
    add("--faults", default="all", metavar="KINDS", help=f"by commas (all): {', '.join(plan.ALL_KINDS)}")
    add("--lease", type=float, default=10.0, help="the schedulers' --lease (10)")
    add("--schedulers", type=int, default=3, help="how many process trees (3)")
    add("--workers", type=int, default=2, help="workers of each (2)")
    add("--keep", type=Path, metavar="DIR", help="an empty folder for all files; by default kept after a breach only")
    add(
        "--preload",
        metavar="MODULE:FUNCTION",
        help="each scheduler's --preload, looked for in tests/ and on PYTHONPATH: breaks a fence, to see it seen",
    )
    options = parser.parse_args(arguments)
    possible = plan.kinds_for(options.database)
    options.kinds = possible if options.faults == "all" else tuple(filter(None, options.faults.split(",")))
    if wrong := [kind for kind in options.kinds if kind not in possible]:
        parser.error(f"{options.database} has no faults {', '.join(wrong)}; it has {', '.join(possible)}")
    if options.schedulers < 1 or options.workers < 1 or options.seconds <= 0:
        parser.error("--schedulers, --workers and --seconds must be more than 0")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        if any(options.keep.iterdir()):
            parser.error(f"{options.keep} isn't empty")
    return options


def _tracebacks(folder: Path) -> int:
    return sum(path.read_text(errors="replace").count("Traceback (most") for path in folder.glob("tree-*.log"))


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main())
