"""scheduler run, producer, worker."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from nih_sched import runner, supervisor, worker
from nih_sched.cli import listen
from nih_sched.cli.options import COMMON, METRICS, RUN, settings_options
from nih_sched.model import State, show_key
from nih_sched.settings import Settings
from nih_sched.store import Claims, Desk, Looks, open_desk
from nih_sched.supervisor import View, redis_for


@click.command()
@settings_options((*COMMON, *RUN, *METRICS))
def run(settings: Settings) -> int:
    """Run ready rows: a producer and a pool of workers in one process tree.

    Ctrl-C stops: running rows get --grace seconds, the rest goes back to ready. Exit codes: 0 done, 1 a row failed
    under --burst or --max-rows, 2 a mistake in usage or configuration.
    """
    listen(settings)
    if settings.dry_run:
        return dry_run(settings)
    return supervisor.run(settings, _view_for(settings))


@click.command()
@settings_options((*COMMON, *RUN, *METRICS))
def producer(settings: Settings) -> int:
    """Only claim and enqueue; `scheduler worker` runs the rows, here or elsewhere."""
    listen(settings)
    if settings.dry_run:
        return dry_run(settings)
    with redis_for(settings) as redis_url:
        return supervisor.produce(settings, redis_url)


@click.command("worker")
@settings_options(COMMON)
def worker_(settings: Settings) -> int:
    """Only run rows that a producer has enqueued: one worker, one row at a time."""
    listen(settings)
    with redis_for(settings) as redis_url:
        return worker.work(settings, redis_url)


def dry_run(settings: Settings) -> int:
    """Show what a claim would do; change nothing, make no table."""
    desk = open_desk(settings, create_ledger=False)
    try:
        chosen = settings.job or settings.command or settings.handlers
        handler = runner.handler_for(settings, desk).name if chosen else "(not set)"
        claims = Claims(desk, "dry run", settings.tries)
        query = claims.select_ready(1000)
        locked = desk.dialect.lock(query, desk.rows.table, skip_locked=True)
        shown, plain = (
            str(one.compile(desk.engine, compile_kwargs={"literal_binds": True})).replace("%%", "%")
            for one in (locked, query)
        )
        plan = desk.read(lambda connection: desk.dialect.plan(connection, plain))
        keys = desk.read(lambda connection: connection.execute(claims.select_ready(10)).all())
        index = desk.dialect.index_ddl(desk.rows.table, desk.rows.status, desk.rows.words[State.READY], desk.rows.keys)
        click.echo(f"-- what a claim selects\n{shown}\n\n-- its plan\n{plan}\n")
        click.echo(f"-- the index that makes it cheap\n{index}\n")
        click.echo(f"handler: {handler}\nready rows: {Looks(desk).ready()}")
        click.echo(f"first keys: {' '.join(show_key(tuple(key)) for key in keys) or '(none)'}")
        click.echo("Nothing was claimed.")
    finally:
        desk.close()
    return 0


def _view_for(settings: Settings) -> Callable[[Desk], View] | None:
    if settings.quiet or settings.log_format != "text" or not sys.stderr.isatty():
        return None
    from nih_sched.cli.view import LiveView  # noqa: PLC0415 - rich is for terminals alone, and slow to import

    return LiveView
