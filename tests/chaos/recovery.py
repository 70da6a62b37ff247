"""How long a row that a fault had stopped waited until it moved again, where no later fault touched it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.evidence import CUT, Evidence, Fault, Run
from chaos.explain import cut_by

SEEN = 5.0  # seconds, where somebody sees the death: its worker, its supervisor, the next tree on the host
UNSEEN = 15.0  # seconds beyond a lease, else
WAITED = "waited"
LAST = "the last"  # of all faults: from its end on, nothing touches any row


@dataclass(frozen=True)
class Recovery:
    """One row's."""

    kind: str
    what: str  # how its run before was stopped; or `waited`, for a row that had no run yet
    run: Run  # the one that followed
    since: float
    seconds: float


@dataclass
class Recoveries:
    """All that could be measured, and how many couldn't."""

    found: list[Recovery] = field(default_factory=list)
    touched: list[Recovery] = field(default_factory=list)  # a later fault touched them before they moved again

    def slowest(self) -> list[tuple[Recovery, int]]:
        """The slowest of each kind and sort, and how many there are of it."""
        by: dict[tuple[str, bool], list[Recovery]] = defaultdict(list)
        for one in self.found:
            by[one.kind, one.what == WAITED].append(one)
        return [(max(ones, key=lambda one: one.seconds), len(ones)) for _, ones in sorted(by.items())]


def measure(evidence: Evidence) -> Recoveries:
    """Rows whose run was cut, until they run again; rows that waited while a fault was on, until they run."""
    recoveries = Recoveries()
    for runs in evidence.runs.values():
        for before, run in itertools.pairwise(runs):
            if before.how in (CUT, "stop") and (fault := cut_by(before, run, evidence.faults)):
                since = _since(evidence, fault)
                seconds = max(0.0, run.start - since)
                _note(recoveries, evidence, fault, Recovery(fault.kind, before.how, run, since, seconds))
    for fault in evidence.faults:
        if fault.kind not in ("owner", "horse"):
            since = _since(evidence, fault)
            for run, seconds in waited(evidence, since):
                _note(recoveries, evidence, fault, Recovery(fault.kind, WAITED, run, since, seconds))
    end = max((fault.end for fault in evidence.faults), default=evidence.begin)
    recoveries.found += [Recovery(LAST, WAITED, run, end, seconds) for run, seconds in waited(evidence, end)]
    recoveries.found += [Recovery(LAST, CUT, run, end, run.start - end) for run in _rested(evidence, end)]
    return recoveries


def waited(evidence: Evidence, since: float) -> Iterator[tuple[Run, float]]:
    """First runs of rows that were there at an instant, and how long each was overdue.

    Rows are claimed by their keys, so one has nothing to recover from while those before it wait too. It is overdue
    once all of these have begun, or one behind it has.
    """
    firsts = {key: runs[0] for key, runs in evidence.runs.items() if runs[0].start > since}
    waiting = sorted(key for key in firsts if evidence.inserted.get(key, since) < since)
    overtaken = float("inf")
    behind: dict[int, float] = {}  # when the first of the rows behind this one has begun
    for key in sorted(firsts, reverse=True):
        behind[key] = overtaken
        overtaken = min(overtaken, firsts[key].start)
    turn = since
    for key in waiting:
        run = firsts[key]
        yield run, max(0.0, run.start - max(since, min(turn, behind[key])))
        turn = max(turn, run.start)


def _rested(evidence: Evidence, since: float) -> Iterator[Run]:
    """The next runs of rows that had begun by then, weren't running, and weren't through."""
    for runs in evidence.runs.values():
        for before, run in itertools.pairwise(runs):
            if before.last <= since < run.start and before.how in (CUT, "stop", "fail"):
                yield run


def _note(recoveries: Recoveries, evidence: Evidence, fault: Fault, recovery: Recovery) -> None:
    run = recovery.run
    others = (other for other in evidence.faults if other is not fault and _on(other, fault, run))
    if not any(_touches(other, run) for other in others):
        recoveries.found.append(recovery)
    elif recovery.what != WAITED:  # those that waited are too many, and were hit by every fault meanwhile
        recoveries.touched.append(recovery)


def limit(recovery: Recovery, lease: float) -> float:
    """Seconds in which such a row must move."""
    seen = recovery.what != WAITED and recovery.kind in ("horse", "worker", "tree")
    return SEEN if seen else lease + UNSEEN


def _since(evidence: Evidence, fault: Fault) -> float:
    """From when a row's wait counts: the kill, the start of the killed tree's successor, or the fault's end.

    A frozen tree is lost from its first moment on.
    """
    if fault.kind in ("horse", "worker", "stop-tree", "stop-worker"):
        return fault.begin
    if fault.kind == "tree":
        started = (facts for facts in evidence.trees if facts["event"] == "tree-started")
        later = (facts["t"] for facts in started if facts["tree"] == fault.tree and facts["t"] > fault.begin)
        return min(later, default=fault.end)
    return fault.end


def _on(other: Fault, fault: Fault, run: Run) -> bool:
    """Whether it was on between a fault's begin and the run that followed."""
    return other.begin <= run.start and other.end >= fault.begin


def _touches(fault: Fault, run: Run) -> bool:
    """Whether it may be what a row waited for: all but faults that hit another row alone."""
    if fault.kind == "owner":
        return any(edit.key == run.key for edit in fault.edits)
    if fault.kind == "horse":
        return any(key == run.key for key, _ in fault.in_hand)
    return True
