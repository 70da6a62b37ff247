"""Whether the checker sees each breach and each explanation, by made-up traces; and whether plans are what they say."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chaos import __main__ as command
from chaos import check, handler, plan
from chaos.journal import Journal
from chaos.owner import Owner

HERE = Path(__file__).parent
LEASE = 10.0


class Story:
    """A made-up run: what handlers and rig would have written. Times are seconds from its begin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = [{"event": "run", "t": 0, "begin": 0, "seed": 1, "lease": LEASE, "database": "postgresql"}]
        self._trace: list[str] = []
        self._table: list[list[Any]] = []
        self._claims = 0
        self._faults = 0

    def row(
        self, key: int = 1, state: str | None = "Done", *, at: float = 0, final: bool = False, note: Any = None
    ) -> Story:
        """A row inserted at `at`, and its state at the end; None: it isn't there any more."""
        self._journal.append({"event": "inserted", "t": at, "keys": [key]})
        if state is not None:
            self._table.append([key, state, int(final), note])
        return self

    def run(
        self, start: float, last: float, how: str = "end", *, key: int = 1, claim: int | None = None, attempt: int = 1,
        pid: int = 100, worker: int = 10, tree: int = 1,
    ) -> Story:  # fmt: skip
        """A run; `how` "cut" leaves no end line."""
        self._claims = claim or self._claims + 1
        lines = [("start", start), ("beat", (start + last) / 2), ("beat" if how == "cut" else how, last)]
        self._trace += [f"{what} {key} {self._claims} {attempt} {pid} {t:.4f} {worker} {tree}.1 ." for what, t in lines]
        return self

    def fault(self, kind: str, begin: float, end: float | None = None, **facts: Any) -> Story:
        """An injected fault."""
        self._faults += 1
        end = begin if end is None else end
        facts = {"event": "fault", "t": end, "n": self._faults, "kind": kind, "begin": begin, "end": end, **facts}
        self._journal.append(facts)
        return self

    def edit(self, op: str, at: float, seen: str, *, key: int = 1) -> Story:
        """An owner's edit; its tag is the op."""
        edit = {"op": op, "key": key, "seen": seen, "tag": op, "begin": at, "end": at + 0.01}
        return self.fault("owner", at, at + 0.01, edits=[edit])

    def tree(self, event: str, at: float, **facts: Any) -> Story:
        """What became of a tree."""
        self._journal.append({"event": event, "t": at, "tree": 1, **facts})
        return self

    def torn(self) -> Story:
        """A line that was cut in the middle."""
        self._trace.append("beat 1 1")
        return self

    def verdict(self) -> check.Verdict:
        """What the checker says to it."""
        (self._folder / "faults.jsonl").write_text("".join(json.dumps(facts) + "\n" for facts in self._journal))
        (self._folder / "runs.log").write_text("".join(line + "\n" for line in self._trace))
        (self._folder / "table.json").write_text(json.dumps(self._table))
        return check.check(self._folder, None)

    def found(self) -> dict[str, int]:
        """{sort of breach: how many}."""
        return dict(self.verdict().counts)

    def report(self) -> str:
        """As printed."""
        return "\n".join(self.verdict().lines)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


# What is clean


def test_a_row_that_ran_once(story: Story) -> None:
    report = story.row().run(1, 2).torn().report()
    assert report.splitlines()[-1] == "clean"
    assert "rows: 1 inserted; at the end Done 1" in report
    assert "torn lines in the trace: 1" in report


def test_rightful_ends(story: Story) -> None:
    story.row(1, "Failed", final=True).run(1, 2, "final")
    story.row(2, "Done").run(1, 2, "fail", key=2, claim=5).run(3, 4, "end", key=2, claim=5, attempt=2)
    story.row(3, None).edit("delete", 1, "Queued", key=3)
    story.row(4, "Cancelled", note="cancel").edit("cancel", 1, "Queued", key=4)
    story.row(5, "Cancelled", note="cancel").run(1, 3, key=5).edit("cancel", 2, "Started", key=5)
    story.row(6, "Done", note="edit").run(1, 3, key=6).edit("edit", 2, "Started", key=6)
    assert story.found() == {}


