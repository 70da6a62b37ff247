"""Options made from the settings, so that help, docs and code can't differ."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import click

from nih_sched import clock
from nih_sched.errors import UsageError
from nih_sched.settings import Settings, env_names, fields, load, option_name, value_type

FIRST = tuple(name for name, f in fields().items() if f.metadata["group"] == "first")
COMMON = (*(name for name, f in fields().items() if f.metadata["group"] in ("first", "common")), "config")
RUN = tuple(name for name, f in fields().items() if f.metadata["group"] == "run")
METRICS = tuple(name for name, f in fields().items() if f.metadata["group"] == "metrics")
DASHBOARD = tuple(name for name, f in fields().items() if f.metadata["group"] == "dashboard")
TABLE = (
    "database_url",
    "table",
    "status_key",
    "primary_key",
    "where",
    "ledger_schema",
    *(name for name in fields() if name.endswith("_val")),
    "states",
    "config",
)
LOOK = (*TABLE, "redis_url", "created_column")


Command = Callable[..., Any]


def default_text(name: str) -> str:
    """A field's default in words."""
    field = fields()[name]
    if field.metadata["shown"]:
        return str(field.metadata["shown"])
    default = field.default
    if default is None or default is False or default is dataclasses.MISSING:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def help_text(name: str) -> str:
    """A field's help with its environment variables and default."""
    facts = fields()[name].metadata
    notes = [f"env: {', '.join(env_names(name))}"]
    if default := default_text(name):
        notes.append(f"default: {default}")
    return f"{facts['help']}  [{'; '.join(notes)}]"


def metavar(name: str) -> str:
    """What stands for a field's value in help."""
    facts = fields()[name].metadata
    if facts["choices"]:
        return "|".join(facts["choices"])
    kinds = {int: "N", float: "NUMBER", bool: ""}
    return str(facts["metavar"] or kinds.get(value_type(name), "TEXT"))


def help_records(names: Iterable[str]) -> list[tuple[str, str]]:
    """Two columns of help for these fields."""
    return [(f"{option_name(name)} {metavar(name)}".strip(), help_text(name)) for name in names]


def settings_options(names: Iterable[str]) -> Callable[[Command], Command]:
    """A decorator that gives a command these fields as options, and hands it Settings as its first argument."""
    chosen = tuple(names)

    def decorate(command: Command) -> Command:
        def wrapped(**given: Any) -> Any:
            options = {name: given.pop(name) for name in chosen}
            return command(load(options, os.environ), **given)

        wrapped.__name__ = command.__name__
        wrapped.__doc__ = command.__doc__
        wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for name in reversed(chosen):
            wrapped = _option(name)(wrapped)
        return wrapped

    return decorate


def seconds_of(text: str) -> float:
    """A length of time as people type it: 90, 90s, 30m, 1.5h, 2d; in seconds.

    Raises:
        UsageError: it is none.
    """
    try:
        return clock.period(text)
    except ValueError as error:
        raise UsageError(reason=f"{error}.") from error


def _option(name: str) -> Callable[[Command], Command]:
    kind = value_type(name)
    if kind is bool:
        return click.option(option_name(name), name, is_flag=True, default=None, help=help_text(name))
    # Values are checked in settings, where environment and config file are checked too: here they are texts.
    return click.option(option_name(name), name, metavar=metavar(name), help=help_text(name))


__all__ = [
    "COMMON",
    "DASHBOARD",
    "FIRST",
    "LOOK",
    "METRICS",
    "RUN",
    "TABLE",
    "Settings",
    "default_text",
    "help_records",
    "help_text",
    "seconds_of",
    "settings_options",
]
