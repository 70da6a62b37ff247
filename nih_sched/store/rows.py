"""Statements on the user's table outside a row's way: inserting rows, and leaving the table as it was found."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import Any

from sqlalchemy import Column, Connection, Engine, insert, or_, select, update

from nih_sched.dialects import dialect_of
from nih_sched.errors import NihError, NoSuchRow, UsageError
from nih_sched.ledger import Ledger
from nih_sched.model import Key, State, decode_key
from nih_sched.store.claims import CHUNK
from nih_sched.store.desk import Desk, source_desk, source_facts
from nih_sched.table import RowTable


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("it holds whole numbers") from None


_PARSERS: dict[type, Callable[[str], Any]] = {
    int: _whole,
    float: float,
    Decimal: Decimal,
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    bytes: str.encode,
    dict: json.loads,
    list: json.loads,
}
_BOOLEANS = {"true": True, "1": True, "yes": True, "t": True, "false": False, "0": False, "no": False, "f": False}


def insert_rows(engine: Engine, rows: RowTable, records: Iterable[dict[str, Any]], told: Callable[[int], None]) -> int:
    """Insert records in one transaction, ready unless they say otherwise; return how many.

    Args:
        engine: the database.
        rows: the table.
        records: column name -> value; texts are read as the column's type asks.
        told: called with the count so far, now and then.
    """
    count = 0
    stream = iter(records)
    with engine.begin() as connection:
        while chunk := list(islice(stream, CHUNK)):
            by_shape: dict[tuple[str, ...], list[dict[str, Any]]] = {}
            for record in chunk:
                full = {rows.status.name: rows.words[State.READY], **record}
                by_shape.setdefault(tuple(full), []).append(full)
            for shape in by_shape.values():
                connection.execute(insert(rows.table), shape)
            count += len(chunk)
            told(count)
    return count


def parse_value(column: Column[Any], text: str) -> Any:
    """A value that was typed as text, in the column's own type; unknown types are left to the database.

    Raises:
        ValueError: the text can't be such a value.
    """
    try:
        kind: type = column.type.python_type
    except NotImplementedError:
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"{text!r} is neither true nor false")
        return _BOOLEANS[text.lower()]
    if text == "" and kind is not str:
        return None
    parse: Callable[[str], Any] = _PARSERS.get(kind, str)
    return parse(text)


def parse_key(desk: Desk, text: str) -> Key:
    """A key as show_key() shows it and a person types it, in the columns' own types.

    Raises:
        UsageError: it can't be a key of this table.
        NoSuchRow: of that type, but beyond what its column holds.
    """
    rows = desk.rows
    parts = [text] if len(rows.keys) == 1 else text.split(",")
    names = ",".join(column.name for column in rows.keys)
    if len(parts) != len(rows.keys):
        raise UsageError(reason=f"{text!r} is no key of {rows.name}: expected {names}.")
    try:
        key = tuple(_parse_part(column, part) for column, part in zip(rows.keys, parts, strict=True))
    except (ValueError, ArithmeticError) as error:
        raise UsageError(reason=f"{text!r} is no key of {rows.name} ({names}): {error}") from error
    if not all(desk.dialect.holds(column, part) for column, part in zip(rows.keys, key, strict=True)):
        raise NoSuchRow(table=rows.name, key=text)
    return key


def _parse_part(column: Column[Any], text: str) -> Any:
    try:
        kind: type = column.type.python_type
    except NotImplementedError:
        return text
    if kind is bytes:
        return bytes.fromhex(text)
    return uuid.UUID(text) if kind is uuid.UUID else parse_value(column, text)


def running_count(engine: Engine, ledger: Ledger) -> int:
    """How many claims of any source have begun and not ended."""
    attempts = ledger.attempts
    query = select(attempts.c.id).where(attempts.c.started_at.is_not(None), attempts.c.finished_at.is_(None))
    with dialect_of(engine).reading(engine) as connection:
        return len(connection.execute(query.where(attempts.c.open_key.is_not(None))).all())


def give_all_back(engine: Engine, ledger: Ledger) -> tuple[int, list[str]]:
    """Set every row that has an open claim back to its source's ready word, and close the claims.

    Returns:
        how many rows were set back, and the names of all sources.
    """
    with dialect_of(engine).reading(engine) as connection:
        sources: Sequence[str] = connection.execute(select(ledger.sources.c.name)).scalars().all()
    return sum(_give_source_back(engine, ledger, name) for name in sources), list(sources)


def _give_source_back(engine: Engine, ledger: Ledger, name: str) -> int:
    try:
        desk = source_desk(engine, ledger, name, source_facts(engine, ledger, name) or "{}")
    except NihError:
        return 0  # its table is gone: nothing is left to give back
    attempts, rows = ledger.attempts, desk.rows
    words = {rows.words[state] for state in (State.QUEUED, State.STARTED, State.RETRYING)}
    ours = or_(*(desk.dialect.is_word(rows.status, word) for word in words))

    def chunk(connection: Connection) -> tuple[int, int]:
        found = connection.execute(
            select(attempts.c.id, attempts.c.row_key)
            .where(attempts.c.source == name, attempts.c.open_key.is_not(None))
            .limit(CHUNK)
        ).all()
        if not found:
            return 0, 0
        changed = connection.execute(
            update(rows.table)
            .where(rows.keyed([decode_key(record.row_key) for record in found]), ours)
            .values({rows.status: rows.words[State.READY]})
        ).rowcount
        connection.execute(
            update(attempts)
            .where(attempts.c.id.in_([record.id for record in found]))
            .values(open_key=None, due_at=None)
        )
        return len(found), changed

    total = 0
    while True:
        looked, changed = desk.transact(chunk)
        total += changed
        if not looked:
            return total