# What explains a run that isn't the first

EXPLAINED = {
    "raised on purpose": lambda s: s.run(1, 2, "fail", claim=1).run(3, 4, claim=1, attempt=2),
    "horse": lambda s: s.fault("horse", 2, victims=[100], horses=[100]).run(1, 1.95, "cut").run(3, 4),
    "worker": lambda s: s.fault("worker", 2, victims=[10], horses=[100], in_hand=[[1, 100]]).run(1, 3, "cut").run(4, 5),
    "tree": lambda s: s.fault("tree", 2, 4, victims=[9, 10, 100], horses=[100]).run(1, 1.95, "cut").run(5, 6),
    "stop-tree": lambda s: s.fault("stop-tree", 2, 16, victims=[9, 10, 100], horses=[100])
    .run(1, 1.95, "cut")
    .run(14, 15, pid=200, worker=20, tree=2),
    "sigterm-all": lambda s: s.fault("sigterm-all", 2, 29, victims=[9, 10, 100], horses=[100])
    .run(1, 27, "stop")
    .run(30, 31),
    "db-restart": lambda s: s.fault("db-restart", 2, 6).fault("horse", 9, victims=[1], in_hand=[[9, 1]])
    .run(1, 5, "cut")
    .run(8, 9),
    "redis-freeze": lambda s: s.fault("redis-freeze", 2, 6).fault("horse", 9, victims=[1], in_hand=[[9, 1]])
    .run(1, 5, "cut")
    .run(8, 9),
}  # fmt: skip


@pytest.mark.parametrize("why", EXPLAINED)
def test_explained(story: Story, why: str) -> None:
    EXPLAINED[why](story.row())
    assert story.found() == {}
    assert f"re-runs: 1: {why} 1" in story.report()


def test_ended_but_killed_before_it_was_written(story: Story) -> None:
    story.row().run(1, 2).run(3, 4).fault("horse", 2.5, victims=[100], horses=[100])
    assert story.found() == {}
    assert "rows in hand at kills: 1: horse 1" in story.report()


def test_killed_long_after_it_ended(story: Story) -> None:
    story.row().run(1, 2).run(5, 6).fault("horse", 3.5, victims=[100], horses=[100], in_hand=[[7, 100]])
    assert story.found() == {"unexplained re-run": 1}


def test_ended_while_the_database_was_away(story: Story) -> None:
    story.row().run(1, 4).run(8, 9).fault("db-restart", 3, 6).fault("tree", 6.5, 7, victims=[100], in_hand=[[1, 100]])
    assert story.found() == {}


def test_a_horse_forked_at_the_last_moment_is_known_by_its_worker(story: Story) -> None:
    story.row().run(1.99, 2.0, "cut").run(4, 5).fault("tree", 1.98, 3, victims=[9, 10], horses=[])
    assert story.found() == {}


@pytest.mark.parametrize("seen", ["Done", "Started"])
def test_a_reset_explains_one_run(story: Story, seen: str) -> None:
    story.row(note="reset").run(1, 3).edit("reset", 3.5 if seen == "Done" else 2, seen).run(4, 5)
    assert story.found() == {}
    story.run(6, 7)
    assert story.found() == {"unexplained re-run": 1}


def test_a_reset_of_a_waiting_row_explains_no_run(story: Story) -> None:
    story.row(note="reset").edit("reset", 0.5, "Queued").run(1, 3).run(4, 5)
    assert story.found() == {"unexplained re-run": 1}


def test_a_reset_row_that_was_cut_too(story: Story) -> None:
    story.row(note="reset").run(1, 2.9, "cut").edit("reset", 2, "Started")
    story.fault("horse", 3, victims=[100], horses=[100]).run(4, 5, pid=101).run(6, 7, pid=102)
    assert story.found() == {}


