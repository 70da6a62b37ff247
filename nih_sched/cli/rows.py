"""scheduler list: rows by state, SQL and time."""

from __future__ import annotations

import sys

import click

from nih_sched import reports
from nih_sched.cli.look import as_json, draw_tables_soon, looking, print_json, print_table
from nih_sched.cli.options import TABLE, seconds_of, settings_options
from nih_sched.errors import UsageError
from nih_sched.model import show_key
from nih_sched.reports import words
from nih_sched.settings import Settings
from nih_sched.store import Desk
from nih_sched.store.rows import parse_key
from nih_sched.telemetry import one_line

# --where narrows the list here, not the source.
OPTIONS = tuple(name for name in TABLE if name != "where")


@click.command("list")
@settings_options(OPTIONS)
@click.option("--state", help="Rows in this state (ready, queued, started, done, failed, …), or with this word.")
@click.option(
    "--where", "where_sql", metavar="SQL", help="SQL over the row's columns and its last error: error LIKE '%429%'."
)
@click.option("--since", metavar="TIME", help="Something happened to them in this time: 30m, 1h, 2d.")
@click.option("--text", help="Their key, their texts or their last error contain this.")
@click.option("--error", metavar="GROUP", help="Their last failure is of this kind and place, as the list shows it.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Rows at most.")
@click.option("--after", metavar="KEY", help="Only rows behind this key.")
@click.option("--newest", is_flag=True, help="The greatest keys first.")
@as_json
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV with a header.")
def list_(
    settings: Settings,
    *,
    state: str | None,
    where_sql: str | None,
    since: str | None,
    text: str | None,
    error: str | None,
    limit: int,
    after: str | None,
    newest: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """List rows by key, with what became of them. What must read many rows stops after 2 seconds, and says so."""
    if as_json and as_csv:
        raise UsageError(reason="--json and --csv can't be had together.")
    with looking(settings) as desk:
        if not as_json and not as_csv:
            draw_tables_soon()
        selection = reports.select(
            desk, state=state, where=where_sql, since=seconds_of(since) if since else None, text=text, error=error
        )
        key = parse_key(desk, after) if after else None
        found = reports.rows(desk, selection, limit, after=key, descending=newest)
        if as_json:
            print_json(found.as_json())
        elif as_csv:
            _print_csv(desk, found)
        else:
            _print_rows(found)
        if found.sentence and not as_json:
            click.echo(found.sentence, err=as_csv)


def _print_csv(desk: Desk, found: reports.Listed) -> None:
    import csv  # noqa: PLC0415 - for this form alone

    writer = csv.writer(sys.stdout, lineterminator="\n")
    own = ["nih_sched_state", "nih_sched_attempts", "nih_sched_outcome", "nih_sched_at", "nih_sched_error"]
    writer.writerow([*desk.rows.columns, *own])
    for row in found.rows:
        facts = row.as_json()
        values = [facts["row"][name] for name in desk.rows.columns]
        writer.writerow([*values, row.state, row.attempts, row.outcome, facts["at"], row.error])


def _print_rows(found: reports.Listed) -> None:
    if not found.rows:
        click.echo("No rows.")
        return
    shown = []
    for row in found.rows:
        at = f"{row.at:%Y-%m-%d %H:%M:%S}" if row.at else ""
        key, state = one_line(show_key(row.key)), one_line(str(row.word))
        shown.append((key, state, str(row.attempts), row.outcome or "", at, words.first_line(row.error)))
    print_table(("key", "state", "attempts", "last", "at", "error"), shown)
