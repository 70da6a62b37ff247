"""scheduler why."""

from __future__ import annotations

import click

from nih_sched import reports
from nih_sched.cli.look import as_json, looking, print_facts, print_json, redis_url_of
from nih_sched.cli.options import LOOK, settings_options
from nih_sched.settings import Settings
from nih_sched.store.rows import parse_key


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
