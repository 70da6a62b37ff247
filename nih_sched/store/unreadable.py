"""Rows whose keys can't be read: SQLite takes any bytes for a text, and Python's driver gives back none but UTF-8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, literal_column, or_
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ColumnElement

from nih_sched.dialects import Dialect
from nih_sched.table import RowTable

NAMED = 10  # rows that were left out which are named


@dataclass(frozen=True)
class Unreadable:
    """A row that has no key for us: nobody can name it, so it is left alone."""

    number: int | None  # its rowid, where the table has such
    key: str  # what can be shown of it

    def __str__(self) -> str:
        return f"rowid {self.number}" if self.number is not None else f"key {self.key}"


class Aside:
    """Passes over those that were found; nothing is asked for them before one is met."""

    def __init__(self, dialect: Dialect, rows: RowTable) -> None:
        self._dialect = dialect
        self._rows = rows
        self._parts: list[set[bytes]] = [set() for _ in rows.keys]
        self.found: list[Unreadable] = []

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """Of rows that aren't among them: a text that is none is so in every row."""
        return [
            or_(raw.is_(None), raw.not_in(sorted(parts)))
            for key, parts in zip(self._rows.keys, self._parts, strict=True)
            if parts and (raw := self._dialect.raw_text(key)) is not None
        ]

    def learn(self, connection: Connection, query: Select[Any]) -> list[Unreadable]:
        """Find them among the rows of a query that has failed; return them, none if it has failed for another reason.

        Args:
            connection: to read by.
            query: of the user's table.
        """
        raw = [self._dialect.raw_text(key) for key in self._rows.keys]
        if any(one is None for one in raw):
            return []
        new: list[Unreadable] = []
        for number, *parts in self._raw(connection, query, raw):
            odd = [n for n, part in enumerate(parts) if part is not None and _is_none(part)]
            for n in odd:
                self._parts[n].add(parts[n])
            if odd:
                shown = ",".join("…" if part is None else part.decode(errors="replace") for part in parts)
                new.append(Unreadable(number, shown))
        self.found += new
        return new

    def _raw(self, connection: Connection, query: Select[Any], raw: list[Any]) -> list[Any]:
        table = connection.dialect.identifier_preparer.format_table(self._rows.table)
        try:
            return list(connection.execute(query.with_only_columns(literal_column(f"{table}._rowid_"), *raw)))
        except DBAPIError:  # a table WITHOUT ROWID
            return list(connection.execute(query.with_only_columns(literal_column("NULL"), *raw)))


def _is_none(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False
