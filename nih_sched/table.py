"""The user's table: reflected, never migrated; its words, its keys, and what each optional part switches on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Enum,
    FetchedValue,
    Float,
    Inspector,
    Integer,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    String,
    Table,
    and_,
    inspect,
    literal_column,
    tuple_,
)
from sqlalchemy.exc import DBAPIError, NoSuchTableError, SAWarning
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import NullType

from nih_sched.errors import (
    AmbiguousStates,
    BadStateWord,
    NoPrimaryKey,
    NoSuchColumn,
    NoSuchTable,
    NotATable,
    UnusableKey,
)
from nih_sched.model import SURROGATES, Key, State, Word
from nih_sched.settings import Settings, option_name

Among = Callable[[Column[Any], Sequence[Any]], ColumnElement[bool]]

DEFAULT_WORDS: dict[State, str] = {
    State.QUEUED: "Queued",
    State.STARTED: "Started",
    State.DONE: "Done",
    State.FAILED: "Failed",
    State.CANCELLED: "Cancelled",
}


@dataclass(frozen=True)
class Feature:
    """What an optional column or setting of the user's adds to the way of a row; absent, it adds nothing."""

    name: str
    where: ColumnElement[bool] | None = None


@dataclass(frozen=True)
class RowTable:
    """One user's table as one source sees it."""

    name: str  # schema.table, the schema always said, so that two spellings are one table
    table: Table
    status: Column[Any]
    keys: tuple[Column[Any], ...]
    words: Mapping[State, Word]
    features: tuple[Feature, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in the table's order."""
        return tuple(column.name for column in self.table.columns)

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """What the features ask of a ready row."""
        return [feature.where for feature in self.features if feature.where is not None]

    def labelled(self, names: Sequence[str]) -> list[Any]:
        """These columns under labels of our own, because a column may be named like another's label."""
        return [self.table.columns[name].label(f"nih_sched_{number}") for number, name in enumerate(names)]

    def keyed(self, keys: Sequence[Key], among: Among = Column.in_) -> ColumnElement[bool]:
        """The rows with these keys; `among` is the database's way to ask for one of several values."""
        if len(self.keys) == 1:
            return among(self.keys[0], [key[0] for key in keys])
        if len(keys) == 1:
            return and_(*(column == part for column, part in zip(self.keys, keys[0], strict=True)))
        return tuple_(*self.keys).in_(keys)


def features(settings: Settings) -> tuple[Feature, ...]:
    """FEATURES: each optional part that the settings switch on. A new column feature is one more line here."""
    return tuple(
        feature
        for feature in (
            # On a line of its own, so that a comment at the end of the user's SQL doesn't swallow our parenthesis.
            Feature("where", where=literal_column(f"({settings.where}\n)")) if settings.where else None,
        )
        if feature is not None
    )


def find_table(bind: Engine | Connection | Inspector, name: str, address: str = "the database") -> tuple[str, Table]:
    """Reflect `table` or `schema.table`; return its full name as well.

    Raises:
        NoSuchTable: with the names that look alike. NotATable: it is a view.
    """
    inspector = bind if isinstance(bind, Inspector) else inspect(bind)
    schema, table_name = _split(inspector, name)
    try:
        names = inspector.get_table_names(schema=schema)
    except DBAPIError as error:
        if schema is None or error.connection_invalidated:
            raise
        raise NoSuchTable(table=name, address=address, hint=f" It has no schema {schema}.") from None
    if table_name not in names:
        if table_name in inspector.get_view_names(schema=schema):
            raise NotATable(table=name)
        there = [t for t in names if not t.startswith("nih_sched_")]
        hint = (
            f" It has: {', '.join(there[:20])}." if there else " It has no tables. `scheduler init --sample` makes one."
        )
        raise NoSuchTable(table=name, address=address, hint=hint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # types that SQLAlchemy doesn't know pass through as they are
        try:
            table = _reflected(inspector, table_name, schema)
        except NoSuchTableError:
            raise NoSuchTable(table=name, address=address, hint="") from None
    for column in table.columns:
        column.type = getattr(column.type, "data_type", column.type)  # a domain is handled as what it stands on
    return f"{schema or inspector.default_schema_name or 'main'}.{table_name}", table


def _reflected(inspector: Inspector, name: str, schema: str | None) -> Table:
    # Its columns and key alone: to read indexes, references and checks takes longer than all else that a look does.
    found = inspector.get_columns(name, schema=schema)
    key = inspector.get_pk_constraint(name, schema=schema)["constrained_columns"]
    return Table(name, MetaData(), *map(_column, found), PrimaryKeyConstraint(*key), schema=schema)


def _column(facts: Any) -> Column[Any]:
    known = {name: facts[name] for name in ("nullable", "autoincrement", "quote") if name in facts}
    makes_its_own = any(facts.get(name) is not None for name in ("default", "computed", "identity"))
    return Column(facts["name"], facts["type"], *([FetchedValue()] if makes_its_own else []), **known)


def _split(inspector: Any, name: str) -> tuple[str | None, str]:
    # A table's own name may hold a dot: the whole name is tried first.
    if "." in name and name not in inspector.get_table_names():
        schema, _, rest = name.partition(".")
        return (None if schema == inspector.default_schema_name else schema), rest
    return None, name


def reflect(bind: Engine | Connection | Inspector, settings: Settings, address: str = "the database") -> RowTable:
    """The table that the settings name, checked: columns, key and state words.

    Raises:
        NoSuchTable, NotATable, NoSuchColumn, NoPrimaryKey, BadStateWord, AmbiguousStates.
    """
    name, table = find_table(bind, settings.table, address)
    status = column_of(table, settings.status_key, settings.origin("status_key"))
    if settings.primary_key:
        parts = [part.strip() for part in settings.primary_key.split(",")]
        keys = tuple(column_of(table, part, settings.origin("primary_key")) for part in parts)
    else:
        keys = tuple(table.primary_key.columns)
    if not keys:
        raise NoPrimaryKey(table=settings.table)
    if problem := _key_problem(table, keys):
        raise UnusableKey(columns=", ".join(key.name for key in keys), table=settings.table, reason=problem)
    if settings.job_column:
        column_of(table, settings.job_column, settings.origin("job_column"))
    return RowTable(
        name=name,
        table=table,
        status=status,
        keys=keys,
        words=words_for(status, settings),
        features=features(settings),
    )


def _key_problem(table: Table, keys: Sequence[Column[Any]]) -> str | None:
    """Why these columns can't be the key; None if they can, as far as their types tell.

    Whether they do tell rows apart is checked at each claim, by the count of rows that it changes.
    """
    if any(isinstance(key.type, Float) for key in keys):
        return "floating-point numbers don't equal themselves when they come back."
    own = [key.name for key in table.primary_key.columns]
    if own and set(own) != {key.name for key in keys}:
        # Another key would be another name for the same row: two schedulers could run it at once.
        return f"the table has a primary key, {', '.join(own)}. Use that."
    return None


def column_of(table: Table, name: str, origin: str) -> Column[Any]:
    """The column of that name.

    Raises:
        NoSuchColumn: with the names that there are.
    """
    if name not in table.columns:
        names = ", ".join(table.columns.keys())
        raise NoSuchColumn(table=table.name, column=name, origin=origin, columns=names)
    return table.columns[name]


def words_for(status: Column[Any], settings: Settings) -> dict[State, Word]:
    """Each state's word, in the column's own type.

    A default that the column can't hold falls back where it may (queued to started, cancelled to failed), and is asked
    for where not.
    """
    given = {state: getattr(settings, f"{state.value}_val") for state in State}
    words: dict[State, Word] = {}
    problems: list[str] = []
    missing: list[str] = []
    for state, word in given.items():
        if word is not None:
            try:
                words[state] = fit(status, word)
            except ValueError as error:
                problems.append(f"the {state.value} word {word!r} ({error})")
        elif state in DEFAULT_WORDS:
            try:
                words[state] = fit(status, DEFAULT_WORDS[state])
            except ValueError:
                if state not in (State.QUEUED, State.CANCELLED):
                    missing.append(option_name(f"{state.value}_val"))
    if problems or missing:
        problems += [f"our default for {', '.join(missing)}"] if missing else []
        hint = f" Set {', '.join(missing)}." if missing else _choices(status)
        raise BadStateWord(
            column=status.name, table=status.table.name, problems="; ".join(problems), type=status.type, hint=hint
        )
    words.setdefault(State.QUEUED, words[State.STARTED])
    words.setdefault(State.CANCELLED, words[State.FAILED])
    words.setdefault(State.RETRYING, words[State.QUEUED])
    for state in State:
        if state is not State.READY and words[state] == words[State.READY]:
            raise AmbiguousStates(state=state.value, word=words[state], option=option_name(f"{state.value}_val"))
    return words


def fit(status: Column[Any], word: str) -> Word:
    """The word as the column holds it.

    Raises:
        ValueError: it can't; the text says why.
    """
    kind = status.type
    if "\0" in word or SURROGATES.search(word):
        raise ValueError("it holds what no text of a database does")
    if isinstance(kind, Enum):
        if word not in kind.enums:
            raise ValueError("not one of its values")
        return word
    if isinstance(kind, Integer | Numeric):
        try:
            number = int(word)
        except ValueError:
            raise ValueError("not a whole number") from None
        if not _holds(kind, number):
            raise ValueError("beyond its range")
        return number
    if isinstance(kind, String) and kind.__visit_name__ != "SET":
        if kind.length is not None and len(word) > kind.length:
            raise ValueError(f"longer than {kind.length} characters")
        return word
    if isinstance(kind, NullType) or kind.__visit_name__ == "DOMAIN":
        return word  # a type that SQLAlchemy doesn't know: the database will say
    raise ValueError("a status column holds texts, whole numbers or an enum")


def _holds(kind: Any, number: int) -> bool:
    if isinstance(kind, Integer):
        bits = {"TINYINT": 8, "SMALLINT": 16, "MEDIUMINT": 24, "BIGINT": 64}.get(kind.__visit_name__.upper(), 32)
        return -(1 << bits - 1) <= number < 1 << (bits if getattr(kind, "unsigned", False) else bits - 1)
    return bool(kind.precision is None or abs(number) < 10 ** (kind.precision - (kind.scale or 0)))


def _choices(status: Column[Any]) -> str:
    if isinstance(status.type, Enum):
        return f" Its values: {', '.join(map(str, status.type.enums))}."
    return ""
