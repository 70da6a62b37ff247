"""Kind and place of a failure, by which failures are grouped."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from nih_sched.model import Claim, Ended, Outcome
from nih_sched.runner.place import LONGEST, place_of

MODULE = """
import json

def outer():
    inner()

def inner():
    raise ValueError("secret")

def library():
    json.loads("{")

def made():
    exec(compile("1 / 0", "<made up>", "exec"))
"""


@pytest.fixture
def mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A module app.mail in a folder on sys.path."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "mail.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("app.mail")
    for name in ("app", "app.mail"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("outer", "ValueError at app/mail.py:8 in inner"),
        ("library", "JSONDecodeError at app/mail.py:11 in library"),
        ("made", "ZeroDivisionError at app/mail.py:14 in made"),
    ],
)
def test_it_is_the_innermost_line_of_the_users_own(mail: object, function: str, expected: str) -> None:
    with pytest.raises(Exception) as raised:
        getattr(mail, function)()
    trace = raised.value.__traceback__
    assert trace is not None
    assert place_of(type(raised.value).__name__, trace.tb_next) == expected


def test_without_a_line_of_theirs_the_kind_is_told_alone() -> None:
    assert place_of("CommandFailed", None) == "CommandFailed"


def test_it_fits_the_ledger_and_keeps_its_end(mail: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nih_sched.runner.place._short", lambda path: "x" * 500 + path)
    with pytest.raises(ValueError) as raised:
        mail.outer()  # type: ignore[attr-defined]
    found = place_of("V" * 500, raised.value.__traceback__)
    assert len(found) == LONGEST
    assert found.endswith("app/mail.py:8 in inner")


def test_a_worker_is_told_of_it() -> None:
    claim = Claim(7, (1,), "rq")
    ended = Ended(claim, Outcome.FAILED, "reason", "trace", error="ValueError at a.py:1 in f")
    assert json.loads(ended.told())[0] == 7
    assert Ended.from_told(ended.told(), claim).error == "ValueError at a.py:1 in f"
