"""Tables that commands print: drawn for a person, plain for a program."""

from __future__ import annotations

import io
import re
import sys

import pytest

from nih_sched.cli.look import print_table

LONG = "ValueError: " + "the service answered 429, " * 9
ROWS = [("1", "2", LONG.strip()), ("22", "1,000", "")]


class Terminal(io.StringIO):
    """One that is 60 characters wide."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_where_no_terminal_is_nothing_is_cut_off_or_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("key", "attempts", "reason"), ROWS, right=[1])
    assert capsys.readouterr().out.splitlines() == [
        "key  attempts  reason",
        f"1           2  {LONG.strip()}",
        "22      1,000",
    ]


def test_on_a_terminal_a_table_is_drawn_as_wide_as_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "60")
    print_table(("key", "attempts", "reason"), [*ROWS, ("[b]9[/b]" * 20, "1", "x")], right=[1])
    lines = re.sub("\x1b\\[\\d*m", "", screen.getvalue()).splitlines()
    assert max(map(len, lines)) == 60
    assert lines[0].startswith("┏")
    assert "".join(line.split("│")[1].strip() for line in lines if "[" in line or "]" in line) == "[b]9[/b]" * 20
