"""The checker: reads the handlers' trace, the rig's journal and the user's table, and says whether the promises held.

    python -m chaos.check FOLDER [DATABASE-URL]     without an address: the table as it was read last

It shares no code with nih_sched, nor with what plans and injects.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, text

from chaos import explain, recovery
from chaos.evidence import CUT, Edit, Evidence, Fault, Run, read

FINAL = ("Done", "Failed", "Cancelled")
THAWED = 2.0  # seconds within which a thawed tree's horse must be stopped
LATE = 1.0  # seconds from a run's start in the ledger to its first line in the trace, at most
SHOWN = 15  # breaches of each sort


@dataclass(frozen=True)
class Breach:
    """A promise that didn't hold."""

    what: str
    words: str


@dataclass
class Verdict:
    """What was found."""

    breaches: list[Breach]
    lines: list[str]  # the report

    @property
    def counts(self) -> Counter[str]:
        """How many breaches of each sort."""
        return Counter(breach.what for breach in self.breaches)


def judge(evidence: Evidence) -> Verdict:
    """All checks, and the report."""
    again = explain.again(evidence)
    recoveries = recovery.measure(evidence)
    overlaps, frozen = overlapping(evidence)
    killers = [fault for fault in evidence.faults if fault.kind in (*explain.KILLS, "stop-tree", "sigterm-all")]
    hands = Counter(dict.fromkeys({fault.kind for fault in killers}, 0))
    for fault in killers:
        hands[fault.kind] += len(explain.hands(evidence, fault))
    by_faults = Counter(fault.kind for *_, fault in again if fault)
    breaches = [*rows(evidence), *overlaps, *_slow(evidence, recoveries.found), *_gave_up(evidence)]
    for before, run, why, _ in again:
        if why is None:
            words = f"row {run.key}: {_words(evidence, before)}; then {_words(evidence, run)}"
            breaches.append(Breach("unexplained re-run", words))
    if by_faults.total() > hands.total():
        words = f"{by_faults.total()} re-runs for faults, {hands.total()} rows in hand at kills"
        breaches.append(Breach("more re-runs than rows in hand", words))
    whys = Counter(why or "unexplained" for _, _, why, _ in again)
    return Verdict(breaches, _report(evidence, breaches, whys, hands, frozen, recoveries))


def rows(evidence: Evidence) -> Iterable[Breach]:
    """Each row's state against its runs and its owner's edits."""
    edits = evidence.edits
    for key in sorted(evidence.inserted.keys() | evidence.table.keys()):
        yield from _row(evidence, key, edits.get(key, []))


def _row(evidence: Evidence, key: int, edits: list[Edit]) -> Iterable[Breach]:
    row, runs = evidence.table.get(key), evidence.runs.get(key, [])
    deleted = next((edit for edit in edits if edit.op == "delete"), None)
    told = f"row {key}, {row.state if row else 'gone'}: {'; '.join(_words(evidence, run) for run in runs) or 'no run'}"
    if edits:
        told += " (" + ", ".join(f"{e.op} of {e.seen} at {e.begin - evidence.begin:.1f} s" for e in edits) + ")"
    yield from _after_edits(edits, runs, told)
    if row is None or deleted:
        if row is not None or not deleted:
            yield Breach("lost", told + (" but it is there" if row else " and nobody deleted it"))
        return
    if edits and row.note != edits[-1].tag:
        yield Breach("contradicts", f"{told}: its owner's {edits[-1].tag!r} has become {row.note!r}")
    said = [edit for edit in edits if edit.op in ("reset", "cancel")]
    if said and said[-1].op == "cancel":
        if row.state != "Cancelled":
            yield Breach("contradicts", f"{told}: its owner had cancelled it")
        return
    since = said[-1].begin if said else float("-inf")
    counted = [run for run in runs if run.start >= since]
    if row.state not in FINAL:
        yield Breach("stuck", told)
    elif row.state == "Done" and not any(run.how == "end" for run in counted):
        yield Breach("lost", f"{told}: it never came to its end")
    elif row.state == "Failed" and not row.final_fail:
        yield Breach("failed for a fault", told)
    elif row.state == "Failed" and not any(run.how == "final" for run in counted):
        yield Breach("contradicts", f"{told}: it never failed")
    elif row.state == "Cancelled":
        yield Breach("contradicts", f"{told}: nobody cancelled it")


def _after_edits(edits: list[Edit], runs: list[Run], told: str) -> Iterable[Breach]:
    """What its owner has cancelled or deleted isn't begun any more."""
    for edit in edits:
        if edit.op not in ("cancel", "delete"):
            continue
        resets = (other.begin for other in edits if other.op == "reset" and other.begin > edit.end)
        until = min(resets, default=float("inf"))
        # A run that was begun already may have been about to say so.
        late = LATE if edit.seen == "Started" else 0.0
        if any(edit.end + late < run.start < until for run in runs):
            yield Breach("contradicts", f"{told}: it was begun after its {edit.op}")


def overlapping(evidence: Evidence) -> tuple[list[Breach], list[float]]:
    """Runs of one row at the same time; apart, for those of frozen trees, how long they went on after the thaw."""
    breaches: list[Breach] = []
    frozen: list[float] = []
    for key, runs in evidence.runs.items():
        for i, one in enumerate(runs):
            for other in runs[i + 1 :]:
                if other.start >= one.last:
                    continue
                thaw = _thaw(evidence.faults, one, other)
                if thaw is not None and one.last <= thaw + THAWED:
                    frozen.append(one.last - thaw)
                    continue
                seconds = min(one.last, other.last) - other.start
                words = f"row {key}, {seconds:.1f} s: {_words(evidence, one)}; {_words(evidence, other)}"
                breaches.append(Breach("overlapping", words + (" (thawed too long)" if thaw is not None else "")))
    return breaches, frozen


