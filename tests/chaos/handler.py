"""The handler that the schedulers run: its trace is a file, outside of the database and of Redis.

Each line is one write with O_APPEND: what, key, claim, attempt, pid, seconds on the machine's one monotonic clock,
the worker's pid, the tree's name, and a full stop, without which a line is torn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from nih_sched import Fail

FILE = "runs.log"  # in the folder in which the scheduler was started
BEAT = 0.1


def work(id: int, length_ms: int, fails: int, final_fail: int, claim_id: int, attempt: int) -> None:
    """Take a row's time, then end as the row says: `end`, `fail` (tries are left), `final` (Fail), `stop` (told to)."""
    tree = os.environ.get("CHAOS_TREE", "-")
    log = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(what: str) -> None:
        line = f"{what} {id} {claim_id} {attempt} {os.getpid()} {time.monotonic():.4f} {os.getppid()} {tree} .\n"
        os.write(log, line.encode())

    try:
        run(note, length_ms, fails, final_fail, attempt)
    finally:
        os.close(log)


def run(note: Callable[[str], None], length_ms: int, fails: int, final_fail: int, attempt: int) -> None:
    """The row itself."""
    try:
        note("start")
        left = length_ms / 1000  # of running: a frozen process has as much to do as before
        while left > 0:
            time.sleep(min(left, BEAT))
            left -= BEAT
            note("beat")
    except BaseException:
        note("stop")
        raise
    if final_fail:
        note("final")
        raise Fail("for good, as the row says")
    if attempt <= fails:
        note("fail")
        raise RuntimeError(f"attempt {attempt} of a row that fails {fails} times")
    note("end")
