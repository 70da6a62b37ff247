"""SQLite's data_version: a number that each commit on another connection changes, read without touching a table."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import clock
from nih_sched.dialects.file_events import FileEvents
from nih_sched.dialects.watch import Watch

BRISK = 0.005  # seconds between looks while rows run, or lately did, and just after the file was written to
CALM = 0.02  # seconds between looks else: a look is 3 us of work, and being woken for it some 100
TOLD = 0.25  # seconds between looks while the system tells when the file is written to
JUST_AFTER = 0.1  # seconds; what is being written isn't committed yet
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class DataVersion(Watch):
    """Tells of every commit, our own workers' too: whoever hears it looks whether it brought a row."""

    sure = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        path = os.path.realpath(str(engine.url.database))
        self._paths = (path, f"{path}-wal")
        self._events: FileEvents | None = None
        self._written = 0.0  # when we were told last
        self._told_of = True  # whether the last change had been told of
        self._connection: Connection | None = None
        self._driver: Any = None
        self._seen: int | None = None

    def fileno(self) -> int | None:
        """The system's word that the file is written to; not while we look often anyway."""
        return None if self._events is None or self._looks_often() else self._events.fileno()

    @property
    def every(self) -> float | None:  # type: ignore[override]  # it changes here
        """Seconds until the next look is worth its cost."""
        if self._driver is None:
            return None
        if self._looks_often():
            return BRISK
        return CALM if self._events is None else TOLD

    def tend(self) -> None:
        """Open the connection."""
        try:
            if self._driver is None:
                self._connection = self._engine.connect()
                self._driver = self._connection.connection.driver_connection
                self._connection.detach()
                self._driver.execute("PRAGMA busy_timeout = 0")  # a writer in our way will be heard of when it is done
                self._version()  # the write-ahead log is there from the first look on
                self._events = FileEvents()
                self.live = True
            if self._events is not None:
                self._events.add(self._paths)
                if self._events.fileno() is None:
                    self._events = None
        except (SQLAlchemyError, sqlite3.Error):
            self.close()

    def rung(self) -> bool:
        """Whether anything was committed since the last call."""
        if self._driver is None:
            return False
        told = self._was_told()
        try:
            version = self._version()
        except sqlite3.Error as error:
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in BUSY:
                return False
            self.close()
            return True
        if version == self._seen:
            return False
        self._told_of = told or self._seen is None
        self._seen = version
        return True

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection, self._driver = self._connection, None, None
        self._seen, self.live = None, False
        self._distrust()
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError, sqlite3.Error):
                connection.close()

    def _version(self) -> int:
        # All rows are fetched, else the statement would keep its view of the file, and the log from being emptied.
        ((version,),) = self._driver.execute("PRAGMA data_version").fetchall()
        return int(version)

    def _looks_often(self) -> bool:
        return self.brisk or clock.monotonic() < self._written + JUST_AFTER

    def _was_told(self) -> bool:
        """Whether the system has told us of a write lately; it is trusted until a change shows that it didn't."""
        if self._events is None:
            return False
        if self._events.happened():
            self._written = clock.monotonic()
            self._told_of = True
        elif not self._told_of:  # nor has it by now
            self._distrust()
        return clock.monotonic() < self._written + JUST_AFTER

    def _distrust(self) -> None:
        events, self._events = self._events, None
        self._told_of = True
        if events is not None:
            events.close()
