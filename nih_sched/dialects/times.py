"""The database's own clock as SQL, so that machines with different clocks agree. All in UTC."""

from __future__ import annotations

from typing import Any

from sqlalchemy import DateTime, Float
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import expression
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.visitors import InternalTraversal

SQLITE_FORMAT = "'%Y-%m-%d %H:%M:%f000'"  # microseconds as SQLAlchemy writes them, so that texts compare


class Now(ColumnElement[Any]):
    """The instant at which the statement runs, not the one at which its transaction began."""

    type = DateTime(timezone=True)
    inherit_cache = True
    _traverse_internals = []  # noqa: RUF012 - as below; without, no statement with it would be kept compiled


class After(ColumnElement[Any]):
    """Now plus some seconds, fractions kept; minus, where they are negative."""

    type = DateTime(timezone=True)
    inherit_cache = True
    _traverse_internals = [("seconds", InternalTraversal.dp_clauseelement)]  # noqa: RUF012 - SQLAlchemy's own form

    def __init__(self, seconds: float | ColumnElement[Any]) -> None:
        if isinstance(seconds, int | float):
            self.seconds: ColumnElement[Any] = expression.bindparam(None, float(seconds), type_=Float(), unique=True)
        else:
            self.seconds = seconds


class Between(ColumnElement[Any]):
    """The seconds from one instant to a later one: for many records, quicker read than two instants."""

    type = Float()
    inherit_cache = True
    _traverse_internals = [  # noqa: RUF012 - as above
        ("earlier", InternalTraversal.dp_clauseelement),
        ("later", InternalTraversal.dp_clauseelement),
    ]

    def __init__(self, earlier: ColumnElement[Any], later: ColumnElement[Any]) -> None:
        self.earlier = earlier
        self.later = later


@compiles(Now, "postgresql")
def _now_postgresql(element: Now, compiler: Any, **kw: Any) -> str:
    return "clock_timestamp()"


@compiles(After, "postgresql")
def _after_postgresql(element: After, compiler: Any, **kw: Any) -> str:
    return f"clock_timestamp() + ({compiler.process(element.seconds, **kw)}) * interval '1 second'"


@compiles(Between, "postgresql")
def _between_postgresql(element: Between, compiler: Any, **kw: Any) -> str:
    earlier, later = compiler.process(element.earlier, **kw), compiler.process(element.later, **kw)
    return f"extract(epoch FROM {later} - {earlier})::float8"


@compiles(Now, "mysql", "mariadb")
def _now_mysql(element: Now, compiler: Any, **kw: Any) -> str:
    return "utc_timestamp(6)"


@compiles(After, "mysql", "mariadb")
def _after_mysql(element: After, compiler: Any, **kw: Any) -> str:
    # INTERVAL takes fractions of a second as DECIMAL; a DOUBLE would be rounded.
    seconds = compiler.process(element.seconds, **kw)
    return f"utc_timestamp(6) + interval cast({seconds} as decimal(20,6)) second"


@compiles(Between, "mysql", "mariadb")
def _between_mysql(element: Between, compiler: Any, **kw: Any) -> str:
    earlier, later = compiler.process(element.earlier, **kw), compiler.process(element.later, **kw)
    return f"timestampdiff(microsecond, {earlier}, {later}) * 1e-6"


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: Any, **kw: Any) -> str:
    return f"strftime({SQLITE_FORMAT.replace('%', _percent(compiler))}, 'now')"


@compiles(After, "sqlite")
def _after_sqlite(element: After, compiler: Any, **kw: Any) -> str:
    # SQLite's clock has milliseconds, cut off: one more makes sure that no wait ends early.
    seconds = compiler.process(element.seconds, **kw)  # a sum is left to right, with one more
    form = SQLITE_FORMAT.replace("%", _percent(compiler))
    return f"strftime({form}, 'now', ({seconds} + 0.001) || ' seconds')"


@compiles(Between, "sqlite")
def _between_sqlite(element: Between, compiler: Any, **kw: Any) -> str:
    earlier, later = compiler.process(element.earlier, **kw), compiler.process(element.later, **kw)
    return f"(julianday({later}) - julianday({earlier})) * 86400.0"


def _percent(compiler: Any) -> str:
    return "%%" if compiler.preparer._double_percents else "%"
