"""The last of what a row's handler writes, kept where its worker finds it too if the horse dies."""

from __future__ import annotations

import mmap
import struct
from functools import partial

LINES = 200
_TOTAL, _AT, _START = struct.Struct("=q"), slice(1, 9), 64


class Tail:
    """A ring of SIZE bytes in memory that a worker and its horse share; made before the fork."""

    SIZE = 16 * 1024

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _START + self.SIZE)
        self.has_written = partial(self._memory.__getitem__, 0)  # asked before and after each row: true if anything was

    @property
    def total(self) -> int:
        """How many bytes have been written since clear()."""
        total: int = _TOTAL.unpack_from(self._memory, 1)[0]
        return total

    def clear(self) -> None:
        """Begin anew, for the next row."""
        self._memory[_AT] = _TOTAL.pack(0)
        self._memory[0] = 0

    def write(self, data: bytes) -> None:
        """Keep the end of it."""
        total, size = self.total, self.SIZE
        end = total + len(data)
        data = data[-size:]
        at = (end - len(data)) % size
        first = data[: size - at]
        self._memory[_START + at : _START + at + len(first)] = first
        self._memory[_START : _START + len(data) - len(first)] = data[len(first) :]
        self._memory[_AT] = _TOTAL.pack(end)
        self._memory[0] = 1

    def text(self) -> str | None:
        """The last lines, with a mark where some were cut off; None if nothing was written."""
        total, size = self.total, self.SIZE
        if not total:
            return None
        ring, at = self._memory[_START : _START + size], total % size
        kept = ring[:total] if total <= size else ring[at:] + ring[:at]
        if total > size:
            kept = kept.partition(b"\n")[2] or kept  # the first line has lost its beginning
        kept = b"".join(kept.splitlines(keepends=True)[-LINES:])
        cut = total - len(kept)
        mark = f"[… {cut} bytes cut …]\n" if cut else ""
        return mark + kept.decode(errors="replace")
