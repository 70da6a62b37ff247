"""A horse that serves many jobs: forked once, handed one RQ job after the other over a socket."""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from nih_sched import host

BEGUN, DONE, TIRED, DEAD = b"b", b"d", b"t", b""  # what a horse answers; the last one is its silence
GONE = os.WEXITED | os.WNOHANG | os.WNOWAIT  # has it ended? It stays to be waited for
PATIENCE = 2.0  # seconds for which one that has nothing to do any more may take to end
LENGTH = 4  # bytes in front of each order, that say how long it is
JOBS = 1000  # that one horse serves; whatever leaks, leaks no further
MEMORY, FILES = 256.0, 100  # MB, and open files, by which it may grow

Order = dict[str, Any]
Hear = Callable[[], Order]  # what the worker says next
Serve = Callable[[Order, Hear], bool]  # whether the horse may go on


class WarmHorse:
    """The worker's end."""

    def __init__(self, prepare: Callable[[], Serve], leave: Callable[[], None]) -> None:
        """Fork.

        Args:
            prepare: called in the horse; makes what is then called for each order.
            leave: called in the horse at its end, if it comes to one of its own.
        """
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            host.forked()
            os.setpgrp()
            self._socket.close()
            _be(theirs, prepare, leave)
        theirs.close()

    def hand_over(self, order: Order) -> None:
        """Give it a job, or say more of it. One that dies before it has answered BEGUN hasn't touched it."""
        with contextlib.suppress(OSError):  # it is dead: answer() says so
            # Its own child, of the same Python: so an order may be said in Python's own bytes.
            said = marshal.dumps(order)
            self._socket.sendall(len(said).to_bytes(LENGTH) + said)

    def answer(self, seconds: float) -> bytes | None:
        """Its next answer, the same one until heard() is called; None when there was none within `seconds`."""
        if not select.select([self._socket], [], [], seconds)[0]:
            # What it has forked may hold its end of the socket open; the system knows better.
            return None if os.waitid(os.P_PID, self.pid, GONE) is None else DEAD
        try:
            return self._socket.recv(1, socket.MSG_PEEK)  # RQ's alarm may cut us short here, and none may get lost
        except OSError:
            return DEAD

    def heard(self) -> None:
        """Its last answer was taken note of; without one this does nothing."""
        with contextlib.suppress(OSError):
            self._socket.recv(1, socket.MSG_DONTWAIT)

    def bury(self, patience: float = 0.0) -> tuple[int | None, int | None, Any]:
        """Wait for its end, and end all of its process group; its pid, status and resource usage, as os.wait4 says.

        Args:
            patience: seconds for which it may end by itself, which it does when nothing is to be expected any more.
        """
        self._socket.close()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and os.waitid(os.P_PID, self.pid, GONE) is None:
            time.sleep(0.005)
        self._kill()
        ended: tuple[int | None, int | None, Any] = None, None, None
        with contextlib.suppress(ChildProcessError):
            ended = os.wait4(self.pid, 0)
        self._kill()
        return ended

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _be(theirs: socket.socket, prepare: Callable[[], Serve], leave: Callable[[], None]) -> None:
    """The horse's life."""
    code = 1
    try:
        os.register_at_fork(after_in_child=theirs.close)  # whoever survives us must not look like us
        serve = prepare()
        with theirs.makefile("rb") as orders:

            def hear() -> Order:
                if (order := _next(orders)) is None:
                    raise BrokenPipeError
                return order

            while (order := _next(orders)) is not None:
                theirs.sendall(BEGUN)
                goes_on = serve(order, hear)
                theirs.sendall(DONE if goes_on else TIRED)
                if not goes_on:
                    break
        leave()
        code = 0
    except BrokenPipeError:
        code = 0  # the worker is gone
    except BaseException:  # the child's outermost frame: nothing may unwind into the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def _next(orders: BinaryIO) -> Order | None:
    length = int.from_bytes(orders.read(LENGTH))
    said = orders.read(length)
    if not length or len(said) < length:  # the worker is gone, in the middle of a word perhaps
        return None
    order: Order = marshal.loads(said)  # noqa: S302 - of the process that has forked us
    return order