# Breaches


def test_unexplained(story: Story) -> None:
    story.row(1).run(1, 2).run(3, 4)
    story.row(2).run(1, 2, "cut", key=2).run(3, 4, key=2)
    story.row(3).run(1, 2, "fail", key=3, claim=9).run(3, 4, key=3, claim=9)  # the same attempt again
    story.row(4).run(1, 2, "stop", key=4).run(3, 4, key=4)
    assert story.found() == {"unexplained re-run": 4}


@pytest.mark.parametrize("kind", ["producer", "keeper", "stop-worker", "redis-flush"])
def test_what_may_cost_no_run(story: Story, kind: str) -> None:
    story.row().fault(kind, 2, victims=[10], horses=[100]).run(1, 1.95, "cut").run(5, 6)
    assert "unexplained re-run" in story.found() or kind == "redis-flush"
    assert story.found()


def test_lost(story: Story) -> None:
    story.row(1, "Done")
    story.row(2, None)
    story.row(3, "Done").run(1, 2, "fail", key=3)
    story.row(4, "Done", note="reset").run(1, 2, key=4).edit("reset", 3, "Done", key=4)
    story.row(5, "Queued").edit("delete", 1, "Queued", key=5)
    assert story.found() == {"lost": 5}


def test_overlapping(story: Story) -> None:
    story.row().run(1, 5, "cut").run(4, 6, pid=101).fault("horse", 5, victims=[100], horses=[100])
    assert story.found()["overlapping"] == 1


def test_overlapping_with_a_beat_after_a_kill_that_missed(story: Story) -> None:
    story.row().run(1, 9, "cut", worker=10).run(4, 6, pid=101).fault("worker", 3, victims=[10], horses=[100])
    assert story.found() == {"overlapping": 1}


def test_frozen_trees_apart(story: Story) -> None:
    story.row().fault("stop-tree", 2, 16, victims=[9, 10, 100], horses=[100])
    story.run(1, 16.1).run(13, 15, pid=200, worker=20, tree=2)
    assert story.found() == {}
    assert "overlaps of frozen trees: 1, at most 0.10 s after the thaw" in story.report()


def test_a_thawed_horse_must_stop_at_once(story: Story) -> None:
    story.row().fault("stop-tree", 2, 16, victims=[9, 10, 100], horses=[100])
    story.run(1, 19).run(13, 20, pid=200, worker=20, tree=2)
    assert story.found() == {"overlapping": 1}


def test_stuck_and_failed(story: Story) -> None:
    story.row(1, "Queued")
    story.row(2, "Started").run(1, 2, "cut", key=2)
    story.row(3, "Failed").run(1, 2, "cut", key=3)
    assert story.found() == {"stuck": 2, "failed for a fault": 1}


def test_contradictions(story: Story) -> None:
    story.row(1, "Failed", final=True)
    story.row(2, "Cancelled").run(1, 2, key=2)
    story.row(3, "Done", note="cancel").run(1, 4, key=3).edit("cancel", 2, "Started", key=3)
    story.row(4, "Done", note=None).run(1, 4, key=4).edit("edit", 2, "Started", key=4)
    story.row(5, "Cancelled", note="cancel").edit("cancel", 2, "Queued", key=5).run(2.5, 3, key=5)
    story.row(6, None).edit("delete", 2, "Started", key=6).run(3.5, 4, key=6)
    assert story.found() == {"contradicts": 6}


def test_more_runs_than_hands(story: Story) -> None:
    story.row().fault("db-restart", 2, 6).run(1, 5, "cut").run(8, 9)
    assert story.found() == {"more re-runs than rows in hand": 1}


