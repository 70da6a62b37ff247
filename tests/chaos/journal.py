"""What the rig writes down for the checker: faults.jsonl, one JSON object a line. A look into runs.log, too."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """Appends facts; from any thread."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "faults.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: str, **facts: Any) -> None:
        """One line: the event, the time, the facts."""
        line = json.dumps({"event": event, "t": round(time.monotonic(), 4), **facts})
        os.write(self._file, f"{line}\n".encode())


class Hands:
    """Which rows are in which horses' hands, by the handlers' own trace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._open: dict[int, tuple[int, float]] = {}  # pid -> key, start
        self._lock = threading.Lock()

    def of(self, pids: Iterable[int], age: float = 0.0) -> list[list[int]]:
        """[[key, pid], …] of the runs without an end among these processes that are `age` seconds old or older."""
        with self._lock:
            self._read()
            before = time.monotonic() - age
            found = [(pid, *self._open[pid]) for pid in sorted(pids) if pid in self._open]
            return [[key, pid] for pid, key, start in found if start <= before]

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            found = file.read()
        self._offset += len(found)
        *lines, self._rest = (self._rest + found).split(b"\n")
        for line in lines:
            words = line.split()
            if len(words) != 9 or words[8] != b".":
                continue
            what, key, pid = words[0], int(words[1]), int(words[4])
            if what == b"start":
                self._open[pid] = key, float(words[5])
            elif what != b"beat":
                self._open.pop(pid, None)
