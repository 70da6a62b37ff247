"""Process trees under measurement: started, watched, stopped, accounted for."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import servers

from bench import usage

UNDER = Path(__file__).with_name("under.py")
STOP_WITHIN = 40.0  # seconds to end after SIGTERM, before the tree is killed
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Spent:
    """What a tree used, from its first process's start to the end of its last."""

    started: float  # wall clock
    started_ns: int  # CLOCK_MONOTONIC, like ended_ns
    ended_ns: int  # when the last of its commands ended
    cpu: float  # seconds, of all processes
    codes: tuple[int | None, ...]

    @property
    def seconds(self) -> float:
        """From start to the last command's end."""
        return (self.ended_ns - self.started_ns) / 1e9


class Tree:
    """Commands that run side by side, and all their descendants."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, out: Path, log: Path) -> None:
        self._process = process
        self._mark = mark
        self._out = out
        self._log = log
        self._spent: Spent | None = None

    @property
    def output(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Its living processes, without the accountant above them."""
        with suppress(psutil.Error):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def usage(self) -> usage.Usage:
        """What its processes have used so far."""
        return usage.of(self.processes())

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False, every: float = 0.05) -> bool:
        """Wait until it has ended by itself or `until` is true; False if neither happened in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None or until():
                return True
            time.sleep(every)
        return False

    def stop(self) -> Spent:
        """End it if it still runs; what it used."""
        if self._spent is not None:
            return self._spent
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_WITHIN)
        self.kill()
        if not self._out.exists():
            raise RuntimeError(f"it didn't stop within {STOP_WITHIN:g} s and was killed:\n{self.output[-3000:]}")
        found = json.loads(self._out.read_text())
        self._spent = Spent(**{**found, "codes": tuple(found["codes"])})
        return self._spent

    def kill(self) -> None:
        """SIGKILL for whatever is left."""
        servers.kill(servers.Family(lambda mark: mark == self._mark))
        self._process.wait()


@contextmanager
def running(commands: Sequence[Sequence[str]], env: Mapping[str, str], cwd: Path) -> Iterator[Tree]:
    """Run commands meanwhile; on leaving they are stopped."""
    folder = servers.folder("tree")
    mark = f"{servers.RUN}/bench{next(_numbers)}"
    plan = json.dumps({"commands": [list(command) for command in commands], "out": str(folder / "spent")})
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(UNDER), plan],
            env={**os.environ, **env, servers.MARK: mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    tree = Tree(process, mark, folder / "spent", folder / "log")
    try:
        yield tree
        tree.stop()
    finally:
        tree.kill()


def run(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float = 600, good: Sequence[int] = (0,)
) -> str:
    """Run a command to its end, which must be a good one; its output."""
    done = subprocess.run(
        command,
        env={**os.environ, **env, servers.MARK: f"{servers.RUN}/bench{next(_numbers)}"},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode not in good:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
