"""scheduler add: rows from options, CSV or JSON lines."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click
from sqlalchemy.exc import SQLAlchemyError

from nih_sched.cli.options import TABLE, settings_options
from nih_sched.dialects import address, connect
from nih_sched.dialects.base import reason
from nih_sched.errors import DatabaseRefused, NihError, UsageError
from nih_sched.settings import Settings
from nih_sched.store.rows import insert_rows, parse_value
from nih_sched.table import RowTable, reflect


@click.command()
@settings_options(TABLE)
@click.option("--set", "pairs", multiple=True, metavar="COLUMN=VALUE", help="A value of the row; repeat it.")
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), help="What FILE holds.  [default: by its name]")
@click.argument("file", required=False, type=click.File("r", encoding="utf-8-sig"))
def add(settings: Settings, pairs: tuple[str, ...], form: str | None, file: TextIO | None) -> None:
    """Insert rows, ready to run: one by --set, or all of FILE (CSV with a header, or JSON lines; - is standard input).

    All rows go in or none. Values given by --set are added to each row of FILE.
    """
    if not pairs and file is None:
        raise UsageError(reason="Nothing to add: give --set column=value, or a file.")
    engine = connect(settings.database_url)
    rows = reflect(engine, settings, address(engine.url))
    fixed = _pairs(rows, pairs)
    records = _records(rows, file, form, fixed) if file is not None else iter([fixed])
    try:
        count = insert_rows(engine, rows, records, _told)
    except SQLAlchemyError as error:
        raise DatabaseRefused(
            address=address(engine.url), what="the rows; none was added", reason=reason(error)
        ) from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise UsageError(reason=f"A value is beyond what the database holds; no row was added: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(reason=f"{file.name if file else ''} is not UTF-8 text; no row was added: {error}") from error
    click.echo(f"Added {count} rows to {settings.table}.")
    engine.dispose()
    if engine.dialect.name != "sqlite":  # whose changes are seen at once
        from nih_sched.doorbell import ring  # noqa: PLC0415 - to import redis takes as long as to add a row

        with contextlib.suppress(NihError, SQLAlchemyError):  # the rows are there, and will be found
            ring(settings)


def _pairs(rows: RowTable, pairs: tuple[str, ...]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(reason=f"--set {pair!r}: expected column=value.")
        record[name] = _value(rows, name, value, f"--set {name}")
    return record


def _records(rows: RowTable, file: TextIO, form: str | None, fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    form = form or ("csv" if str(file.name).endswith(".csv") else "jsonl")
    read = _csv if form == "csv" else _json_lines
    for line, record in read(file):
        where = f"{file.name}, line {line}"
        yield fixed | {name: _value(rows, name, value, where) for name, value in record.items()}


def _csv(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise UsageError(
                    reason=f"{file.name}, line {reader.line_num}: expected {len(reader.fieldnames or ())} values. "
                    "No row was added."
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise UsageError(reason=f"{file.name}, line {reader.line_num}: {error}. No row was added.") from error


def _json_lines(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(reason=f"{file.name}, line {number} isn't JSON: {error}. No row was added.") from error
        if not isinstance(record, dict):
            raise UsageError(reason=f"{file.name}, line {number}: expected an object. No row was added.")
        yield number, record


def _value(rows: RowTable, name: str, value: Any, where: str) -> Any:
    if name not in rows.table.columns:
        raise UsageError(
            reason=f"{where}: {rows.name} has no column {name!r}. It has: {', '.join(rows.columns)}. No row was added."
        )
    if not isinstance(value, str):
        return value
    try:
        return parse_value(rows.table.columns[name], value)
    except (ValueError, ArithmeticError) as error:
        raise UsageError(reason=f"{where}: column {name}: {error}. No row was added.") from error


def _told(count: int) -> None:
    if sys.stderr.isatty() and count >= 1000:
        click.echo(f"\r{count} rows …", err=True, nl=False)
