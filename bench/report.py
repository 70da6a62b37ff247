"""Figures into tables: medians, ranges, and ratios to ours, round by round."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import plot
from bench.plan import Figure, Plan


@dataclass
class Section:
    """A workload's part of the report."""

    name: str
    plan: Plan
    figures: list[Figure]
    plots: list[str] = field(default_factory=list)  # files
    loads: tuple[str, str] = ("", "")  # before and after


@dataclass(frozen=True)
class Line:
    """A system's figure over all rounds."""

    system: str
    metric: str
    values: Sequence[float]
    ratios: Sequence[float]  # to the baseline's value of the same round

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)


def lines(section: Section) -> list[Line]:
    """In the order in which systems and metrics first came."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for one in section.figures:
        values.setdefault((one.metric, one.system), {})[one.round] = one.value
    metrics = dict.fromkeys(metric for metric, _ in values)
    systems = [step.system for step in section.plan.steps]
    found = []
    for metric in metrics:
        base = values.get((metric, section.plan.baseline), {})
        for system in systems:
            mine = values.get((metric, system))
            if mine is None:
                continue
            ratios = [value / base[number] for number, value in mine.items() if base.get(number)]
            found.append(Line(system, metric, list(mine.values()), ratios))
    return found


def table(section: Section) -> str:
    """A section in Markdown."""
    head = f"| | | median | min..max | rounds | to {section.plan.baseline} |"
    rows = [f"## {section.name}", "", section.plan.about, "", head, "|---|---|--:|--:|--:|--:|"]
    shown = ""
    for line in lines(section):
        metric, shown = ("" if line.metric == shown else line.metric), line.metric
        ratio = "1" if line.system == section.plan.baseline else _ratio(line.ratios)
        span = f"{number(min(line.values))}..{number(max(line.values))}"
        rows.append(f"| {metric} | {line.system} | {number(line.median)} | {span} | {len(line.values)} | {ratio} |")
    notes = [f"- {system}: {note}." for system, note in section.plan.notes.items()]
    rows += ["", *notes] if notes else []
    rows += ["", f"Before: {section.loads[0]}. After: {section.loads[1]}."]
    rows += ["", *(f"![{section.name}]({name})" for name in section.plots)] if section.plots else []
    return "\n".join(rows) + "\n"


def number(value: float) -> str:
    """Three figures that count, no more."""
    if value != value:  # noqa: PLR0124 - NaN
        return "?"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return f"×{middle:.2f} ({low:.2f}..{high:.2f})" if len(ratios) > 1 else f"×{middle:.2f}"


def bars(section: Section, folder: Path) -> None:
    """A bar chart of a section's first metric."""
    every = lines(section)
    first = [line for line in every if line.metric == every[0].metric] if every else []
    if not first:
        return
    items = [(line.system, line.median, min(line.values), max(line.values)) for line in first]
    name = f"{section.name}.svg"
    (folder / name).write_text(plot.bars(f"{section.name}: {first[0].metric}", items, number), encoding="utf-8")
    section.plots.insert(0, name)


def write(folder: Path, sections: Sequence[Section], facts: Mapping[str, str], problems: Sequence[str]) -> str:
    """results.md and results.json; the first is returned."""
    said = [f"- {name}: {value}" for name, value in facts.items()]
    wrong = ["", "**Something was wrong:**", "", *(f"- {one.splitlines()[0]}" for one in problems)] if problems else []
    parts = ["# Results", "", *said, *wrong, "", *(table(section) for section in sections)]
    text = "\n".join(parts)
    (folder / "results.md").write_text(text, encoding="utf-8")
    raw = {
        "facts": dict(facts),
        "problems": list(problems),
        "figures": [asdict(one) for section in sections for one in section.figures],
    }
    (folder / "results.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return text


def machine() -> dict[str, str]:
    """On what all this ran."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [row.split(":", 1)[1].strip() for row in info.read_text().splitlines() if row.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{cpu}, {platform.system()} {platform.release()}",
        "Python": platform.python_version(),
    }
