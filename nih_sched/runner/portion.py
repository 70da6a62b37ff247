"""How many rows a horse reads at once: the values of a batch mustn't fill its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import JSON, Column, LargeBinary, String
from sqlalchemy.types import NullType

from nih_sched.model import StartedRow

LIMIT = 8 * 2**20  # characters or bytes that are read at once, as far as can be known before
FIRST = 8  # rows of which nothing is known yet
NARROW = 1000  # characters that a column may hold without being looked at


class Portion:
    """One handler's, learned from the rows that it has had."""

    def __init__(self, columns: Sequence[Column[Any]]) -> None:
        self._wide = [column.name for column in columns if _is_wide(column)]
        self._heaviest = LIMIT // FIRST if self._wide else 1

    @property
    def size(self) -> int:
        """How many rows to read at once."""
        return max(1, LIMIT // self._heaviest)

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
