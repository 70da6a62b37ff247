"""scheduler status, why, show: what a person asks of a source and of a row."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import click

from nih_sched import clock, embedded, reports
from nih_sched.cli.options import LOOK, TABLE, settings_options
from nih_sched.dialects import address
from nih_sched.dialects.connect import identity
from nih_sched.errors import UsageError
from nih_sched.reports import words
from nih_sched.settings import Settings
from nih_sched.store import Desk, open_desk
from nih_sched.store.rows import parse_key
from nih_sched.table import column_of
from nih_sched.telemetry import one_line

EVERY = 2.0  # seconds between looks of --watch
UNCLAIMED = 0.25  # seconds for which status looks for rows without a claim

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
    return settings.redis_url or embedded.find(identity(settings.database_url))


def print_json(value: Any) -> None:
    """Print it for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_facts(facts: list[tuple[str, str]], indent: str = "") -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        click.echo(f"{indent}{name:<{width}}  {one_line(value)}")


@click.command()
@settings_options(LOOK)
@as_json
@click.option("--watch", is_flag=True, help="Look again every 2 seconds, until Ctrl-C.")
def status(settings: Settings, as_json: bool, watch: bool) -> None:
    """Print how the source does: rows by state, rate, workers and what they run, retries, Redis, failures."""
    stopped = clock.Bell()
    if watch:  # a look ends first: it has threads of its own, which nobody would wait for
        signal.signal(signal.SIGINT, lambda number, frame: stopped.ring())
    with looking(settings) as desk:
        if not as_json:
            threading.Thread(target=_import_rich, daemon=True).start()  # while the database counts
        while True:
            found = reports.status(desk, redis_url_of(settings), created=settings.created_column)
            if watch and not as_json:
                click.clear()
            if as_json:
                click.echo(json.dumps(found.as_json(), ensure_ascii=False, default=str))
            else:
                _print_status(desk, found)
            if not watch:
                return
            if stopped.wait(EVERY):
                raise KeyboardInterrupt


def _import_rich() -> None:
    import rich.console  # noqa: PLC0415 - slow to import, and for this command alone
    import rich.table  # noqa: F401, PLC0415


def _print_status(desk: Desk, found: reports.Status) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow to import, and for this command alone
    from rich.table import Table as RichTable  # noqa: PLC0415

    console = Console(highlight=False, markup=False)  # the table's words are not ours
    console.print(f"{found.database} · {found.table} · source {found.source}", soft_wrap=True)
    table = RichTable("state", desk.rows.status.name, "rows")
    table.columns[2].justify = "right"
    for one in found.states:
        table.add_row(", ".join(one.states) or "(not ours)", one_line(str(one.word)), str(one.count))
    console.print(table)
    facts = found.facts()
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        console.print(f"{name:<{width}}  {one_line(text)}", soft_wrap=True)
    for worker in found.workers:
        where = f" on {worker.host}, pid {worker.pid}" if worker.pid else ""
        console.print(f"{'worker':<{width}}  {one_line(f'{worker.name}{where}: {worker.sentence}')}", soft_wrap=True)
    if not found.workers:
        console.print(f"{'worker':<{width}}  none", soft_wrap=True)
    for line in _unclaimed(desk, found):
        console.print(one_line(line), soft_wrap=True)
    if found.failures:
        shown = RichTable("failed row", "attempts", "how", "reason")
        shown.columns[0].overflow = "fold"  # a key that is cut off names no row
        for row in found.failures:
            shown.add_row(row.key, str(row.attempts), row.outcome, row.reason)
        console.print(shown, markup=False)


def _unclaimed(desk: Desk, found: reports.Status) -> list[str]:
    # Table and ledger were read one after the other: only the doctor, which asks both of each row, can be sure.
    if not found.unclaimed:
        return []
    from nih_sched.doctor.rows import orphans_of  # noqa: PLC0415

    return [f"{finding.what}. See: scheduler doctor" for finding in orphans_of(desk, UNCLAIMED)]


@click.command()
@settings_options(LOOK)
@click.argument("key")
@as_json
def why(settings: Settings, key: str, as_json: bool) -> None:
    """Say in a sentence why the row with this KEY isn't running; then the facts. A key of several columns: 7,de."""
    with looking(settings) as desk:
        answer = reports.why(desk, parse_key(desk, key), redis_url_of(settings), where=settings.where)
        if as_json:
            print_json(answer.as_json())
            return
        click.echo(answer.sentence)
        print_facts(list(answer.facts), indent="  ")


@click.command()
@settings_options(TABLE)
@click.argument("key")
@as_json
def show(settings: Settings, key: str, as_json: bool) -> None:
    """Print the row with this KEY, and each of its attempts with times, worker, outcome, traceback and output."""
    with looking(settings) as desk:
        found = reports.show(desk, parse_key(desk, key))
        if as_json:
            print_json(found.as_json())
            return
        click.echo(f"Row {one_line(found.key)}{f' is {found.state}' if found.state else ''}")
        print_facts([(name, words.first_line(str(value))) for name, value in found.values.items()], indent="  ")
        for attempt in found.attempts:
            click.echo(f"\n{attempt.heading}")
            print_facts(attempt.facts(), indent="  ")
            for name, text in (("traceback", attempt.texts.traceback), ("output", attempt.texts.output)):
                if text:
                    click.echo(f"  {name}:")
                    click.echo("".join(f"    {one_line(line)}\n" for line in text.splitlines()), nl=False)
        if not found.attempts:
            click.echo("It has no history: nobody has claimed it.")
