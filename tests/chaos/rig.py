"""The rig: private servers, schedulers, the owner and the killer together; from the first row to the last."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import servers
import sqlalchemy

from chaos.faults import Injector
from chaos.journal import Hands, Journal
from chaos.outages import Servers
from chaos.owner import Owner
from chaos.plan import Plan
from chaos.trees import Tree

UP = 90.0  # seconds for the schedulers to come up
DRAIN = 60.0  # seconds beyond a lease for the last rows to become final, and what is left of work
GRACE = 8.0  # less than the longest rows take: some are interrupted
LAST = 45.0  # seconds for a scheduler to end when it is told to

Say = Callable[[str], None]


class Broken(Exception):
    """The rig itself doesn't work: nothing is proved."""


@dataclass(frozen=True)
class Options:
    """How a run is made."""

    database: str
    lease: float
    schedulers: int
    workers: int  # of each
    preload: str | None
    folder: Path


@contextmanager
def started(options: Options, say: Say) -> Iterator[Rig]:
    """Servers, an empty table and schedulers; all of it ends with the context."""
    with ExitStack() as stack:
        stack.callback(servers.finish)
        server = _database(options.database)
        url = _url(server, options.folder)
        redis_server = servers.Redis().start()
        say(f"{options.database} and Redis are up")
        rig = Rig(options, server, url, redis_server, say)
        stack.callback(rig.kill)
        rig.start()
        yield rig


class Rig:
    """What runs."""

    def __init__(
        self, options: Options, server: servers.DatabaseServer | None, url: str, redis_server: servers.Redis, say: Say
    ) -> None:
        self.url = url
        self._options = options
        self._say = say
        self._journal = Journal(options.folder)
        self._owner = Owner(url, self._journal)
        command = _command(options, url, redis_server.url)
        env = _environment(options.folder)
        self._trees = [
            Tree(number, command, env, options.folder, options.workers, self._journal)
            for number in range(1, options.schedulers + 1)
        ]
        hands = Hands(options.folder / "runs.log")
        self._injector = Injector(self._trees, Servers(server, url, redis_server), self._owner, hands, self._journal)

    def start(self) -> None:
        """Make the table, start the schedulers."""
        self._owner.make_table()
        for tree in self._trees:
            tree.start()
        self._wait_until_up()
        self._say(f"{len(self._trees)} schedulers of {self._options.workers} workers each are up")

    def _wait_until_up(self) -> None:
        end = time.monotonic() + UP
        while not all(tree.is_up for tree in self._trees):
            if time.monotonic() > end:
                names = [tree.name for tree in self._trees if not tree.is_up]
                raise Broken(f"schedulers {names} didn't come up in {UP:g} s, see tree-*.log")
            time.sleep(0.1)

    def run(self, plan: Plan) -> None:
        """Rows and faults as planned; then all is put right, and every row gets the time to become final."""
        begin = time.monotonic()
        self._journal.write(
            "run", begin=begin, seed=plan.seed, lease=self._options.lease, database=self._options.database
        )
        stream = threading.Thread(target=self._owner.insert_all, args=(plan.rows, begin), daemon=True)
        stream.start()
        for number, fault in enumerate(plan.faults, 1):
            self._sleep_until(begin + fault.at)
            self._say(f"{time.monotonic() - begin:6.1f} s  fault {number}: {fault.kind}")
            self._injector.begin(number, fault)
        self._sleep_until(begin + plan.seconds)
        self._injector.finish()
        self._check_rig()
        stream.join(30)
        self._wait_until_up()
        self._drain(begin)

    def _sleep_until(self, instant: float) -> None:
        while (left := instant - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            self._check_rig()

    def _check_rig(self) -> None:
        if self._injector.errors:
            raise Broken("a fault couldn't be injected:\n" + "\n".join(self._injector.errors))

    def _drain(self, begin: float) -> None:
        self._journal.write("drain")
        end = time.monotonic() + self._options.lease + DRAIN
        said = None
        while left := self._owner.unfinished():
            if left != said:
                said, moved = left, time.monotonic()
                end = max(end, moved + self._options.lease + DRAIN)  # work that is left, as long as it gets less
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        self._say(f"{time.monotonic() - begin:6.1f} s  {left} rows aren't final; stopping the schedulers")
        threads = [threading.Thread(target=self._close, args=(tree,)) for tree in self._trees]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _close(self, tree: Tree) -> None:
        code = tree.close(LAST)
        self._journal.write("closed", tree=tree.number, code=code)

    def kill(self) -> None:
        """Whatever still runs."""
        self._owner.close()
        for tree in self._trees:
            tree.close(0.0)


def _database(kind: str) -> servers.DatabaseServer | None:
    classes = {"postgresql": servers.PostgreSQL, "mariadb": servers.MariaDB}
    return classes[kind]().start() if kind in classes else None


def _url(server: servers.DatabaseServer | None, folder: Path) -> str:
    if server is None:
        path = folder / "chaos.db"
        path.touch()
        return f"sqlite:///{path}"
    url = server.create().url
    if server.name == "mariadb":  # its read_only doesn't bind an administrator
        name = sqlalchemy.make_url(url).database
        server.sql("CREATE USER chaos@'127.0.0.1'", f"GRANT ALL PRIVILEGES ON {name}.* TO chaos@'127.0.0.1'")
        url = url.replace("//root@", "//chaos@")
    return url


def _command(options: Options, url: str, redis_url: str) -> list[str]:
    command = [sys.executable, "-m", "nih_sched", "run", "--database-url", url, "--redis-url", redis_url]
    command += ["--table", "jobs", "--job", "chaos.handler:work", "--max-concurrent-jobs", str(options.workers)]
    command += ["--tries", "20", "--delay", "0.2", "--backoff", "1.2", "--max-delay", "2"]
    command += ["--lease", f"{options.lease:g}", "--grace", f"{GRACE:g}", "--poll-interval", "0.2"]
    command += ["--batch-size", "4"]  # of mixed lengths: by itself it would be 1
    command += ["--log-format", "json"]
    return command + (["--preload", options.preload] if options.preload else [])


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of the developer's but PATH, and PYTHONPATH for --preload; ours for the handler comes first."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}
