"""What a row may leave behind in its process, for the next one to stumble over."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal() makes an enum of each answer: a microsecond, for nine signals and each row
import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nih_sched import host
from nih_sched.runner.streams import Tee

# SIGALRM is among the common ones alone: each job has a handler of its own for it, and all the rest outlives a job.
ALL = sorted(map(int, signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGALRM}))
COMMON = [
    *map(int, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM)),
    *map(int, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGPIPE)),
]
CLOSELY_EVERY = 0.005  # seconds: what it costs to see children and blocked signals is half of all between two rows
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


class Traces:
    """The process as it was before its first row. Modules' own variables aren't looked at: rows share them."""

    def __init__(self) -> None:
        # A microsecond for each row; the mapping itself would decode every name and value.
        self._raw: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
        self._mark = os.environ.encodekey(host.MARK) if hasattr(os.environ, "encodekey") else host.MARK
        self._see_streams()
        self._all_before = self._look(ALL), _limits()
        self.pid = os.getpid()
        self.again()

    def again(self) -> None:
        """Before the first row of another job, in a process in which the one before has left nothing behind."""
        self._environment = dict(self._raw)
        self._see_streams()
        self._before, self._blocked = self._look(COMMON), _signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._childless = not _has_children()  # a stock worker's horse has got its keeper meanwhile
        self._next_closely = 0.0

    def _see_streams(self) -> None:
        # Those behind our own, which ask them in Python.
        self._streams = [one.stream if isinstance(one, Tee) else one for one in (sys.stdout, sys.stderr)]

    def left(self, *, thoroughly: bool = False, closely: bool = True) -> bool:
        """Whether rows have changed folder, environment, signals and suchlike, or left threads or children running.

        Args:
            thoroughly: look at every signal and limit, as is affordable once in a while.
            closely: at children and blocked signals in any case, not only if that was some milliseconds ago.
        """
        try:
            return self._left(thoroughly=thoroughly, closely=closely)
        except Exception:  # user code: what it has put there defies being looked at, or compared
            return True

    def _left(self, *, thoroughly: bool, closely: bool) -> bool:
        if self._mark in self._raw:
            self._environment[self._mark] = self._raw[self._mark]  # each row has its own
        if thoroughly and (self._look(ALL), _limits()) != self._all_before:
            return True
        if self._look(COMMON) != self._before or self._raw != self._environment:
            return True
        now = time.monotonic()
        if now < self._next_closely and not closely:
            return False
        self._next_closely = now + CLOSELY_EVERY
        return _signal.pthread_sigmask(signal.SIG_BLOCK, ()) != self._blocked or (self._childless and _has_children())

    def _look(self, signals: Sequence[int]) -> tuple[Any, ...]:
        try:
            folder = os.getcwd()
        except OSError:  # it is gone
            folder = ""
        mask = os.umask(0o77)  # it can't be read without being set
        os.umask(mask)
        out, err = self._streams
        return (
            folder,
            mask,
            threading.active_count(),  # also those that C code has started, which _thread doesn't count
            sys.getrecursionlimit(),
            [*sys.path],
            sys.stdout,
            sys.stderr,
            getattr(out, "closed", None),
            getattr(err, "closed", None),
            [*map(_signal.getsignal, signals)],
            resource.getrlimit(resource.RLIMIT_NOFILE),
        )


def _limits() -> tuple[Any, ...]:
    return os.nice(0), [resource.getrlimit(number) for number in LIMITS]


def _has_children() -> bool:
    """Whether a child is alive, or has died unheeded. A zombie is harmless, and may be the next look's living one."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # nearly always, and for a microsecond
        return False
    return True


class Growth:
    """How much this process has grown since; 0 where the system doesn't tell cheaply."""

    def __init__(self) -> None:
        self._memory, self._files = _size()

    def is_within(self, memory: float, files: int) -> bool:
        """Whether it has grown by less than so many MB and so many open files."""
        now = _size()
        return now[0] - self._memory < memory and now[1] - self._files < files


def _size() -> tuple[float, int]:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))
    return 0.0, 0
