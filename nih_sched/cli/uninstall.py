"""scheduler uninstall."""

from __future__ import annotations

import sys

import click

from nih_sched import broker, ledger
from nih_sched.cli import listen
from nih_sched.cli.options import settings_options
from nih_sched.dialects import address, connect
from nih_sched.errors import UnreachableRedis, UsageError
from nih_sched.settings import Settings
from nih_sched.store.rows import give_all_back, running_count
from nih_sched.supervisor import redis_for


@click.command()
@settings_options(("database_url", "redis_url", "ledger_schema", "log_format", "quiet", "config"))
@click.option("--yes", is_flag=True, help="Don't ask, even if rows seem to be running.")
def uninstall(settings: Settings, yes: bool) -> None:
    """Give claimed rows back to ready, and drop our tables. Stop all schedulers first."""
    listen(settings)
    engine = connect(settings.database_url)
    own = ledger.tables(settings.ledger_schema, engine.dialect.name)
    if not ledger.exists(engine, own):
        raise UsageError(reason=f"There are no tables nih_sched_* in {address(engine.url)}.")
    running = running_count(engine, own)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                reason=f"{running} rows are marked as running. Add --yes to uninstall without being asked."
            )
        click.confirm(f"{running} rows are marked as running. Give all claimed rows back, drop our tables?", abort=True)
    count, sources = give_all_back(engine, own)
    try:
        with redis_for(settings) as redis_url:
            connection = broker.connect(redis_url)
            for name in sources:
                broker.forget(broker.queue_of(connection, name))
    except UnreachableRedis as error:
        click.echo(f"Left the jobs in Redis, they will be refused: {error}", err=True)
    ledger.drop(engine, own)
    click.echo(f"Gave {count} rows back and dropped our tables nih_sched_*.")
