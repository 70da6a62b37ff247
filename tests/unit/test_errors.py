"""The error tree: each class's docstring is its message, and each place that raises it gives it its facts."""

from __future__ import annotations

import ast
import inspect
import pickle
import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import nih_sched
from nih_sched import errors
from nih_sched.errors import AttemptFailed, BadSetting, Fail, NewerLedger, NihError, RetryLater, UsageError

TREE = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found) and issubclass(found, NihError) and found.__module__ == errors.__name__
}
PACKAGE = Path(nih_sched.__file__).parent


class Site(NamedTuple):
    where: str
    error: str
    facts: frozenset[str | None]
    positional: int


def placeholders(error: type[NihError]) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(error.__doc__ or "") if name is not None}


def sites() -> Iterator[Site]:
    """Every place in the package that makes one of our errors."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in TREE:
                facts = frozenset(keyword.arg for keyword in node.keywords)
                yield Site(f"{path.relative_to(PACKAGE)}:{node.lineno}", name, facts, len(node.args))


SITES = list(sites())


@pytest.mark.parametrize("site", SITES, ids=[f"{site.error} in {site.where}" for site in SITES])
def test_each_place_gives_just_the_facts_that_the_message_names(site: Site) -> None:
    assert site.positional == 0
    assert site.facts == placeholders(TREE[site.error])


def test_no_place_raises_a_class_without_its_facts() -> None:
    # `raise NihError` without parentheses would be a KeyError.
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
                assert node.exc.id not in TREE, f"{path}:{node.lineno}"


def test_every_error_is_raised_somewhere_or_has_children() -> None:
    raised = {site.error for site in SITES}
    parents = {base.__name__ for error in TREE.values() for base in error.__mro__[1:]}
    assert set(TREE) <= raised | parents


@pytest.mark.parametrize("name", sorted(TREE))
def test_each_message_is_one_line_that_ends_as_a_sentence(name: str) -> None:
    error = TREE[name](**{fact: f"<{fact}>." for fact in placeholders(TREE[name])})
    text = str(error)
    assert all(f"<{fact}>" in text for fact in placeholders(TREE[name]))
    assert text.strip() == text
    assert "\n" not in text
    assert "{" not in text
    if name not in ("MissingDriver", "OlderLedger"):  # they end with what to type
        assert text.endswith(".")
    assert isinstance(error, NihError)
    assert error.exit_code == 2


def test_values_are_shown_as_they_were_given() -> None:
    error = BadSetting(name="--tries", value="{x}\n", origin="option", expected="0 to 1000")
    assert str(error) == r"--tries is '{x}\n' (option), expected 0 to 1000."
    assert error.facts == {"name": "--tries", "value": "{x}\n", "origin": "option", "expected": "0 to 1000"}
    assert isinstance(error, UsageError)
    assert "schema version 3; this nih-sched has 1. Upgrade" in str(NewerLedger(address="a", found=3, known=1))


def test_a_missing_fact_is_noticed_when_it_is_raised() -> None:
    with pytest.raises(KeyError):
        BadSetting(name="--tries")


def test_what_handlers_raise_is_no_error_of_ours() -> None:
    assert not issubclass(Fail, NihError)
    assert not issubclass(RetryLater, NihError)
    assert not issubclass(AttemptFailed, NihError)
    assert str(RetryLater(1.5)) == "asked to be run again in 1.5 s"
    assert str(Fail("why")) == "why"
    assert (nih_sched.Fail, nih_sched.RetryLater, nih_sched.NihError) == (Fail, RetryLater, NihError)
    with pytest.raises(AttributeError, match="module 'nih_sched' has no attribute 'nothing'"):
        nih_sched.nothing  # noqa: B018


def test_a_handlers_process_pool_can_carry_them() -> None:
    assert str(pickle.loads(pickle.dumps(Fail("why")))) == "why"
    assert pickle.loads(pickle.dumps(RetryLater(1.5))).seconds == 1.5