def test_trees_that_gave_up(story: Story) -> None:
    story.row().run(1, 2)
    story.tree("tree-ended", 3, code=70, asked=False, up=True).tree("tree-ended", 4, code=2, asked=False, up=False)
    story.tree("tree-ended", 5, code=-9, asked=True, up=True).tree("tree-ended", 6, code=70, asked=True, up=True)
    story.tree("closed", 7, code=None)
    assert story.found() == {"gave up": 3}


# Recovery


def test_recovery_where_the_death_was_seen(story: Story) -> None:
    killed = {"victims": [100], "horses": [100]}
    story.row().fault("horse", 2, **killed).run(1, 1.95, "cut").run(7.5, 8, pid=101)
    assert story.found() == {"slow recovery": 1}
    assert "5.5 s of 5" in story.report()


def test_recovery_that_a_later_fault_touched(story: Story) -> None:
    story.row().fault("horse", 2, victims=[100], horses=[100]).run(1, 1.95, "cut").run(7.5, 8, pid=101)
    story.fault("redis-flush", 5)
    assert story.found() == {}
    assert "touched by a later fault    1    5.5 s" in story.report()


def test_other_rows_faults_touch_nothing(story: Story) -> None:
    story.row().fault("horse", 2, victims=[100], horses=[100]).run(1, 1.95, "cut").run(7.5, 8, pid=101)
    story.fault("horse", 5, victims=[300], horses=[300], in_hand=[[9, 300]])
    story.fault("owner", 6, edits=[])
    assert story.found() == {"slow recovery": 1}


def test_recovery_of_a_tree_counts_from_its_successor(story: Story) -> None:
    story.row().fault("tree", 2, 4, tree=1, victims=[100], horses=[100]).tree("tree-started", 3.8)
    story.run(1, 1.95, "cut").run(8.5, 9, pid=101)
    assert story.found() == {}
    assert "4.7 s of 5" in story.report()


def test_recovery_of_a_frozen_tree_counts_from_its_freezing(story: Story) -> None:
    story.row().fault("stop-tree", 2, 16, victims=[10, 100], horses=[100]).run(1, 1.95, "cut").run(27.5, 28, pid=101)
    assert story.found() == {"slow recovery": 1}


def test_rows_that_waited(story: Story) -> None:
    story.row(at=1).fault("redis-freeze", 2, 8).run(34, 35)
    assert story.found() == {"slow recovery": 2}  # after that fault, and after the last


def test_rows_that_waited_for_their_turn(story: Story) -> None:
    story.fault("redis-freeze", 2, 8)
    for key in range(1, 60):
        story.row(key, at=1).run(8 + key, 9 + key, key=key)
    assert story.found() == {}
    assert "redis-freeze  waited    59    1.0 s of 25" in story.report()


def test_a_row_that_was_overtaken(story: Story) -> None:
    story.row(1, at=1).row(2, at=1).row(3, at=10).fault("redis-flush", 2)
    story.run(8, 9, key=1).run(12, 13, key=3).run(34, 35, key=2)
    assert story.found() == {"slow recovery": 2}
    assert "26.0 s of 25  row 2" in story.report()


def test_a_row_that_rested_when_the_last_fault_ended(story: Story) -> None:
    story.row().fault("horse", 2, victims=[100], horses=[100]).run(1, 1.95, "cut").fault("redis-flush", 5)
    story.run(31, 32, pid=101)
    assert story.found() == {"slow recovery": 1}
    assert "the last      cut        1   26.0 s of 25" in story.report()


# The sides are apart


def test_the_checker_shares_no_code() -> None:
    allowed = {*sys.stdlib_module_names, "sqlalchemy"}
    own = {"check", "explain", "recovery", "evidence"}
    for name in own:
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.module == "chaos":
                assert {alias.name for alias in node.names} <= own
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("chaos."):
                assert str(node.module).removeprefix("chaos.") in own
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed


