"""Clocks that disagree, jump, or change to summer time: no lease is misjudged, no retry is lost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import servers
import sqlalchemy
from conftest import Work, make_work
from servers import Spawned, eventually, run, scheduler, spawn_scheduler

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

HANDLERS = """
import os, time
from handlers import note

def job(id, kind, attempt):
    note("begin", id, os.environ.get("SHIFT", "0"), time.monotonic())
    if kind == "fails" and attempt == 1:
        raise RuntimeError("once")
    if kind == "long":
        time.sleep(5.5)
    while kind.startswith("gate") and not os.path.exists(kind):
        time.sleep(0.02)
    note("end", id)
"""

# A machine whose clock is wrong by SHIFT seconds, or by what stands in a file; and which isn't this one.
MACHINE = """
import datetime, os, sys, time
import rq.scheduler
from nih_sched import host

SHIFT, PATH = float(os.environ["SHIFT"]), os.path.abspath("shift")
right, real, here = time.time, datetime.datetime, host.host_id()

def shift():
    try:
        with open(PATH) as file:
            return float(file.read() or SHIFT)
    except FileNotFoundError:
        return SHIFT

time.time = lambda: right() + shift()
host.host_id = lambda: f"another {SHIFT} {here}"

class Kind(type):
    def __instancecheck__(cls, thing):
        return isinstance(thing, real)

class Wrong(real, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=shift())

    @classmethod
    def utcnow(cls):
        return real.utcnow() + datetime.timedelta(seconds=shift())

for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("rq", "nih_sched") and getattr(module, "datetime", None) is real:
        module.datetime = Wrong
datetime.datetime = Wrong
"""

# The database's clock is wrong by what stands in a table of ours, and may change at any moment.
JUMPS = """
import os
from sqlalchemy.ext.compiler import compiles
from nih_sched.dialects.times import SQLITE_FORMAT, After, Now, _percent

OFFSET = "(SELECT offset_s FROM test_clock)"
if "SHIFT" in os.environ:
    import machine

@compiles(Now, "postgresql")
def now_postgresql(element, compiler, **kw):
    return f"(clock_timestamp() + {OFFSET} * interval '1 second')"

@compiles(After, "postgresql")
def after_postgresql(element, compiler, **kw):
    seconds = compiler.process(element.seconds, **kw)
    return f"(clock_timestamp() + ({OFFSET} + {seconds}) * interval '1 second')"

@compiles(Now, "mysql", "mariadb")
def now_mysql(element, compiler, **kw):
    return f"(utc_timestamp(6) + interval cast({OFFSET} as decimal(20,6)) second)"

@compiles(After, "mysql", "mariadb")
def after_mysql(element, compiler, **kw):
    seconds = compiler.process(element.seconds, **kw)
    return f"(utc_timestamp(6) + interval cast({OFFSET} + {seconds} as decimal(20,6)) second)"

@compiles(Now, "sqlite")
def now_sqlite(element, compiler, **kw):
    return f"strftime({SQLITE_FORMAT.replace('%', _percent(compiler))}, 'now', {OFFSET} || ' seconds')"

@compiles(After, "sqlite")
def after_sqlite(element, compiler, **kw):
    seconds = compiler.process(element.seconds, **kw)
    form = SQLITE_FORMAT.replace("%", _percent(compiler))
    return f"strftime({form}, 'now', ({OFFSET} + {seconds} + 0.001) || ' seconds')"
"""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir(exist_ok=True)
    for name, text in {"clocked": HANDLERS, "machine": MACHINE, "jumps": JUMPS}.items():
        (tmp_path / "app" / f"{name}.py").write_text(text)


def insert(work: Work, *kinds: str, first: int = 1) -> None:
    """Rows first, first + 1, … of these kinds, in one transaction."""
    with work.engine.begin() as connection:
        for number, kind in enumerate(kinds, first):
            values = {"i": number, "k": kind}
            connection.execute(sqlalchemy.text("INSERT INTO work (id, state, kind) VALUES (:i, 'Pending', :k)"), values)


def noted(work: Work, word: str) -> dict[int, int]:
    """How often each row began, or ended."""
    found: dict[int, int] = {}
    for line in work.ran().elements():
        if line.startswith(word):
            row = int(line.split()[1])
            found[row] = found.get(row, 0) + 1
    return found


def instants(work: Work, row: int) -> list[float]:
    """When a row began, by the boot's clock."""
    lines = (line.split() for line in work.ran())
    return sorted(float(words[3]) for words in lines if words[:2] == ["begin", str(row)])


