"""Shells complete commands and options; help is there at once."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click
import pytest
from servers import run, scheduler

from nih_sched.cli import COMMANDS, cli, summary

HOWS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions"}


@pytest.mark.parametrize("shell", HOWS)
def test_each_shell_gets_its_script_and_says_where_it_goes(shell: str, tmp_path: Path) -> None:
    done = scheduler("completion", shell, env={}, cwd=tmp_path)
    assert done.returncode == 0
    first, *script = done.stdout.splitlines()
    assert first.startswith("# ")
    assert HOWS[shell] in first
    assert any(f"_SCHEDULER_COMPLETE={shell}_complete" in line for line in script)


def test_a_shell_without_completion_is_a_mistake_in_usage(tmp_path: Path) -> None:
    done = scheduler("completion", "csh", env={}, cwd=tmp_path)
    assert done.returncode == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in done.stderr


COMPLETES = {
    "scheduler re": ["requeue", "resume"],
    "scheduler --max-c": ["--max-concurrent-jobs"],
    "scheduler --vers": ["--version"],
    "scheduler requeue --sta": ["--status-key", "--started-val", "--states", "--state"],
    "scheduler requeue --state ": ["failed", "cancelled", "done"],
    "scheduler run --log-f": ["--log-format"],
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash isn't installed")
def test_bash_completes_with_what_was_printed(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "scheduler"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m nih_sched "$@"\n')
    program.chmod(0o755)
    asks = ['eval "$(scheduler completion bash)"']
    for line in COMPLETES:
        words = " ".join(word or "''" for word in line.split(" "))
        facts = f"COMP_WORDS=({words}); COMP_CWORD={line.count(' ')}; COMPREPLY=()"
        asks.append(f'{facts}; _scheduler_completion scheduler; echo "${{COMPREPLY[*]}}"')
    done = run(["bash", "-c", "\n".join(asks)], env={"PATH": f"{program.parent}:{os.environ['PATH']}"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == list(COMPLETES.values())


@pytest.mark.parametrize("line", [["--help"], ["--version"]])
def test_help_imports_no_more_than_it_needs(line: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from nih_sched.cli import main\n"
        f"sys.argv = ['scheduler', *{line}]\n"
        "try: main()\n"
        "finally: print(sorted({'sqlalchemy', 'rq', 'redis', 'flask', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = run([sys.executable, "-c", program], cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "[]"


def test_helps_summaries_are_the_commands_own() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert summary(name) == command.get_short_help_str(75)
