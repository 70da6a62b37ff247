"""What a row may leave behind is seen before the next one runs."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nih_sched import host
from nih_sched.runner.traces import CLOSELY_EVERY, Traces


class Defiant:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("don't look")

    __hash__ = object.__hash__

    def __call__(self, *args: Any) -> None:
        pass

    def flush(self) -> None:
        pass


def in_a_child(row: Callable[[], object], *, thoroughly: bool = False, closely: bool = True) -> bool:
    """Whether a row that does this in a process of its own leaves traces there."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            traces = Traces()
            if not traces.left(closely=closely) and not traces.left(thoroughly=True, closely=closely):
                row()
                os.write(sink, b"yes" if traces.left(thoroughly=thoroughly, closely=closely) else b"no")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # in such a process not even coverage's os._exit() works
    os.close(sink)
    os.waitpid(pid, 0)
    with os.fdopen(source) as answers:
        answer = answers.read()
    assert answer in ("yes", "no")
    return answer == "yes"


LEFT: dict[str, Callable[[], object]] = {
    "folder": lambda: os.chdir("/"),
    "variable": lambda: os.environ.update(NEW="1"),
    "no variable": lambda: os.environ.pop("HOME"),
    "other value": lambda: os.environ.update(HOME="/nowhere"),
    "thread": lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(),
    "child": lambda: subprocess.Popen(["sleep", "0.2"]),
    "handler": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "alarm's handler": lambda: signal.signal(signal.SIGALRM, lambda number, frame: None),
    "odd handler": lambda: signal.signal(signal.SIGUSR2, Defiant()),
    "blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]),
    "umask": lambda: os.umask(0o777),
    "path": lambda: sys.path.insert(0, "/nowhere"),
    "no path": lambda: setattr(sys, "path", None),
    "recursion": lambda: sys.setrecursionlimit(500),
    "no output": lambda: setattr(sys, "stdout", None),
    "odd output": lambda: setattr(sys, "stderr", Defiant()),
}
LEFT_FOR_LATER: dict[str, Callable[[], object]] = {
    "limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50)),
    "nice": lambda: os.nice(1),
    "rare handler": lambda: signal.signal(signal.SIGWINCH, signal.SIG_IGN),
    "closed output": lambda: sys.stdout.close(),  # noqa: PLW0108 - pytest changes sys.stdout
}
NOT_LEFT: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "its mark": lambda: os.environ.update({host.MARK: "of this row"}),
    "a child that was waited for": lambda: subprocess.run(["true"], check=True),
    "its own alarm": lambda: (signal.alarm(9), signal.alarm(0)),
    "a variable for a while": lambda: (os.environ.update(NEW="1"), os.environ.pop("NEW")),
    "rubbish": gc.collect,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_seen_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_a_child(LEFT[name])


@pytest.mark.parametrize("name", LEFT)
def test_between_short_rows_it_is_seen_some_milliseconds_later_at_most(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_a_child(lambda: (LEFT[name](), time.sleep(CLOSELY_EVERY)), closely=False)


@pytest.mark.parametrize("name", LEFT_FOR_LATER)
def test_some_is_seen_at_the_jobs_end(name: str) -> None:
    assert in_a_child(LEFT_FOR_LATER[name], thoroughly=True)


@pytest.mark.parametrize("thoroughly", [False, True])
@pytest.mark.parametrize("name", NOT_LEFT)
def test_an_orderly_row_leaves_none(name: str, thoroughly: bool) -> None:
    assert not in_a_child(NOT_LEFT[name], thoroughly=thoroughly)