def rows(work: Work) -> dict[int, str]:
    """The table."""
    return dict(map(tuple, work.sql("SELECT id, state FROM work")))


def interrupted(work: Work) -> int:
    """How many attempts were taken for dead, or stopped."""
    return int(work.sql("SELECT count(*) FROM nih_sched_attempts WHERE outcome = 'interrupted'")[0][0])


def waits(work: Work, row: int) -> bool:
    """Whether a row waits for its second attempt."""
    return bool(noted(work, "begin").get(row)) and bool(work.attempts(row)[-1].attempt == 2)


@contextmanager
def tree(work: Work, *line: str, shift: float | None = None, preload: str, **env: str) -> Iterator[Spawned]:
    """A scheduler that serves the rows meanwhile."""
    changed = {**work.env, **env} | ({"SHIFT": str(shift)} if shift is not None else {})
    whole = ("--job", "clocked:job", "--preload", preload, "--grace", "1", *line)
    with spawn_scheduler(*whole, env=changed, cwd=work.folder, grace=15) as process:
        yield process


def end(process: Spawned) -> None:
    """It stops as it should, and it had no trouble."""
    process.terminate()
    assert process.wait(30) == 0
    assert "Traceback" not in process.output
    assert "ended unexpectedly" not in process.output


def make_clock(work: Work) -> None:
    """The table with the error of the database's clock."""
    work.sql("CREATE TABLE test_clock (offset_s FLOAT NOT NULL)")
    work.sql("INSERT INTO test_clock VALUES (0)")


def jump(work: Work, offset: float, *, machine: bool = False) -> None:
    """Now the database's clock, and the machine's if it listens, is wrong by so many seconds."""
    if machine:
        (work.folder / "shift").write_text(str(offset))
    work.sql("UPDATE test_clock SET offset_s = :o", o=offset)


# Machines


@pytest.mark.postgresql
def test_machines_ten_minutes_apart(postgresql_db: Any, redis_url: str, tmp_path: Path) -> None:
    work = make_work(postgresql_db, tmp_path / "app")
    quick = range(5, 25)
    insert(work, "long", "fails", "long", "fails", *["plain"] * len(quick))
    line = ("--max-concurrent-jobs", "2", "--lease", "4", "--delay", "1", "--tries", "1")
    with (
        tree(work, *line, shift=300, preload="machine", REDIS_URL=redis_url) as fast,
        tree(work, *line, shift=-300, preload="machine", REDIS_URL=redis_url) as slow,
    ):
        eventually(lambda: set(rows(work).values()) == {"Done"}, timeout=60)
        end(fast)
        end(slow)
        for process in (fast, slow):
            assert "taken for dead" not in process.output
            assert "rescued" not in process.output
    assert noted(work, "end") == dict.fromkeys(range(1, 25), 1)
    assert noted(work, "begin") == noted(work, "end") | {2: 2, 4: 2}
    assert {line.split()[2] for line in work.ran() if line.startswith("begin")} == {"300", "-300"}
    assert min(instants(work, 2)[1] - instants(work, 2)[0], instants(work, 4)[1] - instants(work, 4)[0]) >= 0.99
    assert interrupted(work) == 0
    work.engine.dispose()


@pytest.mark.postgresql
def test_a_machine_lost_while_the_databases_clock_is_set_back(
    postgresql_db: Any, redis_url: str, tmp_path: Path
) -> None:
    work = make_work(postgresql_db, tmp_path / "app")
    make_clock(work)
    insert(work, "gate")
    line = ("--max-concurrent-jobs", "1", "--lease", "4")
    with tree(work, *line, shift=300, preload="jumps", REDIS_URL=redis_url) as lost:
        eventually(lambda: noted(work, "begin") == {1: 1})
        with tree(work, *line, shift=-300, preload="jumps", REDIS_URL=redis_url) as other:
            eventually(lambda: " started, pid " in other.output)  # an idle worker has no lease yet
            lost.kill_all()
            jump(work, -3600)
            (work.folder / "gate").touch()
            eventually(lambda: rows(work) == {1: "Done"}, timeout=40)
            end(other)
    assert noted(work, "begin") == {1: 2}
    assert noted(work, "end") == {1: 1}
    assert interrupted(work) == 1
    work.engine.dispose()


