"""Faults of the database and of Redis, each until it is undone."""

from __future__ import annotations

import signal
import sqlite3
import threading
from contextlib import suppress

import redis
import servers
import sqlalchemy


class Servers:
    """The database and the Redis that the schedulers share."""

    def __init__(self, database: servers.DatabaseServer | None, url: str, redis_server: servers.Redis) -> None:
        self._database = database
        self._name = str(sqlalchemy.make_url(url).database)  # for SQLite its file
        self._redis = redis_server
        self.over = threading.Event()  # ends each outage now

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a file with one lock."""
        return self._database is None

    @property
    def _server(self) -> servers.DatabaseServer:
        assert self._database is not None
        return self._database

    def redis_flush(self) -> None:
        """Redis forgets all."""
        with redis.Redis.from_url(self._redis.url) as client:
            client.flushall()

    def redis_restart(self, seconds: float) -> None:
        """Redis is away, then back and empty."""
        self._redis.kill()
        self.over.wait(seconds)
        self._redis.start()

    def redis_freeze(self, seconds: float) -> None:
        """Redis says nothing for a while."""
        process = self._redis.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            self.over.wait(seconds)
        finally:
            process.send_signal(signal.SIGCONT)

    def cut(self) -> None:
        """Every connection to the database ends."""
        if self._server.name == "postgresql":
            self._server.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{self._name}' AND pid <> pg_backend_pid()"
            )
            return
        for (number,) in self._server.sql(f"SELECT id FROM information_schema.processlist WHERE db = '{self._name}'"):
            with suppress(sqlalchemy.exc.DBAPIError):  # it has just gone
                self._server.sql(f"KILL HARD {number}")

    def restart(self, seconds: float) -> None:
        """The database dies, and comes back with what was committed."""
        self._server.kill()
        self.over.wait(seconds)
        self._server.start()

    def readonly(self, seconds: float) -> None:
        """The database refuses to write, as after a failover by which only a replica answers."""
        if self._server.name == "postgresql":
            on = ["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"]
            off = ["ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()"]
        else:
            on, off = ["SET GLOBAL read_only = 1"], ["SET GLOBAL read_only = 0"]
        self._server.sql(*on)
        try:
            self.cut()
            self.over.wait(seconds)
        finally:
            self._server.sql(*off)

    def lock(self, seconds: float) -> None:
        """Another program holds SQLite's lock."""
        connection = sqlite3.connect(self._name, timeout=60, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            self.over.wait(seconds)
            connection.execute("ROLLBACK")
        finally:
            connection.close()

    def can_write(self) -> bool:
        """Whether SQLite's lock is free."""
        connection = sqlite3.connect(self._name, timeout=0.7, isolation_level=None)
        try:
            with suppress(sqlite3.OperationalError):
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
                return True
            return False
        finally:
            connection.close()
