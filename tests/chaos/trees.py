"""The schedulers' process trees, seen from outside: started, started again when they end, frozen, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import servers

from chaos.journal import Journal

ROLES = {"sched-producer": "producer", "sched-keeper": "keeper", "sched-worker": "worker", "sched-horse": "horse"}
UP = b'"event": "worker_started"'


@dataclass(frozen=True)
class Member:
    """A process of a tree."""

    pid: int
    parent: int
    role: str


class Tree:
    """One scheduler on this host, whose successor starts a moment after it has ended, however it ended."""

    def __init__(
        self, number: int, command: Sequence[str], env: Mapping[str, str], folder: Path, workers: int, journal: Journal
    ) -> None:
        self.number = number
        self.pause = 1.0  # seconds until the successor starts; a fault may set another
        self.held = False  # whether a fault has it frozen, or is about to end it: no other may choose it then
        self.frozen: set[int] = set()  # single processes of it that a fault has frozen
        self._command = list(command)
        self._env = dict(env)
        self._folder = folder
        self._workers = workers
        self._journal = journal
        self._life = 0
        self._mark = ""
        self._asked = False
        self._closing = threading.Event()
        self._log = folder / f"tree-{number}.log"
        self._log_from = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Start it, and have it started again from now on."""
        self._spawn()
        self._watcher.start()

    def _spawn(self) -> None:
        self._life += 1
        self._mark = f"{servers.RUN}/tree{self.number}.{self._life}"
        self._asked = False
        env = {**self._env, servers.MARK: self._mark, "CHAOS_TREE": f"{self.number}.{self._life}"}
        with self._log.open("ab") as log:
            self._log_from = log.tell()
            self.process = subprocess.Popen(
                self._command, env=env, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._journal.write("tree-started", tree=self.number, life=self._life, pid=self.process.pid)

    def _watch(self) -> None:
        while not self._closing.is_set():
            process = self.process
            if process is not None and (code := process.poll()) is not None:
                self._journal.write(
                    "tree-ended", tree=self.number, life=self._life, code=code, asked=self._asked, up=self.is_up
                )
                if self._closing.wait(self.pause):
                    return
                self._spawn()
            time.sleep(0.05)

    @property
    def is_up(self) -> bool:
        """Whether each of its workers has begun."""
        with self._log.open("rb") as log:
            log.seek(self._log_from)
            return log.read().count(UP) >= self._workers

    def expect_end(self) -> None:
        """Its end from now on is a fault's doing, not its own."""
        self._asked = True

    @property
    def name(self) -> str:
        """As in the handler's trace."""
        return f"{self.number}.{self._life}"

    @property
    def mark(self) -> str:
        """What tells this life's processes."""
        return self._mark

    def members(self, mark: str | None = None) -> list[Member]:
        """Its living processes, orphans included, supervisor first and horses last."""
        this = mark or self._mark
        found = []
        for process in servers.processes(servers.Family(lambda seen: seen == this)):
            with suppress(psutil.Error):
                parent = process.ppid()
                supervisor = self.process is not None and process.pid == self.process.pid
                role = "supervisor" if supervisor else ROLES.get(process.name(), "other")
                found.append(Member(process.pid, parent, role))
        order = ["supervisor", *ROLES.values(), "other"]
        return sorted(found, key=lambda member: (order.index(member.role), member.pid))

    def kill(self, mark: str | None = None, known: Iterable[Member] = ()) -> None:
        """SIGKILL for every process at once, those known first, and for what they forked meanwhile."""
        send(signal.SIGKILL, known)
        end = time.monotonic() + 10
        while (left := self.members(mark)) and time.monotonic() < end:
            send(signal.SIGKILL, left)
            time.sleep(0.01)

    def freeze(self, known: Sequence[Member]) -> list[Member]:
        """SIGSTOP for every process at once, those known first, and for what they forked meanwhile; who is frozen."""
        send(signal.SIGSTOP, known)
        seen = {member.pid for member in known}
        while more := [member for member in self.members() if member.pid not in seen]:
            send(signal.SIGSTOP, more)
            seen |= {member.pid for member in more}
        return [member for member in self.members() if member.pid in seen]

    def close(self, seconds: float) -> int | None:
        """SIGTERM, and its exit code; None if it didn't end in time, and had to be killed."""
        self._closing.set()
        self._watcher.join(5)
        self.expect_end()
        process = self.process
        if process is None:
            return 0
        process.terminate()
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
        self.kill()
        process.wait()
        return code


def send(number: signal.Signals, members: Iterable[Member]) -> None:
    """A signal to each that is still there."""
    for member in members:
        with suppress(ProcessLookupError):
            os.kill(member.pid, number)
