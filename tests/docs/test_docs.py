"""The docs say what the code does: every name in it is in them, and every command in them works."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import servers
from sqlalchemy import create_engine, text

from nih_sched import broker, model, settings, telemetry
from nih_sched.cli import COMMANDS, cli
from nih_sched.cli.options import default_text
from nih_sched.store import Attempts, Claims
from nih_sched.store.desk import desk_on
from nih_sched.table import DEFAULT_WORDS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
OPTIONS = ROOT / "docs" / "options.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
USERS_LINE = (
    "scheduler --status-key state --ready-val Pending --max-concurrent-jobs 5 --tries 3 --delay 2.0 --backoff 2.0"
)
NOT_YET = set[str]()  # commands that the docs only promise
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Reading the pages


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block; indented ones, in a list, count too."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, re.sub(f"(?m)^{indent}", "", body)) for indent, language, body in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"(?ms)^( *)```.*?^\1```", "", page.read_text("utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each `scheduler …` in the page's blocks and `code`."""
    lines = [line for _, body in blocks(page) for line in body.replace("\\\n", " ").splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(page))]
    for line in lines:
        if listed := re.search(r'\["scheduler".*?\]', line):
            yield json.loads(listed[0])[1:]
            continue
        for inner in re.findall(r"\$\((scheduler\b[^)]*)\)", line):
            yield shlex.split(inner)[1:]
        rest = re.sub(r"\$\([^)]*\)", "substituted", line)
        while start := re.search(r"(?:^|(?<=[\s/=]))scheduler(?=\s|$)", rest):
            lexer = shlex.shlex(rest[start.end() :], posix=True, punctuation_chars="();&|<>")
            lexer.whitespace_split = True
            words = []
            while (word := lexer.get_token()) is not None and not set(word) <= set("();&|<>"):
                words.append(word)
            yield words
            rest = rest[start.end() :].partition("&&")[2]


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Names in the code -> in the docs


def test_options_page_is_up_to_date() -> None:
    checked = servers.run([sys.executable, str(ROOT / "scripts" / "docs-options"), "--check"])
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", sorted(settings.fields()))
def test_every_setting_is_in_the_options_page(name: str) -> None:
    field = settings.fields()[name]
    if field.metadata["group"] == "hidden":
        assert all(env in (ROOT / "docs" / "deployment.md").read_text("utf-8") for env in field.metadata["env"])
        return
    words = settings.option_name(name) if name != "handlers" else "[handlers]"
    (row,) = [
        line
        for line in OPTIONS.read_text("utf-8").partition("\n### scheduler ")[0].splitlines()
        if re.search(rf"^\|.*`{re.escape(words)}[ `].*\|", line)
    ]
    for env in settings.env_names(name) if name != "handlers" else ():
        assert f"`{env}`" in row
    if name not in ("handlers", "config"):
        assert f"`{name.replace('_', '-')}`" in row
    assert f" {default_text(name)} " in row
    assert field.metadata["help"].split("{")[0].replace("|", "\\|") in row


def test_every_command_and_its_own_options_are_in_the_options_page() -> None:
    page = OPTIONS.read_text("utf-8")
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command
        (section,) = re.findall(rf"(?ms)^### scheduler {name}$(.*?)(?=^##)", page)
        for parameter in command.params:
            if parameter.name not in settings.fields() and isinstance(parameter, click.Option):
                assert f"`{parameter.opts[0]}" in section
                assert str(parameter.help) in section
        assert f"`{name}`" in README.read_text("utf-8")


def test_every_event_outcome_and_state_is_in_the_docs() -> None:
    options, states = OPTIONS.read_text("utf-8"), (ROOT / "docs" / "states.md").read_text("utf-8")
    for event in telemetry.SENTENCES:
        assert f"| `{event}` |" in options
    all_docs = "".join(page.read_text("utf-8") for page in PAGES)
    for outcome in model.Outcome:
        assert f"`{outcome.value}`" in all_docs
    for state in model.State:
        assert re.search(rf"\b{state.value}\b", states)
        assert f"| {state.value} |" in README.read_text("utf-8")
    for word in DEFAULT_WORDS.values():
        assert f"`{word}`" in README.read_text("utf-8")


# Commands in the docs -> in the code


@EACH_PAGE
def test_every_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page.parent)  # where a config file that it names stands
    assert not NOT_YET & set(COMMANDS)
    for words in commands(page):
        if {"OPTIONS", "[OPTIONS]"} & set(words) or (len(words) == 1 and words[0] in NOT_YET):
            continue
        given = parse(words)
        settings.load({name: value for name, value in given.items() if name in settings.fields()}, {})


