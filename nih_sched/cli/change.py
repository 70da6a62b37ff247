"""scheduler requeue, cancel."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

from nih_sched import reports, steer, telemetry
from nih_sched.cli import listen
from nih_sched.cli.options import seconds_of, settings_options
from nih_sched.cli.steer import STEER, redis_of, who
from nih_sched.errors import UsageError
from nih_sched.model import Key, State, show_key
from nih_sched.settings import Settings
from nih_sched.steer import ENDED, UNENDED, Result
from nih_sched.store import Desk, open_desk
from nih_sched.store.rows import parse_key
from nih_sched.store.unreadable import NAMED, Unreadable

COUNTING = 2.0  # seconds for which rows are counted before we ask
ROWS = tuple(name for name in STEER if name != "where")  # a condition on the rows to change, here

Change = Callable[..., Result]


def _options(states: Sequence[State]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    values = [state.value for state in states]
    names = ", ".join(values)

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    given: list[Callable[..., Any]] = [
        settings_options(ROWS),
        click.option("--state", "state", shell_complete=complete, help=f"All rows in this state: {names}."),
        click.option(
            "--where", "condition", metavar="SQL", help="Of those: SQL over the row's columns and last error."
        ),
        click.option("--since", metavar="TIME", help="Of those: something happened to them in this time: 30m, 1h, 2d."),
        click.option("--error", metavar="GROUP", help="Of those: their last failure is of this kind and place."),
        click.option("--limit", metavar="N", type=click.IntRange(min=1), help="At most so many rows, by key."),
        click.option("--yes", is_flag=True, help="Don't ask."),
        click.argument("keys", nargs=-1, metavar="[KEY]..."),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(given):
            command = one(command)
        return command

    return decorate


@click.command()
@_options(ENDED)
def requeue(settings: Settings, **given: Any) -> int:
    """Set failed, cancelled or done rows back to ready: those with these KEYs, or all of a --state.

    They run again with all their tries. Rows are changed in chunks of 1000, all or none of each. Exit 1 if a row that
    was named wasn't changed.
    """
    return _change(settings, steer.requeue, "Requeue", "Requeued", **given)


@click.command()
@_options(UNENDED)
def cancel(settings: Settings, **given: Any) -> int:
    """Cancel rows: those with these KEYs, or all of a --state.

    One that hasn't begun never begins; one that runs is stopped within 5 s, with all its processes. Rows are changed in
    chunks of 1000, all or none of each. Exit 1 if a row that was named wasn't changed.
    """
    return _change(settings, steer.cancel, "Cancel", "Cancelled", **given)


def _change(
    settings: Settings,
    change: Change,
    verb: str,
    done: str,
    *,
    state: str | None,
    condition: str | None,
    since: str | None,
    error: str | None,
    limit: int | None,
    yes: bool,
    keys: Sequence[str],
) -> int:
    if bool(keys) == bool(state):
        raise UsageError(reason="Name rows: either KEYs or a --state.")
    if keys and (condition or since or error or limit):
        raise UsageError(reason="--where, --since, --error and --limit go with --state, not with KEYs.")
    listen(settings)
    desk = open_desk(settings)
    try:
        left_out: list[Unreadable] = []
        chosen: Iterable[Key] = [parse_key(desk, key) for key in dict.fromkeys(keys)]
        if not keys:
            age = None if since is None else seconds_of(since)
            selection = reports.select(desk, state=state, where=condition, since=age, error=error)
            chosen = reports.keys(desk, selection, limit, left_out=left_out)
        if not yes and not (chosen := _ask(desk, verb, chosen)):
            click.echo("There are no such rows.")
            return 0
        result = change(desk, chosen, who(), connection=redis_of(settings))
    finally:
        desk.close()
    if left_out:
        shown = ", ".join(map(str, left_out[:NAMED])) + (", …" if len(left_out) > NAMED else "")
        click.echo(telemetry.one_line(f"Left out, for their keys can't be read: {shown}."), err=True)
    return _tell(result, done, named=bool(keys))


def _ask(desk: Desk, verb: str, chosen: Iterable[Key]) -> Iterable[Key]:
    """Count for a while, show the count, ask; return the same keys."""
    stream, counted, began = iter(chosen), list[Key](), time.monotonic()
    for key in stream:
        counted.append(key)
        if time.monotonic() - began > COUNTING:
            break
    if not counted:
        return counted
    first = next(stream, None)
    rest: Iterator[Key] = iter(()) if first is None else itertools.chain([first], stream)
    many = f"{len(counted):,} {'row' if len(counted) == 1 else 'rows'}" + ("" if first is None else " or more")
    if not sys.stdin.isatty():
        raise UsageError(reason=f"{verb} {many} of {desk.rows.name}? Add --yes to do it without being asked.")
    click.confirm(f"{verb} {many} of {desk.rows.name}?", abort=True)
    return itertools.chain(counted, rest)


def _tell(result: Result, done: str, *, named: bool) -> int:
    running = f", {result.running:,} of them running: they are stopped within 5 s" if result.running else ""
    click.echo(f"{done} {result.changed:,} {'row' if result.changed == 1 else 'rows'}{running}.")
    if result.unfit:
        shown = ", ".join(f"{show_key(key)} is {word}" for key, word in result.left)
        more = ", …" if result.unfit > len(result.left) else ""
        click.echo(telemetry.one_line(f"Left {result.unfit:,} as they are: {shown}{more}."), err=True)
    if result.absent:
        shown = ", ".join(show_key(key) for key in result.missing)
        more = ", …" if result.absent > len(result.missing) else ""
        click.echo(telemetry.one_line(f"{result.absent:,} are not in the table: {shown}{more}."), err=True)
    return 1 if named and (result.unfit or result.absent) else 0
