"""What every system runs for a row or a job. Nothing but the standard library: peers have environments of their own.

Each process counts its runs in 32 bytes of shared memory, a file in the folder BENCH_COUNTS: how many, when the first
began, when the last ended, and the time inside. That costs well under a microsecond a run, and is believed instead of
what a system says of itself.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import re
import struct
import sys
import threading
import time
from collections.abc import Callable

SLOT = struct.Struct("@qqqq")  # runs, first start, last end, ns inside: native words, which are never seen half written
LATE = 0.00006  # seconds by which a sleep may end late: so much of the time is burnt, and a row takes what it says
PR_SET_TIMERSLACK = 29  # Linux; without it a sleep ends 50 us later still. man 2 prctl
SPIN = os.environ.get("BENCH_SPIN") == "1"
STAMPED = os.environ.get("BENCH_STAMPED") == "1"  # jobs of peers say when they began
WARM_UP = 5  # probes that don't count
PATIENCE = 30.0  # seconds; what hasn't begun by then counts as so late, and no more are tried
TAIL = 64 * 1024  # a stamp is looked for in the newest ones only

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)

_page: mmap.mmap | None = None
_runs = _first = _inside = 0
_lock = threading.Lock()  # some run several at once in threads


def _open() -> mmap.mmap:
    path = os.path.join(os.environ["BENCH_COUNTS"], f"{os.getpid()}-{time.monotonic_ns()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, SLOT.size)
    page = mmap.mmap(fd, SLOT.size)
    os.close(fd)
    return page


def _forget() -> None:
    global _page, _runs, _first, _inside, _lock
    _page = None
    _runs = _first = _inside = 0
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _count(began: int, ended: int) -> None:
    global _page, _runs, _first, _inside
    with _lock:
        if _page is None:
            _page, _first = _open(), began
        _runs += 1
        _inside += ended - began
        SLOT.pack_into(_page, 0, _runs, _first, ended, _inside)


def _take(seconds: float) -> None:
    began = time.monotonic_ns()
    end = began + int(seconds * 1e9)
    if not SPIN and seconds > LATE:
        time.sleep(seconds - LATE)
    while time.monotonic_ns() < end:
        pass
    _count(began, time.monotonic_ns())


def noop(id: int, payload: str) -> None:
    """Nothing, counted."""
    if STAMPED:
        stamp(id)
        return
    now = time.monotonic_ns()
    _count(now, now)


def fail_some(id: int, payload: str) -> None:
    """One row in twenty fails, some calls deep."""
    if id % 20 == 0:
        _fail(id, 12)


def _fail(id: int, depth: int) -> None:
    if depth:
        return _fail(id, depth - 1)
    raise ValueError(f"the service answered 429 for row {id}")


def stay(id: int) -> None:
    """Run until told to stop."""
    while True:
        time.sleep(60)


def take_1ms(id: int, payload: str) -> None:
    """A millisecond."""
    _take(0.001)


def take_50ms(id: int, payload: str) -> None:
    """Fifty milliseconds."""
    _take(0.05)


def take_its_own(id: int, ms: float) -> None:
    """As long as the row says."""
    _take(ms / 1000)


def stamp(id: int) -> None:
    """Say when the row's handler began: one write with O_APPEND, a whole line whoever else writes."""
    now = time.monotonic_ns()
    fd = os.open(os.environ["BENCH_STAMPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{id} {now}\n".encode())
    os.close(fd)


def stamp_of(stamps: str, row: int) -> int | None:
    """When this row's handler first began, if it has."""
    try:
        with open(stamps, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            lines = file.read() if start else b"\n" + file.read()
    except FileNotFoundError:
        return None
    found = re.search(rf"\n{row} (\d+)\n".encode(), lines)
    return int(found[1]) if found else None


def waits(stamps: str, send: Callable[[], tuple[int, int]], count: int) -> list[float]:
    """Send so many one by one; milliseconds from each one's commit to its handler's first line.

    Args:
        stamps: the file in which handlers say when they begin.
        send: returns the row's number, and the CLOCK_MONOTONIC in nanoseconds of its commit's return.
        count: how many count, after those that warm up.
    """
    chance, found = random.Random(7), []
    for number in range(WARM_UP + count):
        row, committed = send()
        end = time.monotonic() + PATIENCE
        while (began := stamp_of(stamps, row)) is None and time.monotonic() < end:
            time.sleep(0.002)
        if began is None:
            return [*found, PATIENCE * 1000]
        if number >= WARM_UP:
            found.append((began - committed) / 1e6)
        time.sleep(chance.uniform(0.1, 0.6))  # so that it meets a poll at any point
    return found


def probe(send: Callable[[int], object], count: int) -> None:
    """In a peer's own process: print what waits() finds, for jobs with the numbers that `send` is given."""
    numbers = iter(range(1, WARM_UP + count + 1))

    def one() -> tuple[int, int]:
        number = next(numbers)
        send(number)
        return number, time.monotonic_ns()

    print(json.dumps(waits(os.environ["BENCH_STAMPS"], one, count)))