def parse(words: list[str]) -> dict[str, Any]:
    """What click makes of these words; nothing is run."""
    try:
        group = cli.make_context("scheduler", list(words))
        name, command, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
        assert name is not None
        assert command is not None
        return command.make_context(name, rest, parent=group).params
    except click.exceptions.Exit:  # --help, --version
        return {}
    except click.UsageError as error:
        pytest.fail(f"scheduler {shlex.join(words)}: {error.format_message()}")


def test_commands_are_found_in_all_their_forms(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`scheduler init --sample` and\n"
        "```sh\n"
        "A=1 scheduler --where 'a | b' && scheduler status | head  # scheduler no\n"
        'rq worker "$(scheduler source)"\n'
        "```\n"
        "  ```\n"
        "  web: scheduler \\\n"
        "      dashboard\n"
        "  ```\n"
        "```ini\n"
        "ExecStart=/x/scheduler --quiet\n"
        '    command: ["scheduler", "worker"]\n'
        "```\n"
    )
    assert list(commands(page)) == [
        ["--where", "a | b"],
        ["status"],
        ["source"],
        ["dashboard"],
        ["--quiet"],
        ["worker"],
        ["init", "--sample"],
    ]


@EACH_PAGE
def test_every_block_is_well_formed(page: Path, tmp_path: Path) -> None:
    for language, body in blocks(page):
        if language == "python":
            compile(body, str(page), "exec")
        elif language == "toml":
            tomllib.loads(body)
            (tmp_path / settings.CONFIG_FILE).write_text(body)
            settings.load({}, {}, folder=tmp_path)
        elif language == "sh":
            checked = subprocess.run(["bash", "-n"], input=body, text=True, capture_output=True, check=False)
            assert checked.returncode == 0, checked.stderr


def readme_block(start: str) -> list[str]:
    """The lines of README's block that begins so, without comments."""
    (body,) = [body for _, body in blocks(README) if body.startswith(start)]
    return [line.partition("  #")[0].strip() for line in body.splitlines()]


@pytest.fixture
def with_scheduler_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("with_scheduler_on_path")
def test_readmes_five_lines_run(home: Path) -> None:
    """All but the first: installing needs the network, and has been done by whoever runs this."""
    install, init, burst, dry_run, max_rows = readme_block("pip install .")
    assert install == "pip install ."
    assert list(home.iterdir()) == []

    def sh(line: str, code: int) -> str:
        done = servers.run(["sh", "-c", line])
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "20 sample rows" in sh(init, 0)
    assert "19 done, 1 failed" in sh(burst, 1)

    with sqlite3.connect(home / "jobs.db") as database:
        database.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, state TEXT DEFAULT 'Pending', address TEXT)")
        database.executemany("INSERT INTO orders (address) VALUES (?)", [("here",)] * 15)
    (home / "shop.py").write_text("def ship(id, address):\n    return f'{id}: {address}'\n")

    told = sh(dry_run, 0)
    assert "ready rows: 15" in told
    assert "Nothing was claimed." in told
    sh(max_rows, 0)
    with sqlite3.connect(home / "jobs.db") as database:
        counts = dict(database.execute("SELECT state, count(*) FROM orders GROUP BY state"))
    assert counts == {"Done": 10, "Pending": 5}


@pytest.mark.usefixtures("with_scheduler_on_path")
def test_the_users_line_runs_and_stops(home: Path) -> None:
    assert USERS_LINE in readme_block("scheduler --status-key")
    assert servers.scheduler("init", "--sample").returncode == 0
    with servers.spawn(shlex.split(USERS_LINE), grace=30) as process:
        servers.eventually(lambda: final(home / "jobs.db") == 20, timeout=40)
        process.terminate()
        assert process.wait(30) == 0
        assert "stopped" in process.output


def final(path: Path) -> int:
    with sqlite3.connect(path) as database:
        return int(database.execute("SELECT count(*) FROM jobs WHERE state IN ('Done', 'Failed')").fetchone()[0])


@pytest.mark.usefixtures("with_scheduler_on_path")
def test_procfile_runs_under_honcho_as_readme_shows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("honcho")
    install, *setup, start = readme_block("pip install honcho")
    assert install == "pip install honcho"
    for line in setup:
        if exported := re.fullmatch(r"export (\w+)='?([^']*)'?", line):
            monkeypatch.setenv(exported[1], exported[2])
        else:
            assert servers.run(shlex.split(line)).returncode == 0
    (home / "Procfile").write_bytes((ROOT / "Procfile").read_bytes())
    port = next(port for port in range(21000, 32000, 7) if servers._is_free(port + 200))

    with servers.spawn([*shlex.split(start), "-p", str(port)], cwd=home, grace=20) as process:
        servers.eventually(lambda: final(home / "jobs.db") == 20, timeout=60)
        page = f"http://127.0.0.1:{port + 200}/rq/"
        assert servers.eventually(lambda: answer(page, "")) == 401
        assert answer(page, os.environ["NIH_SCHED_DASHBOARD_PASSWORD"]) == 200
        process.terminate()
        process.wait(20)
        servers.eventually(lambda: process.processes() == [])
    with sqlite3.connect(home / "jobs.db") as database:
        assert dict(database.execute("SELECT state, count(*) FROM jobs GROUP BY state")) == {"Done": 19, "Failed": 1}


