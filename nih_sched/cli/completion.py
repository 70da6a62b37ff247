"""scheduler completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_SCHEDULER_COMPLETE"  # click's own name for it: what it prints asks by that
HOWS = {
    "bash": 'Add to ~/.bashrc: eval "$(scheduler completion bash)"',
    "zsh": 'Add to ~/.zshrc: eval "$(scheduler completion zsh)"',
    "fish": "Type: scheduler completion fish > ~/.config/fish/completions/scheduler.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(HOWS)))
def completion(shell: str) -> None:
    """Print what has a shell complete commands and options, for it to read: eval "$(scheduler completion bash)"."""
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 - click knows these three
    from nih_sched.cli import cli  # noqa: PLC0415 - it imports us

    click.echo(f"# {HOWS[shell]}\n{found(cli, {}, 'scheduler', VARIABLE).source()}")
