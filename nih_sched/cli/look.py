"""What status, why, show and others that only look have in common."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
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


def import_rich_meanwhile() -> None:
    """Have rich imported, which draws tables and is slow to import, while the database looks."""
    threading.Thread(target=_import_rich, daemon=True).start()


def _import_rich() -> None:
    import rich.console  # noqa: PLC0415 - see above
    import rich.table  # noqa: F401, PLC0415


def print_json(value: Any) -> None:
    """Print it for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_facts(facts: list[tuple[str, str]], indent: str = "") -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        click.echo(f"{indent}{name:<{width}}  {one_line(value)}")
