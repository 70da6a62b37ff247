"""scheduler show."""

from __future__ import annotations

import click

from nih_sched import reports
from nih_sched.cli.look import as_json, looking, print_facts, print_json
from nih_sched.cli.options import TABLE, settings_options
from nih_sched.reports import words
from nih_sched.settings import Settings
from nih_sched.store.rows import parse_key
from nih_sched.telemetry import one_line


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
