"""What the integration tests share: a table of work rows, and a handler that counts its runs outside our tables."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import Database, missing
from sqlalchemy import Engine, text

from nih_sched.dialects import connect

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")
# One value for each part of rq-dashboard's addresses; a new part makes address() fail, and so must be thought of here.
RQ_PARTS = {
    "instance_number": "0",
    "queue_name": "jobs",
    "registry_name": "failed",
    "per_page": "8",
    "order": "asc",
    "page": "1",
    "job_id": "failing",
}
HANDLER = """
import os, time
from nih_sched import Fail, RetryLater

def note(*words):
    # One write with O_APPEND: whole lines, whoever else writes.
    fd = os.open("ran.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    os.close(fd)

def count(id):
    note(id)

def timed(id, attempt):
    note(id, time.time())
    raise ValueError(f"attempt {attempt} of {id}")

def slow(id):
    note("begin", id, os.getpid())
    time.sleep(60)

def brief(id):
    note("begin", id)
    time.sleep(2)
    note("end", id)

async def later(id, attempt):
    note(id, attempt)
    if attempt == 1:
        raise RetryLater(0.3)

def final(id):
    raise Fail("never")

def die(id):
    note(id)
    os._exit(3)

def die_timed(id):
    note(id, time.time())
    os._exit(3)

def vanish(id):
    note(id)
    os._exit(0)

def deaf(id):
    import signal
    note(id)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)

def child(id):
    import subprocess
    subprocess.Popen(["sleep", "77"])
    time.sleep(30)

def children(id):
    import multiprocessing
    one = multiprocessing.get_context("fork").Process(target=time.sleep, args=(50,))
    one.start()
    one.terminate()
    one.join(5)
    assert one.exitcode == -15, one.exitcode

def first_fails(id, attempt):
    note(id, attempt)
    if attempt == 1:
        raise RuntimeError("once")

def other(id):
    note("other", id)

def long(id):
    note("begin", id, os.getpid())
    time.sleep(4)
    note("end", id)

def forever(id):
    note("begin", id, os.getpid())
    if sum(line.startswith(f"begin {id} ") for line in open("ran.log")) == 1:
        time.sleep(600)

def segfault(id):
    import signal
    note(id)
    os.kill(os.getpid(), signal.SIGSEGV)

def held(id):
    # C code that holds the GIL for some seconds: catastrophic backtracking.
    import re
    note("begin", id)
    re.match(r"(a?){26}a{26}$", "a" * 26)
    note("end", id)

def mark():
    note("horse", os.getpid())
"""


CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
)


@dataclass
class Work:
    """A database with a table `work`, and a folder with a module `handlers`."""

    database: Database
    engine: Engine
    folder: Path

    def sql(self, statement: str, **values: Any) -> list[Any]:
        """Run a statement in a transaction of its own; rows if it gives any."""
        with self.engine.begin() as connection:
            result = connection.execute(text(statement), values)
            return list(result.all()) if result.returns_rows else []

    def insert(self, *ids: int, state: str = "Pending", kind: str = "a") -> None:
        """Insert rows by id in one transaction."""
        with self.engine.begin() as connection:
            connection.execute(
                text("INSERT INTO work (id, state, kind) VALUES (:id, :state, :kind)"),
                [{"id": i, "state": state, "kind": kind} for i in ids],
            )

    def states(self) -> dict[str, int]:
        """How many rows there are of each word."""
        return dict(map(tuple, self.sql("SELECT state, count(*) FROM work GROUP BY state")))

    def ran(self) -> Counter[str]:
        """How often each line was noted."""
        path = self.folder / "ran.log"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def attempts(self, row: int = 1) -> list[Any]:
        """A row's history, oldest attempt first."""
        return self.sql("SELECT * FROM nih_sched_attempts WHERE row_key = :k ORDER BY attempt, id", k=f"[{row}]")

    @property
    def env(self) -> dict[str, str]:
        """The environment that makes `scheduler` work on it."""
        return {"DATABASE_URL": self.database.url, "NIH_SCHED_TABLE": "work", "NIH_SCHED_POLL_INTERVAL": "0.1"}


def make_work(database: Database, folder: Path) -> Work:
    """A Work on this database."""
    folder.mkdir(exist_ok=True)
    (folder / "handlers.py").write_text(HANDLER)
    work = Work(database, connect(database.url), folder)
    work.sql(
        "CREATE TABLE work (id INTEGER NOT NULL PRIMARY KEY, state VARCHAR(20) NOT NULL, kind VARCHAR(20) NOT NULL)"
    )
    return work


@pytest.fixture
def work(database: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Work on each kind of database, with a real Redis."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = make_work(database, tmp_path / "app")
    yield made
    made.engine.dispose()


@pytest.fixture
def lite(sqlite_db: Database, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Work on SQLite alone, for what doesn't depend on the database."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = make_work(sqlite_db, tmp_path / "app")
    yield made
    made.engine.dispose()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    from selenium import webdriver  # noqa: PLC0415 - slow to import, and for a few tests alone

    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not binary or not driver:
        missing("CHROMIUM", "Type: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    for option in (*CHROMIUM, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(option)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(driver)))
    yield made
    made.quit()


def address(rule: str, parts: Mapping[str, str]) -> str:
    """An address that a rule of a URL map leads to."""
    return re.sub(r"<(?:\w+:)?(\w+)>", lambda part: parts[part[1]], rule)


def stock_worker(source: str, *options: str) -> list[str]:
    """The command line of RQ's own worker, with no class of ours."""
    return [sys.executable, "-m", "rq.cli", "worker", "-S", "json", "--url", os.environ["REDIS_URL"], *options, source]