def answer(url: str, password: str) -> int:
    """The HTTP status, 0 while nobody answers."""
    login = b64encode(f"anyone:{password}".encode()).decode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Basic {login}"})) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.usefixtures("with_scheduler_on_path")
def test_rows_without_a_claim_are_set_right_as_states_shows(home: Path) -> None:
    fix, look, repair = (body for _, body in blocks(ROOT / "docs" / "states.md") if body in section("Rows without a"))
    url = f"sqlite:///{home / 'jobs.db'}"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (id INTEGER PRIMARY KEY, state TEXT)"))
        connection.execute(text("INSERT INTO jobs VALUES (41, 'Started'), (42, 'Pending')"))
    desk = desk_on(engine, settings.Settings(database_url=url, max_concurrent_jobs=1))
    claims = Claims(desk, "a producer", tries=3)
    (first,) = claims.claim(10, lambda count: [broker.new_rq_id() for _ in range(count)])
    dead = Attempts(desk, "its run", "a worker")  # with no lease
    (row,) = dead.start([first.id], [])

    def shown() -> tuple[dict[int, str], list[int]]:
        with engine.connect() as connection:
            states = {one.id: one.state for one in connection.execute(text("SELECT id, state FROM jobs"))}
            return states, [record.id for record in connection.execute(text(look.rstrip(";\n")))]

    doctor = fix.replace("--fix", "").split()
    found = servers.run(doctor)
    assert (found.returncode, "claim behind them: 41." in found.stdout) == (1, True)
    assert servers.run(fix.split()).returncode == 0
    assert shown() == ({41: "Pending", 42: "Started"}, [first.id])

    with engine.begin() as connection:
        assert connection.execute(text(repair.replace("17", str(first.id)).rstrip(";\n"))).rowcount == 1
    assert servers.run(fix.split()).returncode == 0
    assert shown() == ({41: "Pending", 42: "Pending"}, [])
    assert servers.run(doctor).returncode == 0

    newer = claims.claim(10, lambda count: [broker.new_rq_id() for _ in range(count)])
    assert all(claim.id > first.id for claim in newer)
    dead.finish([model.Ended(row.claim, model.Outcome.DONE)])  # it was alive after all
    assert shown() == ({41: "Queued", 42: "Queued"}, [])
    engine.dispose()


def section(heading: str) -> str:
    """The section of states.md whose heading begins so."""
    (found,) = re.findall(rf"(?ms)^## {heading}.*?(?=^## |\Z)", (ROOT / "docs" / "states.md").read_text("utf-8"))
    return str(found)


# The pages themselves


def test_readme_is_short_and_begins_with_what_matters() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 200
    screen = "\n".join(lines[:50])
    for words in (
        "INSERT",
        "scripts/run",
        "scripts/test",
        "--sample",
        "--max-rows 10",
        "at least once",
        "Don't use it",
    ):
        assert words in screen


@EACH_PAGE
def test_relative_links_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in slugs(target), f"{page.name} links to {link}"


@EACH_PAGE
def test_pages_are_finished_and_keep_to_our_words(page: Path) -> None:
    content = page.read_text("utf-8")
    assert not re.findall(r"TODO|FIXME|XXX|TBD", content)
    assert not re.findall(r"(?i)\b(?:tasks?|managers?|utils)\b", prose(page))
    for number, line in enumerate(content.splitlines(), 1):
        assert line == line.rstrip(), f"line {number} ends with blanks"
        assert len(line) <= 120 or line.startswith("|") or page == OPTIONS, f"line {number} is too long"


def test_decisions_are_numbered_and_say_why() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    for page in DECISIONS:
        content = page.read_text("utf-8")
        assert content.startswith(f"# {page.name[:4]} ")
        assert re.findall(r"(?m)^## (.*)$", content) == ["Context", "Decision", "Consequences"]


def test_the_claims_cost_can_be_measured(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts" / "claim-cost"), f"sqlite:///{tmp_path}/scratch.db", "10", "1000"]
    done = servers.run(line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sqlite: ratio " in done.stdout
