"""scheduler source."""

from __future__ import annotations

import click

from nih_sched.cli.options import TABLE, settings_options
from nih_sched.settings import Settings
from nih_sched.store import open_desk


@click.command()
@settings_options(TABLE)
def source(settings: Settings) -> None:
    """Print the source's name, which is its RQ queue's: for `rq worker -S json "$(scheduler source)"`."""
    desk = open_desk(settings)
    click.echo(desk.source.name)
    desk.close()
