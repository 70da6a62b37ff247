"""From an address to an engine, with errors that say what to do."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from sqlalchemy import Engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from nih_sched.dialects.base import Dialect, reason
from nih_sched.errors import BadSetting, MissingDriver, UnreachableDatabase, UsageError

# How hosts hand addresses out -> our dialect's class, the driver we use, the extra that installs it
SCHEMES = {
    "postgres": ("PostgreSQL", "postgresql+psycopg", "postgresql"),
    "postgresql": ("PostgreSQL", "postgresql+psycopg", "postgresql"),
    "mysql": ("MySQL", "mysql+pymysql", "mysql"),
    "mariadb": ("MySQL", "mariadb+pymysql", "mysql"),
    "sqlite": ("SQLite", "sqlite", ""),
}


def _dialect(name: str) -> Dialect:
    # Imported when it is needed: each brings SQLAlchemy's own, and a process needs one.
    made: Dialect = getattr(importlib.import_module(f"nih_sched.dialects.{name.lower()}"), name)()
    return made


def parse(url: str) -> tuple[URL, Dialect, str]:
    """The address with its driver, the dialect, and the extra that would install the driver."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise BadSetting(
            name="--database-url", value="…", origin="not shown", expected="an URL such as postgresql://user@host/name"
        ) from None
    backend, _, driver = parsed.drivername.partition("+")
    if backend not in SCHEMES:
        raise BadSetting(
            name="--database-url", value=f"{backend}://…", origin="its scheme", expected=", ".join(SCHEMES)
        )
    dialect, drivername, extra = SCHEMES[backend]
    if not driver:
        parsed = parsed.set(drivername=drivername)
    return parsed, _dialect(dialect), extra


def connect(url: str, *, create: bool = False) -> Engine:
    """An engine that has reached its database once.

    Args:
        url: the address.
        create: whether a missing SQLite file may be made.

    Raises:
        MissingDriver, UnreachableDatabase, BadSetting.
    """
    parsed, dialect, extra = parse(url)
    if dialect.name == "sqlite":
        _check_sqlite(parsed, create)
    try:
        engine = dialect.engine(parsed)
    except (NoSuchModuleError, ModuleNotFoundError):
        raise MissingDriver(scheme=parsed.drivername, extra=extra or "dev") from None
    try:
        with dialect.reading(engine):
            pass
    except SQLAlchemyError as error:
        engine.dispose()
        raise UnreachableDatabase(address=address(url), reason=reason(error)) from error
    return engine


def dialect_of(engine: Engine) -> Dialect:
    """The dialect of an engine."""
    for backend in (engine.dialect.name, engine.url.get_backend_name()):
        if backend in SCHEMES:
            return _dialect(SCHEMES[backend][0])
    raise UsageError(reason=f"Database {engine.dialect.name} isn't served, expected one of {', '.join(SCHEMES)}.")


def address(url: str | URL) -> str:
    """An address that may be shown: without password, and without a query, which may hold one."""
    parsed = make_url(url)
    return parsed.set(query={}).render_as_string(hide_password=True).replace(":***@", "@")


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite address, or None."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database)).resolve()


def identity(url: str) -> str:
    """What those have in common who mean the same database: an SQLite file's real path, or the address."""
    path = sqlite_path(url)
    return str(path) if path else url


def _check_sqlite(url: URL, create: bool) -> None:
    path = sqlite_path(str(url))
    if path is None:
        return
    if not path.parent.is_dir():
        raise UnreachableDatabase(address=address(url), reason=f"there is no folder {path.parent}.")
    if not path.exists() and not create:
        raise UnreachableDatabase(
            address=address(url), reason=f"there is no file {path}. Type `scheduler init --sample` to try us out."
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise UnreachableDatabase(address=address(url), reason=f"{path.parent} is read-only; SQLite must write there.")
