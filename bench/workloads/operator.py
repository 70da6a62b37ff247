"""What an operator waits for, beside a big table: each command beyond `scheduler --version`, and each page."""

from __future__ import annotations

import itertools
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import servers
from sqlalchemy import text

from bench import counts, ours, tables, trees
from bench.plan import NAMES, Bench, Plan, Step

WORKERS = 2
ENDED = 0.7  # of the rows; the others are ready
FAILS = 20  # one of so many does
PATIENCE = 1800.0  # seconds for rows to end
NOTED = 200.0  # seconds for a scheduler to note which ones have
MANY = 100_000  # rows, from which on that is waited for
AGO = 3  # hours since they ended
INSTANTS = ("claimed_at", "sent_at", "started_at", "finished_at")
REPEATS = 5  # of a page in each round: it takes a hundredth of a command
NOTHING = "no row has this"
TOKEN = "measured"


@dataclass
class Site:
    """A database with its big table."""

    database: servers.Database
    env: Mapping[str, str]
    page: str  # the dashboard's address
    keys: dict[str, Iterator[int]] = field(default_factory=dict)  # by state: of rows that nothing has touched yet

    def key(self, state: str) -> str:
        """The next row's of this state."""
        return str(next(self.keys[state]))


@contextmanager
def operator(bench: Bench) -> Iterator[Plan]:
    """Commands and pages, on each database."""
    with ExitStack() as stack:
        kinds = [kind for kind in bench.options.databases if bench.rig.has(kind)]
        databases = [stack.enter_context(bench.rig.database(kind)) for kind in kinds]
        _fill(bench, databases)
        sites = [stack.enter_context(_site(bench, database)) for database in databases]
        steps = [Step(NAMES[site.database.name], partial(_answers, bench, site)) for site in sites]
        about = (
            f"A table of {bench.options.table_rows:,} rows with the recommended index, {ENDED:.0%} of them run by the "
            f"scheduler, of those one in {FAILS} failed; that was {AGO} hours ago. Now {WORKERS} workers run rows that "
            "don't end. Commands: seconds beyond those of `scheduler --version` in the same round. Pages: seconds "
            f"until an answer was read, the median of {REPEATS} in turn. What reads many rows stops after 2 s."
        )
        yield Plan(steps, steps[0].system, about)


def _fill(bench: Bench, databases: Sequence[servers.Database]) -> None:
    """Have rows run, by a scheduler that stays until it has noted which ones have ended; then let hours go by."""
    ended = int(bench.options.table_rows * ENDED)
    line = ours.command(bench, *ours.run_line("fail_some", WORKERS, "--tries", "0"))
    with ExitStack() as stack:
        for database in databases:
            tables.make(database)
            ours.init(bench, database)
            tables.fill(database, ended)
            tables.analyze(database)
            env = ours.env(bench, database, counts.Counts())
            tree = stack.enter_context(trees.running([line], env, ours.INSIDE))
            over = tree.wait(PATIENCE, until=partial(_is_over, database, ended), every=1.0)
            bench.check(over, f"operator on {database.name}: rows don't end\n{tree.output[-2000:]}")
        for database in databases if ended >= MANY else ():
            tree.wait(NOTED, until=partial(_is_noted, database), every=1.0)
    for database in databases:
        _age(database)
        tables.fill(database, bench.options.table_rows - ended)
        for table in ("jobs", "nih_sched_attempts"):
            tables.analyze(database, table)
        bench.rig.settle(database)


def _is_over(database: servers.Database, rows: int) -> bool:
    states = tables.by_state(database)
    return states.get("Done", 0) + states.get("Failed", 0) == rows


def _is_noted(database: servers.Database) -> bool:
    query = (
        "SELECT (SELECT max(value) FROM nih_sched_counts WHERE name = 'all_ended_below')"
        " > (SELECT max(id) FROM nih_sched_attempts)"
    )
    with tables.engine_of(database) as engine, engine.connect() as connection:
        return bool(connection.execute(text(query)).scalar())


@contextmanager
def _site(bench: Bench, database: servers.Database) -> Iterator[Site]:
    port = servers.free_port()
    page = f"http://127.0.0.1:{port}"
    lasting = [
        ours.command(bench, *ours.run_line("stay", WORKERS, "--grace", "0")),
        ours.command(bench, "dashboard", "--dashboard-port", str(port)),
    ]
    env = {**ours.env(bench, database, counts.Counts()), "NIH_SCHED_DASHBOARD_TOKEN": TOKEN}
    with trees.running(lasting, env, ours.INSIDE) as tree:

        def up() -> bool:
            return tables.by_state(database).get("Started", 0) == WORKERS and _answer(page + "/healthz") > 0

        bench.check(tree.wait(60.0, until=up, every=0.5), f"operator on {database.name}: {tree.output[-2000:]}")
        yield Site(database, env, page, _keys(database))