def test_the_checker_runs_alone(story: Story, tmp_path: Path) -> None:
    story.row().run(1, 2).run(3, 4).verdict()
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parent)}
    line = [sys.executable, "-m", "chaos.check", str(tmp_path)]
    done = subprocess.run(line, env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "BREACH unexplained re-run: row 1" in done.stdout


# The handler


def test_the_handlers_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHAOS_TREE", "2.5")
    handler.work(1, 150, 0, 0, 7, 1)
    with pytest.raises(RuntimeError):
        handler.work(2, 1, 1, 0, 8, 1)
    with pytest.raises(handler.Fail):
        handler.work(3, 1, 0, 1, 9, 1)
    lines = [line.split() for line in Path(handler.FILE).read_text().splitlines()]
    assert [(words[0], words[1]) for words in lines if words[0] != "beat"] == [
        ("start", "1"), ("end", "1"), ("start", "2"), ("fail", "2"), ("start", "3"), ("final", "3"),
    ]  # fmt: skip
    assert all(words[2:5] == ["7", "1", str(os.getpid())] and words[7:] == ["2.5", "."] for words in lines[:3])


# Plans


def planned(seed: int, seconds: float = 300, database: str = "postgresql", kinds: tuple[str, ...] = ()) -> plan.Plan:
    return plan.make(seed, seconds, kinds or plan.kinds_for(database), lease=LEASE, workers=6)


def test_the_same_seed_plans_the_same() -> None:
    assert planned(7) == planned(7)
    assert planned(7).digest == planned(7).digest != planned(8).digest
    assert [fault.kind for fault in planned(7).faults] != [fault.kind for fault in planned(8).faults]


@pytest.mark.parametrize("database", plan.DATABASES)
def test_each_kind_comes_five_times(database: str) -> None:
    for seed in range(20):
        kinds = Counter(fault.kind for fault in planned(seed, 300, database).faults)
        assert set(kinds) == set(plan.kinds_for(database))
        assert min(kinds.values()) >= 5
        assert max(kinds.values()) - min(kinds.values()) <= 2


def test_faults_end_in_time_and_one_at_a_time() -> None:
    for seed in range(20):
        free: dict[str, float] = {}
        for fault in planned(seed, 120).faults:
            assert fault.at + fault.seconds <= 120
            if (name := plan.group(fault.kind)) is not None:
                assert fault.at >= free.get(name, 0.0)
                free[name] = fault.at + fault.seconds


def test_one_kind_alone() -> None:
    assert {fault.kind for fault in planned(1, 60, kinds=("stop-tree",)).faults} == {"stop-tree"}


def test_rows_leave_the_workers_time() -> None:
    for seed in range(20):
        rows = planned(seed).rows
        assert [row.key for row in rows] == list(range(1, len(rows) + 1))
        assert max(row.at for row in rows) <= 300 * plan.STREAM + 1
        work = sum((row.length_ms / 1000 + plan.OVERHEAD) * (1 + row.fails) for row in rows)
        assert 0.2 <= work / (300 * plan.STREAM * 6) <= 0.4
        assert sum(row.length_ms > LEASE * 1000 for row in rows) >= 4
        assert sum(row.final_fail for row in rows) >= 10


# The command


@pytest.mark.parametrize(
    "line",
    [["--faults", "db-lock"], ["--faults", "nonsense"], ["--seconds", "0"], ["--keep", "."], ["--database", "x"]],
)
def test_usage(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(line)
    assert ended.value.code == 2


# The owner


def test_the_owner(tmp_path: Path) -> None:
    owner = Owner(f"sqlite:///{tmp_path / 'owner.db'}", Journal(tmp_path))
    owner.make_table()
    owner.insert_all([plan.Row(0, key, 50) for key in range(1, 9)], 0.0)
    assert owner.unfinished() == 8
    edits = owner.visit(3, random.Random(1))
    assert [edit["op"] for edit in edits] == ["edit", "delete", "cancel"]  # nothing to reset, nothing started
    assert len({edit["key"] for edit in edits}) == 3
    assert {edit["seen"] for edit in edits} == {"Pending"}
    assert owner.unfinished() == 6
    owner.close()
