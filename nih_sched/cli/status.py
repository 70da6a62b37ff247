"""scheduler status."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import click

from nih_sched import clock, reports
from nih_sched.cli.look import as_json, draw_tables_soon, looking, print_facts, print_table, redis_url_of
from nih_sched.cli.options import LOOK, settings_options
from nih_sched.settings import Settings
from nih_sched.store import Desk
from nih_sched.telemetry import one_line

if TYPE_CHECKING:
    from nih_sched.reports.overall import WorkerSeen

EVERY = 2.0  # seconds between looks of --watch
UNCLAIMED = 0.25  # seconds for which status looks for rows without a claim


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
            draw_tables_soon()
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


def _print_status(desk: Desk, found: reports.Status) -> None:
    click.echo(f"{found.database} · {found.table} · source {found.source}")
    states = [(", ".join(one.states) or "(not ours)", one_line(str(one.word)), str(one.count)) for one in found.states]
    print_table(("state", desk.rows.status.name, "rows"), states, right=[2])
    workers = [("worker", _worker(one)) for one in found.workers] or [("worker", "none")]
    print_facts([*found.facts(), *workers])
    for line in _unclaimed(desk, found):
        click.echo(one_line(line))
    if found.failures:
        failures = [(row.key, str(row.attempts), row.outcome, row.reason) for row in found.failures]
        print_table(("failed row", "attempts", "how", "reason"), failures)


def _worker(worker: WorkerSeen) -> str:
    where = f" on {worker.host}, pid {worker.pid}" if worker.pid else ""
    return f"{worker.name}{where}: {worker.sentence}"


def _unclaimed(desk: Desk, found: reports.Status) -> list[str]:
    # Table and ledger were read one after the other: only the doctor, which asks both of each row, can be sure.
    if not found.unclaimed:
        return []
    from nih_sched.doctor.rows import orphans_of  # noqa: PLC0415

    return [f"{finding.what}. See: scheduler doctor" for finding in orphans_of(desk, UNCLAIMED)]
