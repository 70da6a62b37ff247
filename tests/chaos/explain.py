"""Why a row ran again: what the run before it came to, and which fault or edit of its owner did that."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from chaos.evidence import CUT, Edit, Evidence, Fault, Run

KILLS = ("horse", "worker", "tree")
TRUST = 1.0  # seconds from a handler's last word to its outcome's commit, at most
SLACK = 0.2  # seconds by which a beat may be late
OWNER = "reset by its owner"
RAISED = "raised on purpose"


def again(evidence: Evidence) -> list[tuple[Run, Run, str | None, Fault | None]]:
    """(the run before, the run, what explains it or None, which fault) for each run that isn't its row's first."""
    edits = evidence.edits
    found = []
    for key, runs in evidence.runs.items():
        resets = [edit for edit in edits.get(key, ()) if edit.op == "reset"]
        for before, run in itertools.pairwise(runs):
            why, fault = explain(before, run, evidence.faults, resets)
            found.append((before, run, why, fault))
    return found


def explain(before: Run, run: Run, faults: Sequence[Fault], resets: list[Edit]) -> tuple[str | None, Fault | None]:
    """What explains `run` after `before`; a reset explains one run only, and is taken out of `resets`."""
    if before.how == "fail" and (run.claim, run.attempt) != (before.claim, before.attempt):
        return RAISED, None
    fault = cut_by(before, run, faults) if before.how in (CUT, "stop") else None
    if fault is None and (reset := _reset(before, run, resets)):
        resets.remove(reset)
        return OWNER, None
    if fault is None and before.how not in (CUT, "stop"):
        fault = unwritten_by(before, run, faults)
    return (fault.kind, fault) if fault else (None, None)


def _reset(before: Run, run: Run, resets: Sequence[Edit]) -> Edit | None:
    for edit in resets:
        # One of a row that waited closes a claim that has no run; it explains none.
        asks = edit.seen == "Started" or (edit.seen in ("Done", "Failed") and edit.end >= before.last)
        if asks and edit.begin <= run.start:
            return edit
    return None


def cut_by(before: Run, run: Run | None, faults: Sequence[Fault]) -> Fault | None:
    """The fault that ended a run without a word, or had it interrupted."""
    until = run.start if run else float("inf")
    found = [fault for fault in faults if fault.begin <= until and _cuts(fault, before)]
    # Its own killer first; else what was the matter at its last beat.
    return min(found, key=lambda fault: (_is_outage(fault), abs(fault.begin - before.last)), default=None)


def _is_outage(fault: Fault) -> bool:
    return fault.kind.startswith(("db-", "redis-"))


def _cuts(fault: Fault, run: Run) -> bool:
    if fault.kind in (*KILLS, "stop-tree"):
        return hit(fault, run) and run.start <= fault.end and run.last >= fault.begin - TRUST
    if fault.kind == "sigterm-all":
        return fault.begin - SLACK <= run.last <= fault.end
    if _is_outage(fault):
        return fault.begin - SLACK <= run.last <= fault.end + TRUST
    return False


def unwritten_by(before: Run, run: Run, faults: Sequence[Fault]) -> Fault | None:
    """The fault that kept a run's outcome, though the handler had come to its end, from being written."""
    return next((fault for fault in faults if fault.begin <= run.start and _keeps(fault, before)), None)


def _keeps(fault: Fault, run: Run) -> bool:
    just_ended = fault.begin - TRUST <= run.last <= fault.begin + SLACK
    if fault.kind in KILLS:
        return hit(fault, run) and just_ended
    if fault.kind == "stop-tree":  # while it was frozen its row may have been given to another
        return hit(fault, run) and run.start <= fault.begin + SLACK and run.last >= fault.begin - TRUST
    if fault.kind == "sigterm-all":
        return fault.begin - TRUST <= run.last <= fault.end
    return fault.kind.startswith("db-") and fault.begin - TRUST <= run.last <= fault.end + TRUST


def hit(fault: Fault, run: Run) -> bool:
    """Whether it hit the run's horse; one that was forked at the last moment is known by its worker."""
    return run.pid in fault.horses or run.pid in fault.victims or run.worker in fault.victims


def hands(evidence: Evidence, fault: Fault) -> set[tuple[int, int]]:
    """(key, pid) of the rows in the hands of those whom a fault ended: running, or not surely written yet."""
    held = set(fault.in_hand)
    last: dict[int, Run] = {}  # by worker, which has one horse at a time
    for runs in evidence.runs.values():
        for run in runs:
            if hit(fault, run) and fault.begin - TRUST <= run.last and run.start <= fault.begin + SLACK:
                last[run.worker] = max(run, last.get(run.worker, run), key=lambda one: one.start)
    return held | {(run.key, run.pid) for run in last.values()}
