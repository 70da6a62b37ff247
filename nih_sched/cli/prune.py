"""scheduler prune-history."""

from __future__ import annotations

import click

from nih_sched.cli.look import looking
from nih_sched.cli.options import TABLE, seconds_of, settings_options
from nih_sched.settings import Settings
from nih_sched.store.pruning import Pruning


@click.command("prune-history")
@settings_options(TABLE)
@click.option("--older-than", required=True, metavar="TIME", help="Claims that ended so long ago: 12h, 30d.")
def prune_history(settings: Settings, older_than: str) -> None:
    """Forget the history of claims that ended long ago, whatever their outcome, of all sources of this ledger.

    Your table isn't touched, nor is a claim that is open or that the row's next one must know of. Producers do the same
    by themselves, as --keep-history says.
    """
    seconds = seconds_of(older_than)
    with looking(settings) as desk:
        pruning, count, after = Pruning(desk, seconds, seconds, everywhere=True), 0, 0
        while True:
            pruned = pruning.chunk(after)
            count += pruned.records
            if pruned.last is None:
                break
            after = pruned.last
        click.echo(f"Forgot {count:,} {'attempt' if count == 1 else 'attempts'}.")
