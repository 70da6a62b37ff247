"""Linux's inotify: that a file was written to, without looking at it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable

MODIFIED = 0x2  # IN_MODIFY of inotify(7)


class FileEvents:
    """Becomes readable when one of its files is written to; where the system can't tell, never."""

    def __init__(self) -> None:
        self._line: int | None = None
        with contextlib.suppress(AttributeError, OSError):  # not on macOS; or a sandbox forbids it
            self._system = ctypes.CDLL(None)
            made = self._system.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            self._line = made if made >= 0 else None

    def fileno(self) -> int | None:
        """What becomes readable; None where the system can't tell."""
        return self._line

    def add(self, paths: Iterable[str]) -> None:
        """Tell of these files too; of one that it knows, or that isn't there, this changes nothing."""
        for path in paths:
            if self._line is not None:
                self._system.inotify_add_watch(self._line, os.fsencode(path), MODIFIED)

    def happened(self) -> bool:
        """Whether anything was written since the last call."""
        if self._line is None:
            return False
        try:
            return bool(os.read(self._line, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """No more of it."""
        line, self._line = self._line, None
        if line is not None:
            os.close(line)