def _thaw(faults: list[Fault], one: Run, other: Run) -> float | None:
    """When the run's tree was thawed, if it was frozen as the other run began."""
    stops = (fault for fault in faults if fault.kind == "stop-tree" and explain.hit(fault, one))
    return next((fault.end for fault in stops if fault.begin <= other.start <= fault.end + THAWED), None)


def _slow(evidence: Evidence, found: list[recovery.Recovery]) -> Iterable[Breach]:
    for one in found:
        limit = recovery.limit(one, evidence.lease)
        if one.seconds > limit:
            words = f"row {one.run.key} ({one.what}) after {one.kind} at {one.since - evidence.begin:.1f} s"
            yield Breach("slow recovery", f"{words}: {one.seconds:.1f} s, limit {limit:g} s")


def _gave_up(evidence: Evidence) -> Iterable[Breach]:
    """Trees that ended by themselves, once up; and ones that couldn't be ended in good order."""
    for facts in evidence.trees:
        at = f"tree {facts['tree']} at {facts['t'] - evidence.begin:.1f} s"
        if facts["event"] == "tree-ended" and facts["up"]:
            if not facts["asked"]:
                yield Breach("gave up", f"{at} ended by itself, exit code {facts['code']}")
            elif facts["code"] not in (0, -9):
                yield Breach("gave up", f"{at}, told to stop, ended with {facts['code']}")
        if facts["event"] == "closed" and facts["code"] != 0:
            yield Breach("gave up", f"{at}, told to stop, ended with {facts['code']}")


def _words(evidence: Evidence, run: Run) -> str:
    start, last = run.start - evidence.begin, run.last - evidence.begin
    where = f"claim {run.claim} attempt {run.attempt} in {run.tree}/{run.worker}/{run.pid}"
    return f"{where} {start:.1f}-{last:.1f} s {run.how}"


SORTS = (
    "lost",
    "overlapping",
    "stuck",
    "failed for a fault",
    "contradicts",
    "unexplained re-run",
    "more re-runs than rows in hand",
    "slow recovery",
    "gave up",
)


def _report(
    evidence: Evidence,
    breaches: list[Breach],
    whys: Counter[str],
    hands: Counter[str],
    frozen: list[float],
    recoveries: recovery.Recoveries,
) -> list[str]:
    states = Counter(row.state for row in evidence.table.values())
    ops = Counter(edit.op for edits in evidence.edits.values() for edit in edits)
    runs = [run for found in evidence.runs.values() for run in found]
    kinds = Counter(fault.kind for fault in evidence.faults)
    counts = Counter(breach.what for breach in breaches)
    lines = [
        f"rows: {len(evidence.inserted)} inserted; at the end {_counted(states)}; by their owner {_counted(ops)}",
        f"faults: {kinds.total()}: {_counted(kinds)}",
        f"runs: {len(runs)}: {_counted(Counter(run.how for run in runs))}",
        f"re-runs: {whys.total()}: {_counted(whys)}",
        f"rows in hand at kills: {hands.total()}: {_counted(hands)}",
        f"overlaps of frozen trees: {len(frozen)}"
        + (f", at most {max(frozen):.2f} s after the thaw" if frozen else ""),
    ]
    if evidence.skipped:
        lines.append(f"not injected: {_counted(Counter(evidence.skipped))}")
    if evidence.torn:
        lines.append(f"torn lines in the trace: {evidence.torn}")
    lines.append("slowest recovery:")
    for one, count in recoveries.slowest():
        what = recovery.WAITED if one.what == recovery.WAITED else CUT
        told = f"{one.kind:13} {what:7} {count:4}  {one.seconds:5.1f} s of {recovery.limit(one, evidence.lease):g}"
        lines.append(f"    {told}  row {one.run.key}, from {one.since - evidence.begin:.1f} s")
    if touched := recoveries.touched:
        one = max(touched, key=lambda one: one.seconds)
        told = f"{len(touched):4}  {one.seconds:5.1f} s, no limit"
        lines.append(f"    touched by a later fault {told}  row {one.run.key}, from {one.since - evidence.begin:.1f} s")
    lines += [f"{sort}: {counts[sort]}" for sort in SORTS]
    for sort in SORTS:
        lines += [f"BREACH {sort}: {breach.words}" for breach in breaches if breach.what == sort][:SHOWN]
    return [*lines, f"{len(breaches)} breaches" if breaches else "clean"]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def check(folder: Path, url: str | None) -> Verdict:
    """Read everything, and judge; the table's rows are kept in the folder, so that it can be done again."""
    kept = folder / "table.json"
    if url is not None:
        engine = create_engine(url)
        with engine.connect() as connection:
            found = connection.execute(text("SELECT id, state, final_fail, note FROM jobs ORDER BY id")).all()
        engine.dispose()
        kept.write_text(json.dumps([list(row) for row in found]))
    return judge(read(folder, json.loads(kept.read_text())))


def main() -> int:
    """0 clean, 1 a breach."""
    parser = argparse.ArgumentParser(prog="python -m chaos.check", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("url", nargs="?")
    options = parser.parse_args()
    verdict = check(options.folder, options.url)
    print("\n".join(verdict.lines))
    return 1 if verdict.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