def test_a_machines_clock_set_right_by_a_day_under_a_running_row(lite: Work) -> None:
    # As on a board without a clock of its own, once it reaches the network. This worker looks each second.
    lite.insert(1, kind="gate")
    env = {**lite.env, "SHIFT": "0", "NIH_SCHED_PRELOAD": "machine", "NIH_SCHED_JOB": "clocked:job"}
    with (
        spawn_scheduler("producer", env=env, cwd=lite.folder) as producer,
        spawn_scheduler("worker", "--lease", "6", "--grace", "1", env=env, cwd=lite.folder) as worker,
    ):
        eventually(lambda: noted(lite, "begin") == {1: 1})
        (lite.folder / "shift").write_text("86400")
        time.sleep(4)
        assert rows(lite) == {1: "Started"}, worker.output
        (lite.folder / "gate").touch()
        eventually(lambda: rows(lite) == {1: "Done"})
        lite.insert(2, kind="fails")
        eventually(lambda: rows(lite)[2] == "Done")
        end(worker)
        end(producer)
    assert noted(lite, "begin") == {1: 1, 2: 2}
    assert interrupted(lite) == 0


# The database


def test_all_clocks_jump_by_hours(work: Work) -> None:
    make_clock(work)
    insert(work, "gate", "fails")
    line = ("--max-concurrent-jobs", "2", "--lease", "4", "--delay", "2", "--tries", "1")
    with tree(work, *line, shift=0, preload="jumps") as process:
        eventually(lambda: noted(work, "begin").get(1) and waits(work, 2))
        jump(work, 3600, machine=True)
        eventually(lambda: rows(work)[2] == "Done")
        insert(work, "fails", first=3)
        eventually(lambda: waits(work, 3))
        jump(work, -3600, machine=True)  # row 3 is due in two hours now
        back = time.monotonic()
        insert(work, "plain", first=4)
        eventually(lambda: rows(work)[4] == "Done")
        time.sleep(max(0.0, 5.0 - (time.monotonic() - back)))  # more than a lease
        assert rows(work) == {1: "Started", 2: "Done", 3: "Queued", 4: "Done"}
        jump(work, 3600 + 5, machine=True)  # two hours later
        eventually(lambda: rows(work)[3] == "Done")
        jump(work, 0, machine=True)
        insert(work, "fails", first=5)
        eventually(lambda: rows(work)[5] == "Done")
        (work.folder / "gate").touch()
        eventually(lambda: set(rows(work).values()) == {"Done"})
        end(process)
        assert "taken for dead" not in process.output
    assert noted(work, "begin") == {1: 1, 2: 2, 3: 2, 4: 1, 5: 2}
    assert noted(work, "end") == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert interrupted(work) == 0
    assert work.sql("SELECT count(*) FROM nih_sched_attempts WHERE open_key IS NOT NULL") == [(0,)]


# Summer time

AUTUMN = datetime(2026, 10, 25, 1, tzinfo=UTC)  # Berlin: 3:00 becomes 2:00
SPRING = datetime(2027, 3, 28, 1, tzinfo=UTC)  # Berlin: 2:00 becomes 3:00

UNTIL_DUE = {
    "postgresql": "extract(epoch FROM due_at - clock_timestamp())",
    "mariadb": "timestampdiff(microsecond, utc_timestamp(6), due_at) / 1000000",
    "sqlite": "(julianday(due_at) - julianday('now')) * 86400",
}


@contextmanager
def in_berlin(work: Work, request: pytest.FixtureRequest) -> Iterator[None]:
    """The server's sessions think in Berlin's time."""
    kind = work.database.name
    if kind == "sqlite":
        yield
        return
    server: servers.DatabaseServer = request.getfixturevalue(f"{kind}_server")
    if kind == "postgresql":
        server.sql(f"ALTER DATABASE {work.engine.url.database} SET timezone = 'Europe/Berlin'")
        work.engine.dispose()
        assert work.sql("SHOW timezone") == [("Europe/Berlin",)]
        yield
        return
    named = server.sql("SELECT count(*) FROM mysql.time_zone_name WHERE Name = 'Europe/Berlin'")[0][0]
    server.sql(f"SET GLOBAL time_zone = '{'Europe/Berlin' if named else '+02:00'}'")
    work.engine.dispose()
    try:
        yield
    finally:
        server.sql("SET GLOBAL time_zone = 'SYSTEM'")


