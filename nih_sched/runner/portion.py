"""How many rows a horse begins and reads at once: the values of a batch mustn't fill its memory.

Short rows it begins in two portions, so that the second one can be begun by its worker while the first one runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import JSON, Column, LargeBinary, String
from sqlalchemy.types import NullType

from nih_sched.model import StartedRow

LIMIT = 8 * 2**20  # characters or bytes that are read at once, as far as can be known before
FIRST = 8  # rows of which nothing is known yet
NARROW = 1000  # characters that a column may hold without being looked at
LEAST = 0.0003  # seconds that a row must take: with shorter ones, both are busy enough
LEAD = 0.15  # seconds of rows that the horse begins itself: in that time its worker begins the rest
CARRIED = 2 * 2**20  # characters or bytes of those at most, as far as can be known before
WORTH = 200  # rows that its worker begins at least: fewer take the horse 5 ms itself


class Portion:
    """One handler's, learned from the rows that it has had."""

    def __init__(self, columns: Sequence[Column[Any]]) -> None:
        self._wide = [column.name for column in columns if _is_wide(column)]
        self._heaviest = LIMIT // FIRST if self._wide else 1
        self._each = 0.0  # seconds that a row took lately, with all that there is to it
        self.asks = True  # until the worker has failed at it: the next ones' values may be too large or too odd as well

    @property
    def size(self) -> int:
        """How many rows to read at once."""
        return max(1, LIMIT // self._heaviest)

    def lead(self, count: int) -> int:
        """How many of a job's rows to begin first, if the rest is asked for then."""
        first = math.ceil(LEAD / self._each) if self._each >= LEAST else self.size
        return min(first, self.size) if self.is_worth_asking(count - first) else self.size

    def is_worth_asking(self, count: int) -> bool:
        """Whether to have so many more rows begun, while others run."""
        some = min(count, self.size)
        return self.asks and self._each >= LEAST and some >= WORTH and some * self._heaviest <= CARRIED

    def timed(self, count: int, seconds: float) -> None:
        """So many rows took so long."""
        if count:
            self._each = seconds / count

    def note(self, rows: Sequence[StartedRow]) -> None:
        """Learn from these. A heavy row is remembered, half as heavy with each portion that follows."""
        if self._wide and rows:
            heaviest = max(sum(_weight(row.values.get(name)) for name in self._wide) for row in rows)
            self._heaviest = max(heaviest, self._heaviest // 2, 1)


def _is_wide(column: Column[Any]) -> bool:
    kind = column.type
    if isinstance(kind, String):
        return kind.length is None or kind.length > NARROW
    return isinstance(kind, LargeBinary | JSON | NullType)


def _weight(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 0 if value is None or isinstance(value, int | float) else len(str(value))
