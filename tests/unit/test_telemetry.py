"""Events as lines: one each, whatever a row contains."""

from __future__ import annotations

import ast
import io
import json
import string
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nih_sched import telemetry
from nih_sched.telemetry import QUIET_SHOWS, SENTENCES, VIEW_SHOWS, LogLines, emit, subscribe, unsubscribe_all

settings.register_profile("patient", deadline=None)  # a noisy machine is no failure
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _no_subscribers() -> Iterator[None]:
    unsubscribe_all()
    yield
    unsubscribe_all()


def written(event: str, *, form: str = "text", only: frozenset[str] | None = None, **facts: Any) -> str:
    stream = io.StringIO()
    LogLines(form, only, stream)(event, facts)
    return stream.getvalue()


def facts_for(event: str) -> dict[str, Any]:
    names = {name for _, name, _, _ in string.Formatter().parse(SENTENCES[event]) if name}
    return {name: 0.5 if name in ("seconds", "delay", "grace") else f"<{name}>" for name in names}


@pytest.mark.parametrize("event", sorted(SENTENCES))
def test_each_event_is_one_line_in_both_forms(event: str) -> None:
    facts = facts_for(event)
    text = written(event, **facts)
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    datetime.strptime(text[:8], "%H:%M:%S")
    assert all(str(value) in text for value in facts.values())
    line = written(event, form="json", **facts)
    assert len(line.splitlines()) == 1
    record = json.loads(line)
    assert record.pop("event") == event
    assert datetime.fromisoformat(record.pop("at")).tzinfo is not None
    assert record == facts


@given(
    st.text() | st.sampled_from(["\n12:00:00 row 1 done in 0.1 s", "\x1b[2J", "\x9b31m", "a\rb", "\u2028", "\u202ex"])
)
def test_a_rows_content_forges_no_line_and_steers_no_terminal(text: str) -> None:
    line = written("failed", key=text, outcome="failed", attempt=1, reason=text)
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    line = written("failed", form="json", key=text, outcome="failed", attempt=1, reason=text)
    assert line[:-1].isascii()
    assert line[:-1].isprintable()
    assert json.loads(line)["reason"] == text


def test_what_is_escaped_stays_readable() -> None:
    line = written("done", key="a\nb\x1b[0m", seconds=0.25)
    assert line[9:] == "row a\\nb\\x1b[0m done in 0.250 s\n"


def test_braces_in_a_rows_content_are_only_content() -> None:
    assert "{seconds} {0} %s" in written("done", key="{seconds} {0} %s", seconds=1.0)


def test_values_that_json_does_not_know_are_worded() -> None:
    assert json.loads(written("claimed", form="json", count=Decimal("1.5")))["count"] == "1.5"


def test_quiet_shows_what_went_wrong_and_nothing_else() -> None:
    assert set(SENTENCES) >= VIEW_SHOWS >= QUIET_SHOWS
    for event in SENTENCES:
        for form in ("text", "json"):
            line = written(event, form=form, only=QUIET_SHOWS, **facts_for(event))
            assert bool(line) is (event in QUIET_SHOWS), event
    assert {"failed", "database_lost", "redis_lost", "worker_died"} <= QUIET_SHOWS
    assert not {"done", "claimed", "retrying", "started"} & QUIET_SHOWS


def test_every_event_in_the_code_has_its_sentence_and_its_facts() -> None:
    seen = set()
    for path in Path(telemetry.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "emit" or not node.args:
                continue
            name = node.args[0]
            keywords = {keyword.arg for keyword in node.keywords}
            events = [name.value] if isinstance(name, ast.Constant) else []
            seen.update(events)
            for event in events:
                assert event in SENTENCES, f"{path.name}:{node.lineno}"
                assert None in keywords or set(facts_for(event)) <= keywords, f"{path.name}:{node.lineno} {event}"
    assert len(seen) > 15


def test_every_subscriber_hears_every_event() -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    subscribe(lambda event, facts: heard.append((event, facts)))
    subscribe(lambda event, facts: heard.append((event, facts)))
    emit("claimed", count=2)
    assert heard == [("claimed", {"count": 2})] * 2
    unsubscribe_all()
    emit("claimed", count=2)
    assert len(heard) == 2


def test_lines_go_to_the_standard_error_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    subscribe(LogLines())
    emit("claimed", count=3)
    captured = capsys.readouterr()
    assert captured.err.endswith(" claimed 3 rows\n")
    assert captured.out == ""


class Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "no space"), ValueError("closed file")])
def test_a_broken_terminal_stops_no_row(error: Exception) -> None:
    LogLines(stream=Broken(error))("claimed", {"count": 1})


def test_a_line_is_one_write() -> None:
    writes: list[str] = []

    class Counting(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    LogLines(stream=Counting())("claimed", {"count": 1})
    assert len(writes) == 1
