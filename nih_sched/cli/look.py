"""What status, why, show and others that only look have in common."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import click

from nih_sched.dialects import address
from nih_sched.dialects.connect import identity
from nih_sched.errors import UsageError
from nih_sched.settings import Settings
from nih_sched.store import Desk, open_desk
from nih_sched.table import column_of
from nih_sched.telemetry import one_line

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@contextlib.contextmanager
def looking(settings: Settings) -> Iterator[Desk]:
    """The desk of those who only look.

    Raises:
        UsageError: our tables aren't there.
    """
    desk = open_desk(settings, create_ledger=False)
    try:
        if not desk.is_made:
            raise UsageError(
                reason=f"There are no tables nih_sched_* in {address(desk.engine.url)}. Type: scheduler init"
            )
        if settings.created_column:
            column_of(desk.rows.table, settings.created_column, settings.origin("created_column"))
        yield desk
    finally:
        desk.close()


def redis_url_of(settings: Settings) -> str | None:
    """Where Redis is, for those who start none: the one that is named, or the embedded one if it runs here."""
    if settings.redis_url:
        return settings.redis_url
    from nih_sched import embedded  # noqa: PLC0415 - what starts a server takes its time to import, too

    return embedded.find(identity(settings.database_url))


def draw_tables_soon() -> None:
    """Have rich imported, which draws tables and is slow to import, while the database looks; if it is to draw any."""
    if sys.stdout.isatty():
        threading.Thread(target=_import_rich, daemon=True).start()


def _import_rich() -> None:
    import rich.console  # noqa: PLC0415 - see above
    import rich.table  # noqa: F401, PLC0415


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table: drawn on a terminal; elsewhere in plain columns, of which nothing is cut off or wrapped.

    Args:
        head: the columns' names.
        rows: texts of one line each; that of the first column is never shortened.
        right: numbers of columns that are aligned at their right.
    """
    if sys.stdout.isatty():
        _draw(head, rows, right)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        aligned = (
            one.rjust(w) if n in right else one.ljust(w) for n, (one, w) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(aligned).rstrip())


def _draw(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.table import Table  # noqa: PLC0415

    table = Table(*head)
    table.columns[0].overflow = "fold"  # a key that is cut off names no row
    for number in right:
        table.columns[number].justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)  # the table's words are not ours


def print_json(value: Any) -> None:
    """Print it for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_facts(facts: list[tuple[str, str]], indent: str = "") -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        click.echo(f"{indent}{name:<{width}}  {one_line(value)}")
