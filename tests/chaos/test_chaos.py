"""A short run of scripts/chaos with a fixed seed; and runs with a fence taken out, which the checker must report."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import servers

TESTS = str(Path(__file__).parent.parent)


def chaos(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Run it; return its exit code and what it printed."""
    line = [sys.executable, "-P", "-m", "chaos", "--keep", str(tmp_path / "files"), *options]
    # Its servers and processes are its own: outside of this test's home it finds no settings either.
    done = servers.run(line, env={"PYTHONPATH": TESTS, "PATH": os.environ["PATH"]}, cwd=tmp_path, timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.many
def test_a_minute_of_all_faults_breaks_no_promise(tmp_path: Path) -> None:
    code, said = chaos(tmp_path, "--seed", "1", "--seconds", "60")
    assert code == 0, said
    assert "clean" in said


@pytest.mark.many
@pytest.mark.parametrize(
    ("broken", "faults", "breach"),
    [
        ("no_fence_in_finish", "owner", "contradicts"),
        ("no_fence_in_start", "redis-flush", "overlapping"),
        ("no_lease_check", "producer", "overlapping"),
    ],
)
def test_a_fence_that_is_missing_is_reported(tmp_path: Path, broken: str, faults: str, breach: str) -> None:
    options = ("--seed", "3", "--seconds", "25", "--database", "sqlite", "--schedulers", "2", "--faults", faults)
    code, said = chaos(tmp_path, *options, "--preload", f"chaos.sabotage:{broken}")
    assert code == 1, said
    assert f"{breach}: 0" not in said
    assert f"{breach}: " in said


@pytest.mark.many
def test_jobs_that_redis_delivers_twice_are_harmless(tmp_path: Path) -> None:
    options = ("--seed", "3", "--seconds", "15", "--database", "sqlite", "--schedulers", "2", "--faults", "horse,owner")
    code, said = chaos(tmp_path, *options, "--preload", "chaos.sabotage:sent_twice")
    assert code == 0, said
