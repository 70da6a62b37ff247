"""Statements straight on the driver: over one of a few rows SQLAlchemy takes longer than the database does.

They are written by SQLAlchemy all the same, once, with its quoting and its types.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

PSYCOPG, MANY = "psycopg", "many"
FEW = 16  # values in a list, up to which each number of them has a text of its own
MOST = 500  # texts kept
PREPARED = 50  # statements that one of MariaDB's connections keeps
_PERCENT = re.compile(r"%(?:%|\([^)]*\)s)")  # in PyMySQL's texts: one, or a parameter


class Ran(NamedTuple):
    """What a statement did."""

    rows: Sequence[Sequence[Any]]  # that it returned
    touched: int  # how many rows


def run(connection: Connection, statement: Any, values: Mapping[str, Any]) -> Ran:
    """Execute a statement in the connection's transaction.

    Args:
        connection: its.
        statement: one that is made once and kept: what it is written as is kept for it.
        values: its parameters; lists for `IN`.

    Raises:
        DBAPIError: as SQLAlchemy raises it.
    """
    lists = [value for value in values.values() if isinstance(value, list | tuple)]
    shape = tuple(map(len, lists))
    many = any(length > FEW for length in shape)
    # Many take a text of their own each time, but where a list is one parameter, an array.
    if (many and connection.dialect.driver != PSYCOPG) or _is_heard(connection) or _has_tuples(lists):
        return _by_sqlalchemy(connection, statement, values)
    key = (statement, connection.dialect, MANY if many else shape)
    quick = _made.get(key)
    if quick is None:
        if len(_made) >= MOST:
            _made.clear()
        quick = _made[key] = _Quick(connection, statement, values, keep=not many)
    if many and quick.expands:
        return _by_sqlalchemy(connection, statement, values)
    return quick.run(connection, values)


def _by_sqlalchemy(connection: Connection, statement: Any, values: Mapping[str, Any]) -> Ran:
    result = connection.execute(statement, values)
    return Ran(result.all() if result.returns_rows else (), result.rowcount)


def _has_tuples(lists: Sequence[Sequence[Any]]) -> bool:
    """Whether keys of several columns are among the values: all of a list are, or none."""
    return any(isinstance(one, tuple) for some in lists for one in some[:1])


def say(connection: Connection, sql: str) -> None:
    """Execute SQL that has no parameters and returns nothing; errors as of run()."""
    if _is_heard(connection):
        connection.exec_driver_sql(sql)
    else:
        _execute(connection, sql)


def _is_heard(connection: Connection) -> bool:
    """Whether somebody listens to statements, who is to hear them all."""
    return bool(connection.dispatch.before_cursor_execute or connection.engine.dispatch.before_cursor_execute)


class _Quick:
    """A statement as text, for one number of values in each of its lists.

    Args:
        connection: one of its database's.
        statement: what it is.
        values: parameters of this shape.
        keep: have the server keep it. For many values it plans each time: how many they are makes the plan.
    """

    def __init__(self, connection: Connection, statement: Any, values: Mapping[str, Any], *, keep: bool) -> None:
        dialect = connection.dialect
        compiled = statement.compile(dialect=dialect)
        state = compiled.construct_expanded_state(values)
        self._sql = state.statement
        # Where the connection lets it: to read and plan a statement takes the server as long as to run it.
        self._how = {"prepare": keep} if dialect.driver == PSYCOPG else {}
        self._is_for_mariadb = getattr(dialect, "is_mariadb", False) and dialect.driver == "pymysql"
        self._order = state.positiontup
        self.expands = bool(state.parameter_expansion)
        self._expansion = {name: names for name, names in state.parameter_expansion.items() if name in values}
        self._processors = {n: b.type.dialect_impl(dialect).bind_processor(dialect) for n, b in compiled.binds.items()}
        self._processors |= state.processors  # of values in lists
        self._fixed = {
            name: _through(self._processors.get(name), value)
            for name, value in state.parameters.items()
            if name not in values and not any(name in names for names in self._expansion.values())
        }
        self._types = [column.type.dialect_impl(dialect) for column in getattr(statement, "exported_columns", ())]
        self._readers: list[Any] | None = None

    def run(self, connection: Connection, values: Mapping[str, Any]) -> Ran:
        given = dict(self._fixed)
        processors = self._processors
        for name, value in values.items():
            if (names := self._expansion.get(name)) is not None:
                given |= {n: _through(processors.get(n), one) for n, one in zip(names, value, strict=True)}
            else:
                given[name] = _through(processors.get(name), value)
        parameters: Any = given if self._order is None else tuple([given[name] for name in self._order])
        call = self._prepared(connection) if self._is_for_mariadb else None
        rows, touched, described = _execute(connection, self._sql, parameters, call=call, **self._how)
        return Ran(self._read(connection, described, rows) if rows else (), touched)

    def _prepared(self, connection: Connection) -> str | None:
        """What calls the statement, which the server has read once, on this connection; PyMySQL has no other way.

        https://mariadb.com/kb/en/execute-statement/
        """
        kept: dict[str, str | None] = connection.info.setdefault("nih_sched", {})  # forgotten with the connection
        if self._sql not in kept and len(kept) < PREPARED:
            name, names = f"nih_sched_{len(kept)}", [one for one in _PERCENT.findall(self._sql) if one != "%%"]
            text = _PERCENT.sub(lambda found: "%" if found[0] == "%%" else "?", self._sql)
            try:
                _execute(connection, f"PREPARE {name} FROM %s", (text,))
                kept[self._sql] = f"EXECUTE {name}{' USING ' if names else ''}{', '.join(names)}"
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise
                kept[self._sql] = None  # what is wrong with it will be said of itself; or the server keeps no more
        return kept.get(self._sql)

    def _read(self, connection: Connection, described: Any, rows: Sequence[Any]) -> Sequence[Any]:
        if self._readers is None:
            codes = [one[1] for one in described]
            self._readers = [
                kind.result_processor(connection.dialect, code) for kind, code in zip(self._types, codes, strict=False)
            ]
        if not any(self._readers):
            return rows
        return [tuple([_through(*pair) for pair in zip(self._readers, row, strict=True)]) for row in rows]


def _execute(
    connection: Connection, sql: str, *parameters: Any, call: str | None = None, **how: Any
) -> tuple[Sequence[Any], int, Any]:
    """On the driver, by `call` if it is given: rows, how many were touched, and the columns' description.

    Errors are SQLAlchemy's.
    """
    cursor: Any = None
    try:
        cursor = connection.connection.cursor()
        cursor.execute(call or sql, *parameters, **how)
        described = cursor.description
        rows = cursor.fetchall() if described else ()
        touched = cursor.rowcount
        cursor.close()
    except BaseException as error:
        _let_go(connection, cursor, sql, error)
        raise
    return rows, touched, described


def _let_go(connection: Connection, cursor: Any, sql: str, error: BaseException) -> None:
    dialect = connection.dialect
    base: Any = dialect.loaded_dbapi.Error
    # Whoever cuts a statement short leaves the connection in the middle of it.
    lost = not isinstance(error, Exception)
    if isinstance(error, base):
        lost = dialect.is_disconnect(error, connection.connection.driver_connection, cursor)
    if lost:
        connection.invalidate(error)
    elif cursor is not None:
        with contextlib.suppress(base):
            cursor.close()
    if isinstance(error, base):
        raise DBAPIError.instance(
            sql, None, error, base, hide_parameters=True, connection_invalidated=lost, dialect=dialect
        ) from error


def _through(process: Any, value: Any) -> Any:
    return value if process is None else process(value)


_made: dict[Any, _Quick] = {}
