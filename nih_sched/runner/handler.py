"""From the settings to the thing that is called for a row, refused at the start if it can't work."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nih_sched.errors import BadHandler, Fail, NoHandler
from nih_sched.runner.command import CommandHandler
from nih_sched.settings import Settings

IDS = ("claim_id", "attempt")


class Handler(Protocol):
    """What runs for a row."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it needs of the row; nothing else is selected."""

    def __call__(self, values: Mapping[str, Any], claim_id: int, attempt: int) -> Any:
        """Run it; what it returns is kept as the attempt's result."""


@dataclass(frozen=True)
class FunctionHandler:
    """A Python function, plain or async, called with the columns that it accepts, by name."""

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]
    ids: tuple[str, ...]

    def __call__(self, values: Mapping[str, Any], claim_id: int, attempt: int) -> Any:
        """Call it with its columns, and with claim_id and attempt where it asks for them."""
        if self.ids or len(values) != len(self.columns):
            known = {"claim_id": claim_id, "attempt": attempt}
            values = {column: values[column] for column in self.columns} | {name: known[name] for name in self.ids}
        result = self.function(**values)
        if result is not None and inspect.iscoroutine(result):
            return asyncio.run(result)
        return result


@dataclass(frozen=True)
class ChosenHandler:
    """One of several handlers, picked by a column of the row from the list that the user configured."""

    name: str
    column: str
    handlers: Mapping[str, Handler]
    columns: tuple[str, ...]

    def __call__(self, values: Mapping[str, Any], claim_id: int, attempt: int) -> Any:
        """Run the row's own handler.

        Raises:
            Fail: the row names none that is configured.
        """
        kind = str(values[self.column])
        handler = self.handlers.get(kind)
        if handler is None:
            known = ", ".join(sorted(self.handlers))
            raise Fail(f"{self.column} is {kind!r}, but [handlers] has only: {known}")
        return handler({name: values[name] for name in handler.columns}, claim_id, attempt)


def resolve(settings: Settings, table: str, columns: Sequence[str], stand_in: str | None) -> Handler:
    """The handler that the settings ask for.

    Args:
        settings: job, command or handlers with job_column.
        table: the table's name, for messages.
        columns: the table's columns.
        stand_in: the handler to use when none is set: for our own sample table only.

    Raises:
        NoHandler, BadHandler: before any row is claimed.
    """
    chosen = [name for name in ("job", "command", "handlers") if getattr(settings, name)]
    if len(chosen) > 1:
        raise BadHandler(handler=" and ".join(chosen), reason="set only one of --job, --command and [handlers].")
    if settings.handlers:
        return _choice(settings, columns)
    if settings.job_column:
        raise BadHandler(handler="--job-column", reason="the config file has no [handlers].")
    if settings.command:
        return CommandHandler.parse(settings.command, columns, IDS)
    if settings.job or stand_in:
        return function_handler(settings.job or str(stand_in), load(settings.job or str(stand_in)), columns)
    raise NoHandler(table=table)


def _choice(settings: Settings, columns: Sequence[str]) -> ChosenHandler:
    column = settings.job_column
    if not column:
        raise BadHandler(handler="[handlers]", reason="name the column that picks one with --job-column.")
    handlers = {kind: function_handler(path, load(path), columns) for kind, path in (settings.handlers or {}).items()}
    needed = dict.fromkeys([column, *(name for handler in handlers.values() for name in handler.columns)])
    return ChosenHandler(f"[handlers] by {column}", column, handlers, tuple(needed))


def function_handler(name: str, function: Callable[..., Any], columns: Sequence[str]) -> FunctionHandler:
    """A handler from a function, its parameters held against the table's columns.

    Raises:
        BadHandler: a parameter without default that is no column.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise BadHandler(handler=name, reason=f"its parameters can't be read: {error}.") from error
    accepted: list[str] = []
    ids: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            accepted += [column for column in columns if column not in accepted]
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise BadHandler(handler=name, reason=f"its parameter {parameter.name!r} can't be given by name.")
        elif parameter.name in columns:
            accepted.append(parameter.name)
        elif parameter.name in IDS:
            ids.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise BadHandler(
                handler=name,
                reason=f"it needs {parameter.name!r}, which is no column of the table. It has: {', '.join(columns)}.",
            )
    return FunctionHandler(name, function, tuple(dict.fromkeys(accepted)), tuple(ids))


def load(path: str) -> Callable[..., Any]:
    """Import `module:function`, from the current folder too.

    Raises:
        BadHandler: it can't be imported, isn't there, or isn't callable; the cause's own words are in the text.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise BadHandler(handler=path, reason="expected module:function.")
    found: Any = import_module(module_name, path)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BadHandler(handler=path, reason=f"{module_name} has no {attribute!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise BadHandler(handler=path, reason=f"{attribute} is not callable.")
    function: Callable[..., Any] = found
    return function


def import_module(name: str, path: str) -> Any:
    """Import a module of the user's, the current folder being on the path as for `python -m`.

    Raises:
        BadHandler: whatever its import raised.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # user code runs at import: any error, and a script that ends itself
        raise BadHandler(handler=path, reason=f"importing {name} raised {type(error).__name__}: {error}.") from error
