"""The private servers, with the durability that their makers ship, and fresh databases on them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import redis
import servers

from bench import usage


class PostgreSQL(servers.PostgreSQL):
    """As tests/servers.py starts it, but a commit is on the disk, as it is by default."""

    def command(self) -> list[str]:
        """The last word of a setting counts."""
        return [*super().command(), "-c", "fsync=on", "-c", "full_page_writes=on", "-c", "synchronous_commit=on"]


class MariaDB(servers.MariaDB):
    """Likewise."""

    def command(self) -> list[str]:
        """Likewise."""
        return [*super().command(), "--innodb-flush-log-at-trx-commit=1", "--innodb-doublewrite=1"]


@dataclass(frozen=True)
class Redis:
    """One of the benchmark's own, saving nothing."""

    server: servers.Redis

    @property
    def url(self) -> str:
        """Its address: a unix socket."""
        return self.server.url

    def flush(self) -> None:
        """Empty it."""
        self.server.flush()

    def sizes(self) -> dict[str, float]:
        """Memory in MB, keys, and jobs that wait in RQ's queues."""
        with redis.Redis.from_url(self.url) as client:
            waiting = sum(int(client.llen(key)) for key in client.smembers("rq:queues"))
            return {
                "MB": client.info("memory")["used_memory"] / 2**20,
                "keys": client.dbsize(),
                "waiting": waiting,
            }


class Rig:
    """Servers are started when they are first asked for, and end with servers.finish()."""

    @functools.cached_property
    def postgresql(self) -> PostgreSQL:
        """PostgreSQL."""
        return PostgreSQL().start()

    @functools.cached_property
    def mariadb(self) -> MariaDB | None:
        """MariaDB, if it is installed."""
        try:
            return MariaDB().start()
        except pytest.skip.Exception:
            return None

    @functools.cached_property
    def redis(self) -> Redis:
        """Redis."""
        return Redis(servers.Redis().start())

    def has(self, kind: str) -> bool:
        """Whether this kind of database can be had."""
        return kind != "mariadb" or self.mariadb is not None

    @contextmanager
    def database(self, kind: str) -> Iterator[servers.Database]:
        """A fresh database."""
        if kind == "sqlite":
            yield servers.Database("sqlite", f"sqlite:///{servers.folder('sqlite')}/bench.db")
            return
        server = self.postgresql if kind == "postgresql" else self.mariadb
        if server is None:
            raise RuntimeError(f"no {kind} here")
        with server.fresh() as database:
            yield database

    def settle(self, database: servers.Database) -> None:
        """Write out what was filled in, so that no run pays for it."""
        if database.name == "postgresql":
            self.postgresql.sql("CHECKPOINT")

    def cpu(self, kind: str) -> float:
        """CPU seconds that the database's server and Redis have used so far; SQLite has no server."""
        return usage.cpu_of(self.pids(kind))

    def pids(self, kind: str) -> Sequence[int]:
        """Root processes of the database's server and of Redis."""
        database = self.postgresql if kind == "postgresql" else self.mariadb if kind == "mariadb" else None
        found = [one.process.pid for one in (database, self.redis.server) if one is not None and one.process]
        return [pid for pid in found if psutil.pid_exists(pid)]

    def versions(self) -> dict[str, str]:
        """Of the servers that were used."""
        found: dict[str, str] = {}
        if "postgresql" in self.__dict__:
            found["PostgreSQL"] = self.postgresql.sql("SHOW server_version")[0][0]
            for name in ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers"):
                found[f"PostgreSQL's {name}"] = self.postgresql.sql(f"SHOW {name}")[0][0]
        if self.__dict__.get("mariadb") is not None and self.mariadb is not None:
            found["MariaDB"] = self.mariadb.sql("SELECT version()")[0][0]
            query = "SELECT @@innodb_flush_log_at_trx_commit, @@innodb_doublewrite"
            flush, doublewrite = self.mariadb.sql(query)[0]
            found["MariaDB's innodb_flush_log_at_trx_commit, innodb_doublewrite"] = f"{flush}, {doublewrite}"
        with redis.Redis.from_url(self.redis.url) as client:
            info = client.info("server")
            found["Valkey" if "valkey_version" in info else "Redis"] = info.get("valkey_version", info["redis_version"])
            saves = client.config_get("save")["save"] or "nothing"
            found["It saves"] = f"{saves}; appendonly {client.config_get('appendonly')['appendonly']}"
        return found


def filesystem(path: Path) -> str:
    """On what the databases lie."""
    parts = [one for one in psutil.disk_partitions(all=True) if path.is_relative_to(one.mountpoint)]
    return max(parts, key=lambda one: len(one.mountpoint)).fstype if parts else "unknown"
