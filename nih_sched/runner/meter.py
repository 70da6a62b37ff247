"""What a row has used and written: CPU time, peak memory, the tail of its output. Short silent rows aren't measured."""

from __future__ import annotations

import contextlib
import resource
import sys
from time import monotonic, process_time

from nih_sched.model import Ended, Trail
from nih_sched.runner.tail import Tail

LONG = 0.01  # seconds that a row must have run to be measured: for shorter ones that would cost more than it tells
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, kilobytes here


class Meter:
    """One job's, in its horse."""

    def __init__(self, tail: Tail) -> None:
        self._tail, self._has_written = tail, tail.has_written
        self._cpu = self._looked = 0.0
        self._before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def begin(self) -> None:
        """A row begins."""
        if self._has_written():
            self._tail.clear()
        now = monotonic()
        if now - self._looked >= LONG:  # to ask costs as much as all else here: what short rows use meanwhile is little
            self._cpu, self._looked = process_time(), now

    def end(self) -> None:
        """The last row has ended; the next job's have a peak of their own."""
        _forget_peak()

    def note(self, ended: Ended) -> Ended:
        """A row has ended: the same with what is to be told of it."""
        if ended.seconds < LONG:
            return ended._replace(trail=Trail(self._tail.text())) if self._has_written() else ended
        cpu = process_time() - self._cpu
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        before, self._before = self._before, children
        cpu += children.ru_utime + children.ru_stime - before.ru_utime - before.ru_stime
        # Of programs that have ended the system tells the largest one ever: this row's, if it has grown meanwhile.
        grown = children.ru_maxrss if children.ru_maxrss > before.ru_maxrss else 0
        self._looked = 0.0
        _forget_peak()
        return ended._replace(trail=Trail(self._tail.text(), cpu, max(own.ru_maxrss, grown) * UNIT))


def _forget_peak() -> None:
    # 5 resets the peak: https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