def _keys(database: servers.Database) -> dict[str, Iterator[int]]:
    found: dict[str, Iterator[int]] = {}
    with tables.engine_of(database) as engine, engine.connect() as connection:
        for state in ("Done", "Failed", "Started", "Pending"):
            query = text(f"SELECT id FROM jobs WHERE state = '{state}' ORDER BY id DESC LIMIT 1000")
            found[state] = itertools.cycle(list(connection.execute(query).scalars()))
    return found


def _age(database: servers.Database) -> None:
    """Have all that ended have done so some hours ago; the notes by the minute too."""
    way = {
        "postgresql": f"{{}} - interval '{AGO} hours'",
        "mariadb": f"{{}} - INTERVAL {AGO} HOUR",
        "sqlite": f"strftime('%Y-%m-%d %H:%M:%f000', {{}}, '-{AGO} hours')",
    }[database.name]
    changes = ", ".join(f"{name} = {way.format(name)}" for name in INSTANTS)
    with tables.engine_of(database) as engine, engine.begin() as connection:
        connection.execute(text(f"UPDATE nih_sched_attempts SET {changes}"))
        connection.execute(text(f"UPDATE nih_sched_counts SET minute = minute - {AGO * 60} WHERE minute > 0"))


def _commands(site: Site) -> Iterator[tuple[str, Sequence[str]]]:
    """Each command's name in the table, and its words."""
    failed = site.key("Failed")
    yield "status", ["status"]
    yield "status --json", ["status", "--json"]
    yield "why, of a ready row", ["why", site.key("Pending")]
    yield "why, of a done row", ["why", site.key("Done")]
    yield "why, of a running row", ["why", site.key("Started")]
    yield "show, of a failed row", ["show", failed]
    yield "list", ["list"]
    yield "list --newest", ["list", "--newest"]
    for state in ("failed", "started", "queued", "retrying"):
        yield f"list --state {state}", ["list", "--state", state]
    yield "list --since 1h --newest, of nothing", ["list", "--since", "1h", "--newest"]
    yield "list --since 1d --newest", ["list", "--since", "1d", "--newest"]
    yield "list --text, of nothing", ["list", "--text", NOTHING]
    yield "list --where on the last error, of nothing", ["list", "--where", f"error LIKE '%{NOTHING}%'"]
    yield "pause", ["pause", "--reason", "measured"]
    yield "resume", ["resume"]
    yield "requeue", ["requeue", failed, "--yes"]
    yield "cancel", ["cancel", site.key("Pending"), "--yes"]
    yield "doctor", ["doctor"]
    yield "prune-history, of nothing", ["prune-history", "--older-than", "30d"]
    yield "source", ["source"]


def _pages(site: Site) -> Iterator[tuple[str, str]]:
    yield "/", "/"
    yield "/rows", "/rows"
    for state in ("failed", "started", "queued"):
        yield f"/rows?state={state}", f"/rows?state={state}"
    yield "/rows?since=15m, of nothing", "/rows?since=15m"
    yield "/rows?text=, of nothing", f"/rows?text={NOTHING.replace(' ', '+')}"
    yield "/failures", "/failures"
    yield "/rows/KEY, of a failed row", f"/rows/{site.key('Failed')}"
    yield "/rows/KEY, of a ready row", f"/rows/{site.key('Pending')}"
    yield "/metrics", "/metrics"
    yield "/rq", "/rq"


def _answers(bench: Bench, site: Site) -> Mapping[str, float]:
    found: dict[str, float] = {}
    base = statistics.median(_run(bench, site, ["--version"]) for _ in range(3))
    found["s, scheduler --version, in all"] = base
    found["s, scheduler --help, in all"] = _run(bench, site, ["--help"])
    for name, words in _commands(site):
        found[f"s, {name}"] = _run(bench, site, words) - base
    for name, path in _pages(site):
        found[f"s, page {name}"] = statistics.median(_answer(site.page + path) for _ in range(REPEATS))
    return found


def _run(bench: Bench, site: Site, words: Sequence[str]) -> float:
    good = (0, 1) if words[0] == "doctor" else (0,)  # it may find something
    return _timed(lambda: trees.run(ours.command(bench, *words), site.env, ours.INSIDE, good=good))


def _answer(address: str) -> float:
    """Seconds until it was read; 0 if there is none."""

    def read() -> int:
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return len(answer.read())

    try:
        return _timed(read)
    except OSError:
        return 0.0


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
