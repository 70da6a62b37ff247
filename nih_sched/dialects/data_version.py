"""SQLite's data_version: a number that each commit on another connection changes, read without touching a table."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from nih_sched.dialects.watch import Watch

BRISK = 0.005  # seconds between looks while rows run, or lately did
CALM = 0.02  # seconds between looks else: a look is 3 us of work, and being woken for it some 60 us
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class DataVersion(Watch):
    """Tells of every commit, our own workers' too: whoever hears it looks whether it brought a row."""

    sure = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None
        self._driver: Any = None
        self._seen: int | None = None

    @property
    def every(self) -> float | None:  # type: ignore[override]  # it changes here
        """Seconds until the next look is worth its cost."""
        if self._driver is None:
            return None
        return BRISK if self.brisk else CALM

    def tend(self) -> None:
        """Open the connection."""
        if self._driver is not None:
            return
        try:
            self._connection = self._engine.connect()
            self._driver = self._connection.connection.driver_connection
            self._connection.detach()
            self._driver.execute("PRAGMA busy_timeout = 0")  # a writer in our way is a change that we hear of next time
            self.live = True
        except (SQLAlchemyError, sqlite3.Error):
            self.close()

    def rung(self) -> bool:
        """Whether anything was committed since the last call."""
        if self._driver is None:
            return False
        try:
            # All rows are fetched, else the statement would keep its view of the file, and the log from being emptied.
            ((version,),) = self._driver.execute("PRAGMA data_version").fetchall()
        except sqlite3.Error as error:
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in BUSY:
                return False
            self.close()
            return True
        if version == self._seen:
            return False
        self._seen = version
        return True

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection, self._driver = self._connection, None, None
        self._seen, self.live = None, False
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError, sqlite3.Error):
                connection.close()
