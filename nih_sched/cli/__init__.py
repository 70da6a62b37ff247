"""The command `scheduler`: click, nothing else."""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nih_sched import __version__, telemetry
from nih_sched.cli.options import FIRST, help_records
from nih_sched.errors import NihError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Each command's module and function: imported when it is called, since RQ alone takes a tenth of a second.
COMMANDS = {
    "add": ("add", "add"),
    "cancel": ("change", "cancel"),
    "completion": ("completion", "completion"),
    "dashboard": ("dashboard", "dashboard"),
    "doctor": ("doctor", "doctor_"),
    "init": ("init", "init"),
    "list": ("rows", "list_"),
    "pause": ("steer", "pause"),
    "producer": ("run", "producer"),
    "prune-history": ("prune", "prune_history"),
    "requeue": ("change", "requeue"),
    "resume": ("steer", "resume"),
    "run": ("run", "run"),
    "show": ("show", "show"),
    "source": ("source", "source"),
    "status": ("status", "status"),
    "uninstall": ("uninstall", "uninstall"),
    "why": ("why", "why"),
    "worker": ("run", "worker_"),
}

LASTING = ("dashboard", "producer", "run", "worker")
GARBAGE = gc.get_threshold()
# What is imported is no garbage: to look for some in it, again and again, takes a quarter of a short command.
RARELY = 200_000  # objects until it is looked for


class Scheduler(click.Group):
    """A group for which `scheduler OPTIONS` is `scheduler run OPTIONS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        if cmd_name in LASTING:
            gc.freeze()  # what is here by now stays
            gc.set_threshold(*GARBAGE)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before options that aren't the group's own."""
        if ctx.resilient_parsing and not args:
            return super().parse_args(ctx, args)  # a shell asks what could come first
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h", "--version")):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What could come next: a command's name, for which none need be imported; or an option, those of run too."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - a shell alone asks

        if not incomplete.startswith("-"):
            return [CompletionItem(name) for name in sorted(COMMANDS) if name.startswith(incomplete)]
        run = self.get_command(ctx, "run")
        assert run is not None  # noqa: S101 - it stands above
        return super().shell_complete(ctx, incomplete) + run.shell_complete(click.Context(run, ctx, "run"), incomplete)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The six options that come first in a user's mind, then the commands."""
        with formatter.section("Options, as of `scheduler run`, which is meant when no command is named"):
            formatter.write_dl(help_records(FIRST))
        formatter.write_paragraph()
        formatter.write_text("`scheduler run --help` shows all options.")
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(name)) for name in sorted(COMMANDS)])
        with formatter.section("Other options"):
            formatter.write_dl([p.get_help_record(ctx) for p in self.get_params(ctx) if p.get_help_record(ctx)])  # type: ignore[misc]


def summary(name: str) -> str:
    """A command's first sentence, read from its source: to import all of them would take a second."""
    module, function = COMMANDS[name]
    return click.Command(name, help=_docstrings(module)[function]).get_short_help_str(75)


@functools.cache
def _docstrings(module: str) -> dict[str, str]:
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text("utf-8"))
    return {one.name: ast.get_docstring(one) or "" for one in tree.body if isinstance(one, ast.FunctionDef)}


@click.group(cls=Scheduler, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="scheduler")
def cli() -> None:
    """Any SQL table becomes a job queue: ready rows are claimed, run through RQ, and get their fate written back.

    Try it: scheduler init --sample && scheduler --burst
    """


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error, never a traceback."""
    gc.set_threshold(RARELY)
    # A connection that is lost while it is given back is no news: whoever needed it says so.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    try:
        code = cli.main(prog_name="scheduler", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Aborted.", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except NihError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `scheduler status | head` is no mistake
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # the database's own: whoever sees one has imported SQLAlchemy, which takes its time
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

        from nih_sched.dialects.base import reason  # noqa: PLC0415

        if not isinstance(error, SQLAlchemyError):
            raise
        click.echo(f"Error: The database answered: {reason(error)}", err=True)
        code = 2
    gc.freeze()  # nor is it looked for at the end
    sys.exit(code if isinstance(code, int) else 0)


def listen(settings: Any) -> None:
    """Have events logged as the settings say."""
    telemetry.unsubscribe_all()
    telemetry.subscribe(telemetry.LogLines(settings.log_format, telemetry.QUIET_SHOWS if settings.quiet else None))
