"""What a run left behind: the handlers' trace, the rig's journal, the user's table. Reads, and judges nothing.

The checker's side shares no code with nih_sched, nor with the side that plans and injects.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDS = ("end", "fail", "final", "stop")
CUT = "cut"  # how a run ended that left no word of its end


@dataclass
class Run:
    """One time that the handler was called; without a word of its end it lasts to its last beat."""

    key: int
    claim: int
    attempt: int
    pid: int
    start: float
    last: float
    worker: int
    tree: int
    how: str = CUT


@dataclass(frozen=True)
class Edit:
    """What the owner did to a row that was in state `seen`."""

    op: str
    key: int
    seen: str
    tag: str
    begin: float
    end: float


@dataclass(frozen=True)
class Fault:
    """One injected fault. Victims are who got the signal; horses, whose rows were hit by that."""

    n: int
    kind: str
    begin: float
    end: float
    tree: int | None = None
    victims: frozenset[int] = frozenset()
    horses: frozenset[int] = frozenset()
    in_hand: tuple[tuple[int, int], ...] = ()  # (key, pid)
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Record:
    """A row of the user's table, as it is at the end."""

    key: int
    state: str
    final_fail: bool
    note: str | None


@dataclass
class Evidence:
    """All of it."""

    begin: float = 0.0
    seed: int = 0
    lease: float = 10.0
    database: str = ""
    runs: dict[int, list[Run]] = field(default_factory=dict)  # by key, by start
    inserted: dict[int, float] = field(default_factory=dict)  # key -> when it was surely there
    faults: list[Fault] = field(default_factory=list)  # by begin
    skipped: list[str] = field(default_factory=list)
    trees: list[dict[str, Any]] = field(default_factory=list)  # tree-started, tree-ended and closed, as they came
    table: dict[int, Record] = field(default_factory=dict)
    torn: int = 0  # lines of the trace that can't be read

    @property
    def edits(self) -> dict[int, list[Edit]]:
        """By key, by time."""
        found: dict[int, list[Edit]] = defaultdict(list)
        for edit in sorted((edit for fault in self.faults for edit in fault.edits), key=lambda edit: edit.begin):
            found[edit.key].append(edit)
        return found


def read(folder: Path, rows: list[tuple[Any, ...]]) -> Evidence:
    """The files in `folder`, and the table's rows as (id, state, final_fail, note)."""
    evidence = Evidence()
    _read_journal(folder / "faults.jsonl", evidence)
    _read_trace(folder / "runs.log", evidence)
    evidence.table = {row[0]: Record(row[0], row[1], bool(row[2]), row[3]) for row in rows}
    return evidence


def _read_journal(path: Path, evidence: Evidence) -> None:
    for line in path.read_text().splitlines():
        facts = json.loads(line)
        event = facts["event"]
        if event == "run":
            evidence.begin, evidence.seed = facts["begin"], facts["seed"]
            evidence.lease, evidence.database = facts["lease"], facts["database"]
        elif event == "inserted":
            evidence.inserted |= dict.fromkeys(facts["keys"], facts["t"])
        elif event == "fault":
            evidence.faults.append(_fault(facts))
        elif event == "skipped":
            evidence.skipped.append(f"{facts['kind']}: {facts['why']}")
        elif event.startswith("tree-") or event == "closed":
            evidence.trees.append(facts)
    evidence.faults.sort(key=lambda fault: fault.begin)


def _fault(facts: dict[str, Any]) -> Fault:
    return Fault(
        facts["n"],
        facts["kind"],
        facts["begin"],
        facts["end"],
        facts.get("tree"),
        frozenset(facts.get("victims", ())),
        frozenset(facts.get("horses", ())),
        tuple((key, pid) for key, pid in facts.get("in_hand", ())),
        tuple(Edit(**edit) for edit in facts.get("edits", ())),
    )


def _read_trace(path: Path, evidence: Evidence) -> None:
    going: dict[tuple[int, ...], Run] = {}
    runs: dict[int, list[Run]] = defaultdict(list)
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        words = line.split()
        try:
            what, (key, claim, attempt, pid), t = words[0], map(int, words[1:5]), float(words[5])
            worker, tree = int(words[6]), int(words[7].split(".")[0])
            if len(words) != 9 or words[8] != ".":
                raise ValueError(line)
        except (ValueError, IndexError):
            evidence.torn += 1
            continue
        if what == "start":
            run = Run(key, claim, attempt, pid, t, t, worker, tree)
            going[key, claim, attempt, pid] = run
            runs[key].append(run)
            continue
        if (known := going.get((key, claim, attempt, pid))) is None:
            evidence.torn += 1
            continue
        known.last = t
        if what in ENDS:
            known.how = what
    for found in runs.values():
        found.sort(key=lambda run: run.start)
    evidence.runs = dict(runs)
