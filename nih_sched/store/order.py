"""Rows in the order of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, and_, or_
from sqlalchemy.sql import ColumnElement

from nih_sched.model import Key


def in_key_order(keys: Sequence[Any], descending: bool) -> list[Any]:
    """What to order rows by."""
    return [key.desc() for key in keys] if descending else list(keys)


def beyond(keys: Sequence[Column[Any]], key: Key, descending: bool) -> ColumnElement[bool]:
    """Rows behind this key, said so that an index on several columns is used on every database."""
    first, part = keys[0], key[0]
    if len(keys) == 1:
        last: ColumnElement[bool] = first < part if descending else first > part
        return last
    parts: list[ColumnElement[bool]] = []
    for n, (column, value) in enumerate(zip(keys, key, strict=True)):
        same = [one == its for one, its in zip(keys[:n], key[:n], strict=True)]
        parts.append(and_(*same, column < value if descending else column > value))
    near = first <= part if descending else first >= part
    behind: ColumnElement[bool] = and_(near, or_(*parts))
    return behind
