"""What this machine tells of its processes: who lives, and under which boot; and the end of all that a row started."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

MARK = "_NIH_SCHED_ROW"  # in the environment of all that a horse starts: its lease and its claim
DIGITS = 20  # of a claim's id in it, filled up with spaces
_PADDED = b"%%-%dd" % DIGITS
LINUX = sys.platform == "linux"
ROUNDS = 20  # of killing, until nothing is left that could start more
TURN = 400_000  # nanoseconds that a process which should wake promptly runs at a time; less helps little, and costs
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # its system call's number; that of sched_getattr is the next
_SCHED_ATTR = struct.Struct("@IIQiIQQQ")  # as of Linux 3.14
_RESET_ON_FORK = 1
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # https://man7.org/linux/man-pages/man2/prctl.2.html


@functools.cache
def host_id() -> str:
    """What tells process ids of this host from those of another: its name, its boot, its space of process ids.

    Two containers on one machine share the boot, but not the space. And one user may be unable to see another's.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # macOS
        boot, space = f"{psutil.boot_time():.0f}", ""
    return f"{socket.gethostname()[:80]} {boot} {space} user {os.getuid()}"


def born(pid: int) -> int | None:
    """When a living process was started, on a clock that no change of the date moves; None when it is dead.

    Together with the pid it names one process for as long as the host is up.
    """
    if LINUX:
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                fields = file.read(4096).rpartition(b")")[2].split()
        except OSError:
            return None
        # Fields 3 and 22 of https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
        return None if fields[0] in b"ZX" else int(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time() * 100)
    except psutil.Error:
        return None


def lives(pid: int, when: int | None) -> bool:
    """Whether the process that had this pid, and was started then, is alive."""
    return bool(pid) and when is not None and born(pid) == when


def forked() -> None:
    """In a new child: have Python's garbage collector leave what the parent made alone.

    It writes into whatever it looks at, and what is written to isn't shared with the parent any more: 25 MB.
    """
    gc.freeze()


def name_process(name: str) -> None:
    """Name this process in ps, top and /proc (15 characters); where there is no such thing, don't."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def die_with(parent: int, number: int = signal.SIGKILL) -> bool:
    """Have this process get a signal when its parent dies; whether the system can do that.

    Args:
        parent: who that should be; if it is dead already, this process ends at once.
        number: the signal.
    """
    can = _prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os._exit(70)
    return can


def wake_promptly() -> None:
    """Have this process run as soon as it wakes, though others keep the cores busy; where that can't be had, don't.

    It asks the system for short turns, which come sooner, not for more time; what it starts doesn't.
    https://docs.kernel.org/scheduler/sched-eevdf.html, https://man7.org/linux/man-pages/man2/sched_setattr.2.html
    """
    number = _SCHED_SETATTR.get(os.uname().machine) if LINUX else None
    if number is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        call, attr = ctypes.CDLL(None).syscall, ctypes.create_string_buffer(_SCHED_ATTR.size)
        if call(number + 1, 0, attr, _SCHED_ATTR.size, 0) == 0:
            size, policy, flags, nice, priority, _, deadline, period = _SCHED_ATTR.unpack(attr.raw)
            # Nobody who has chosen another policy is meddled with; whose nice is below 0 would lose it in children.
            if policy == os.SCHED_OTHER and nice >= 0:
                flags |= _RESET_ON_FORK
                call(number, 0, _SCHED_ATTR.pack(size, policy, flags, nice, priority, TURN, deadline, period), 0)


def _prctl(option: int, value: int | bytes) -> bool:
    if LINUX:
        with contextlib.suppress(OSError, AttributeError):
            return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
    return False


class _Mark:
    """A horse's mark in the environment, changed in place for row after row.

    To set a variable anew costs glibc 80 bytes each time: it keeps every value that there has been, and looks for the
    new one among them. Memory given to putenv(3) is part of the environment, and may be changed; it may never be freed.
    """

    def __init__(self, lease: str) -> None:
        self.lease = lease
        self._prefix = f"{lease} ".encode()
        self._name = os.fsencode(MARK)
        start = len(self._name) + 1
        self._entry = ctypes.create_string_buffer(self._name + b"=", start + len(self._prefix) + DIGITS + 1)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._entry))
        self._value = memoryview(self._entry).cast("B")[start:-1]
        self._address = ctypes.addressof(self._entry) + start
        libc = ctypes.CDLL(None)  # an own one: what its functions take and return is set here alone
        self._putenv, self._getenv = libc.putenv, libc.getenv
        self._getenv.restype, self._getenv.argtypes = ctypes.c_void_p, [ctypes.c_char_p]

    def put(self, claim_id: int) -> None:
        """Have the mark be this claim's, for C and for Python."""
        value = self._prefix + _PADDED % claim_id
        self._value[:] = value
        # User code has put back an environment, or a library has copied it, as setproctitle does.
        if self._getenv(self._name) != self._address:
            self._putenv(self._entry)
        python = getattr(os.environ, "_data", None)
        if python is None:  # user code has put something else in its place
            os.environ[MARK] = value.decode()
        else:
            python[self._name] = value


_mark: _Mark | None = None


def mark(lease: str, claim_id: int) -> None:
    """In a horse: have what it starts from now on carry its mark."""
    global _mark  # noqa: PLW0603 - the environment is the process's, too
    if _mark is None or _mark.lease != lease:
        _mark = _Mark(lease)
    _mark.put(claim_id)


def end_all(
    leases: Iterable[str], horses: Iterable[tuple[int, int | None]] = (), claims: Iterable[int] | None = None
) -> bool:
    """Kill horses with all that they have started: their groups, their descendants, and what carries their mark.

    Args:
        leases: the leases under which they ran.
        horses: each one's pid, and when it was started: a number may have gone to another process since.
        claims: whose programs to end; by default those of all that ran under the leases.

    Returns:
        whether nothing of them is left.
    """
    leases = [lease for lease in leases if lease]  # an empty one would be the mark of every process there is
    wanted = {lease if claims is None else f"{lease} {claim}" for lease in leases for claim in (claims or [0])}
    victims, groups = set[int](), set[int]()
    for horse, when in horses:
        if lives(horse, when):
            victims |= _family(horse)
        # Else the number is another's by now; while a group lives, nobody gets its number.
        if horse > 1 and born(horse) in (None, when):
            groups.add(horse)
    looks = 0
    for _ in range(ROUNDS):
        victims |= {pid for pid in psutil.pids() if _group(pid) in groups or _is_marked(pid, wanted, claims is None)}
        victims = {pid for pid in victims if pid != os.getpid() and born(pid) is not None}
        looks = 0 if victims else looks + 1
        if looks == 2:  # one look may miss what a victim started, and left, while we looked
            return True
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if victims:
            time.sleep(0.01)
    return False


def _family(pid: int) -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _is_marked(pid: int, wanted: set[str], by_lease: bool) -> bool:
    try:
        environment: dict[str, str] = psutil.Process(pid).environ()
    except (psutil.Error, OSError):
        return False
    found = environment.get(MARK)
    return found is not None and (found.partition(" ")[0] if by_lease else found.rstrip(" ")) in wanted
