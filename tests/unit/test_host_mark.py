"""The mark that all which a row starts carries in its environment."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nih_sched import host

CODE = f"import os; print(os.environ.get({host.MARK!r}, 'none').rstrip())"


def in_a_child(work: Callable[[], None]) -> str:
    """What a fork of this process has printed."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.dup2(writer, 1)
            work()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = answer.read()
    os.waitpid(pid, 0)
    return told


def start(env: dict[str, str] | None = None) -> None:
    subprocess.run([sys.executable, "-S", "-c", CODE], check=True, env=env)


def row_after_row() -> None:
    for claim in (7, 123456789012345678):
        host.mark("lease", claim)
        start()
        start(dict(os.environ))


def after_user_code_put_its_environment_back() -> None:
    host.mark("lease", 1)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    host.mark("lease", 2)
    start()


def under_another_lease() -> None:
    host.mark("one", 1)
    host.mark("other", 1)
    start()


def beside_other_variables() -> None:
    host.mark("lease", 1)
    for number in range(500):
        os.environ[f"NIH_SCHED_MANY_{number}"] = "x"
    host.mark("lease", 2)
    start()


def after_a_library_changed_the_environment_of_c() -> None:
    host.mark("lease", 1)
    ctypes.CDLL(None).setenv(host.MARK.encode(), b"lease 1", 1)  # a copy of ours, as setproctitle makes one of all
    host.mark("lease", 2)
    start()
    os.unsetenv(host.MARK)
    host.mark("lease", 3)
    start()


def after_the_environment_of_python_was_replaced() -> None:
    host.mark("lease", 1)
    os.environ = dict(os.environ)  # type: ignore[assignment]  # noqa: B003
    host.mark("lease", 2)
    start()
    start(dict(os.environ))


def lease_after_lease() -> None:
    entries = len(subprocess.run(["env", "-0"], check=True, capture_output=True).stdout.split(b"\0"))
    for number in range(3000):
        host.mark("lease" * (number % 7) + str(number), number)
        bytearray(64 + number % 512)  # what was freed would be used again
    now = subprocess.run(["env", "-0"], check=True, capture_output=True).stdout.split(b"\0")
    os.write(1, str(len(now) - entries).encode())


def within_a_row_of_another_scheduler() -> None:
    os.environ[host.MARK] = "that one's 5"
    host.mark("lease", 1)
    start()


@pytest.mark.parametrize(
    ("work", "marks"),
    [
        (row_after_row, ["lease 7"] * 2 + ["lease 123456789012345678"] * 2),
        (after_user_code_put_its_environment_back, ["lease 2"]),
        (under_another_lease, ["other 1"]),
        (after_a_library_changed_the_environment_of_c, ["lease 2", "lease 3"]),
        (after_the_environment_of_python_was_replaced, ["lease 2"] * 2),
        (lease_after_lease, ["1"]),
        (beside_other_variables, ["lease 2"]),
        (within_a_row_of_another_scheduler, ["lease 1"]),
    ],
)
def test_what_a_row_starts_carries_its_mark(work: Callable[[], None], marks: list[str]) -> None:
    assert in_a_child(work).splitlines() == marks


def grown() -> None:
    """By how many pages this process is larger after so many rows."""

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1])

    host.mark("a lease of some length", 1)
    before = pages()
    for claim in range(100_000):
        host.mark("a lease of some length", claim)
    os.write(1, str(pages() - before).encode())


@pytest.mark.skipif(sys.platform != "linux", reason="where sizes are told otherwise")
def test_marks_of_many_rows_cost_no_memory() -> None:
    assert int(in_a_child(grown)) < 500