def changes(**known: list[datetime]) -> Any:
    """Run a test at these changes, by database."""
    marks = {"postgresql": [pytest.mark.postgresql], "mariadb": [pytest.mark.mariadb]}
    return pytest.mark.parametrize(
        ("database", "change"),
        [
            pytest.param(kind, one, marks=marks.get(kind, []), id=f"{kind}-{one:%B}")
            for kind, many in known.items()
            for one in many
        ],
        indirect=["database"],
    )


@changes(sqlite=[AUTUMN], postgresql=[AUTUMN, SPRING], mariadb=[AUTUMN, SPRING])
def test_the_change_of_summer_time(work: Work, change: datetime, request: pytest.FixtureRequest) -> None:
    make_clock(work)
    line = ("--max-concurrent-jobs", "2", "--lease", "4", "--delay", "2.5", "--tries", "1")
    with in_berlin(work, request), tree(work, *line, preload="jumps", TZ="Europe/Berlin") as process:
        eventually(lambda: process.output.count("started, pid") == 2)
        offset = (change - datetime.now(UTC)).total_seconds() - 1.5
        jump(work, offset)
        insert(work, "gate", "fails")
        eventually(lambda: noted(work, "begin").get(1) and waits(work, 2))
        query = f"SELECT {UNTIL_DUE[work.database.name]} FROM nih_sched_attempts WHERE due_at IS NOT NULL"
        for (seconds,) in work.sql(query):
            assert -2.0 < float(seconds) - offset <= 6.0
        eventually(lambda: rows(work)[2] == "Done")
        eventually(lambda: (datetime.now(UTC) - change).total_seconds() + offset > 1.5)  # the lease was renewed since
        assert rows(work)[1] == "Started"
        (work.folder / "gate").touch()
        eventually(lambda: set(rows(work).values()) == {"Done"})
        end(process)
        work.engine.dispose()
    first, second = instants(work, 2)
    assert second - first >= 2.4
    assert noted(work, "begin") == {1: 1, 2: 2}
    assert interrupted(work) == 0


ASK = """
import json, os
import jumps
from nih_sched import settings
from nih_sched.store import Looks, Retries, open_desk

desk = open_desk(settings.load({}, os.environ))
print(json.dumps([[due.overdue for due in Retries(desk).due(10)], Looks(desk).around(rows=False).due]))
"""


@changes(postgresql=[AUTUMN, SPRING], mariadb=[AUTUMN])
def test_waits_are_counted_right_across_the_change(
    work: Work, change: datetime, request: pytest.FixtureRequest
) -> None:
    (work.folder / "ask.py").write_text(ASK)
    make_clock(work)
    assert scheduler("init", env=work.env, cwd=work.folder).returncode == 0
    source = scheduler("source", env=work.env, cwd=work.folder).stdout.strip()

    def ask(due: float, now: float) -> Any:
        work.sql("DELETE FROM nih_sched_attempts")
        zone = "+00:00" if work.database.name == "postgresql" else ""
        at = f"{datetime.fromtimestamp(change.timestamp() + due, UTC):%Y-%m-%d %H:%M:%S}.000000{zone}"
        work.sql(
            "INSERT INTO nih_sched_attempts"
            " (source, row_key, open_key, attempt, failures, tries, rq_id, claimed_at, due_at)"
            f" VALUES (:s, '[1]', 'x', 2, 1, 3, 'x', '{at}', '{at}')",
            s=source,
        )
        jump(work, (change - datetime.now(UTC)).total_seconds() + now)
        done = run([sys.executable, "ask.py"], env={**work.env, "TZ": "Europe/Berlin"}, cwd=work.folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with in_berlin(work, request):
        ((overdue,), waited) = ask(due=-10, now=10)
        assert 19 < overdue < 60
        assert waited == 0
        (none_due, waiting) = ask(due=600, now=-10)
        assert none_due == []
        assert 500 < waiting < 611
        work.engine.dispose()
