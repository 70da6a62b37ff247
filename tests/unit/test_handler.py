"""From the settings to what is called for a row: refused at the start, or called with just what it asks for."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import eventually

from nih_sched.errors import BadHandler, Fail, NoHandler, RowTimeout
from nih_sched.model import Claim, Outcome, StartedRow
from nih_sched.runner.command import CommandFailed, CommandHandler
from nih_sched.runner.handler import IDS, function_handler, load, resolve
from nih_sched.runner.perform import perform
from nih_sched.settings import Settings

COLUMNS = ("id", "state", "name", "size")
ROW = {"id": 1, "state": "Started", "name": "n", "size": 3}
PYTHON = sys.executable


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Write a module into the current folder; return its name. It is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made: list[str] = []

    def write(text: str, name: str = "") -> str:
        name = name or f"handlers_{tmp_path.name.replace('-', '_')}_{len(made)}"
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        made.append(name)
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {one.split(".")[0] for one in made}:
            del sys.modules[name]


def call(function: Callable[..., Any], columns: tuple[str, ...] = COLUMNS, **row: Any) -> Any:
    handler = function_handler("f", function, columns)
    values = {**ROW, **row}
    return handler({name: values[name] for name in handler.columns}, 42, 2)


# Functions


def test_a_function_gets_just_the_columns_that_it_accepts() -> None:
    def handler(name: str, size: int) -> tuple[str, int]:
        return name, size

    found = function_handler("f", handler, COLUMNS)
    assert (found.columns, found.ids) == (("name", "size"), ())
    assert call(handler) == ("n", 3)


def test_a_function_without_parameters_gets_nothing() -> None:
    assert function_handler("f", lambda: 1, COLUMNS).columns == ()
    assert call(lambda: 1) == 1
    assert function_handler("f", lambda *args: args, COLUMNS).columns == ()
    assert call(lambda *args: args) == ()


def test_keywords_take_all_columns_each_once() -> None:
    def handler(size: int, **rest: Any) -> dict[str, Any]:
        return {"size!": size, **rest}

    assert function_handler("f", handler, COLUMNS).columns == ("size", "id", "state", "name")
    assert call(handler) == {"size!": 3, "id": 1, "state": "Started", "name": "n"}
    assert call(lambda **row: row) == ROW


def test_columns_that_are_no_identifiers_come_by_keywords_alone() -> None:
    odd = ("id", "full name", "class", "größe", 'q"uote')
    found = function_handler("f", lambda größe, **row: (größe, row), odd)  # noqa: PLC2401
    assert set(found.columns) == set(odd)
    values = dict.fromkeys(odd, 1)
    assert found(values, 1, 1) == (1, {"id": 1, "full name": 1, "class": 1, 'q"uote': 1})


def test_a_default_stands_only_where_there_is_no_such_column() -> None:
    def handler(name: str = "default", other: str = "default", *, third: int = 3) -> tuple[str, str, int]:
        return name, other, third

    assert function_handler("f", handler, COLUMNS).columns == ("name",)
    assert call(handler) == ("n", "default", 3)


def test_claim_id_and_attempt_are_given_where_they_are_asked_for() -> None:
    assert call(lambda claim_id, attempt, name: (claim_id, attempt, name)) == (42, 2, "n")
    assert call(lambda attempt: attempt) == 2
    assert call(lambda *, attempt=None: attempt) == 2
    assert call(lambda **row: row) == ROW  # not asked for by name


def test_a_column_of_that_name_hides_them() -> None:
    found = function_handler("f", lambda claim_id, attempt: (claim_id, attempt), ("claim_id", "id"))
    assert (found.columns, found.ids) == (("claim_id",), ("attempt",))
    assert found({"claim_id": "the row's"}, 42, 2) == ("the row's", 2)


def test_coroutines_are_run_to_their_end() -> None:
    async def handler(name: str, attempt: int) -> tuple[str, int]:
        await asyncio.sleep(0)
        return name, attempt

    assert call(handler) == ("n", 2)
    assert call(lambda name: handler(name, 1)) == ("n", 1)  # a plain function that returns a coroutine

    async def fails() -> None:
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        call(fails)


def test_callables_of_every_kind() -> None:
    class Service:
        def method(self, name: str) -> str:
            return f"m {name}"

        @classmethod
        def of_class(cls, name: str) -> str:
            return f"c {name}"

        @staticmethod
        def static(name: str) -> str:
            return f"s {name}"

        def __call__(self, name: str) -> str:
            return f"() {name}"

    assert call(Service().method) == "m n"
    assert call(Service.of_class) == "c n"
    assert call(Service.static) == "s n"
    assert call(Service()) == "() n"
    assert call(functools.partial(lambda greeting, name: f"{greeting} {name}", "hi")) == "hi n"

    @functools.wraps(Service.static)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return Service.static(*args, **kwargs)

    assert function_handler("f", wrapped, COLUMNS).columns == ("name",)
    assert call(wrapped) == "s n"


def test_a_needed_parameter_that_is_no_column_is_refused() -> None:
    with pytest.raises(BadHandler) as caught:
        function_handler("app:f", lambda name, colour: None, COLUMNS)
    assert str(caught.value) == (
        "Handler app:f can't be used: it needs 'colour', which is no column of the table. "
        "It has: id, state, name, size."
    )
    assert caught.value.exit_code == 2


def test_a_positional_only_parameter_is_refused() -> None:
    def handler(name: str, /) -> None: ...

    with pytest.raises(BadHandler, match="its parameter 'name' can't be given by name"):
        function_handler("f", handler, COLUMNS)


def test_a_callable_without_a_signature_is_refused() -> None:
    with pytest.raises(BadHandler, match="its parameters can't be read"):
        function_handler("f", type, COLUMNS)


# Importing


def test_a_function_is_found_in_the_current_folder(module: Callable[..., str]) -> None:
    name = module("class Mail:\n    @staticmethod\n    def send(name): return 'sent ' + name\ndef plain(): return 1\n")
    assert load(f"{name}:plain")() == 1
    assert load(f"{name}:Mail.send")("x") == "sent x"
    nested = module("def f(): return 'deep'\n", "package_of_test_handler.inner")
    assert load(f"{nested}:f")() == "deep"


@pytest.mark.parametrize("path", ["", ":", "module", "module:", ":function", "os.path.join"])
def test_a_path_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(BadHandler, match=r"expected module:function\."):
        load(path)


@pytest.mark.parametrize(
    ("text", "attribute", "reason"),
    [
        ("x = 1", "f", "has no 'f'."),
        ("x = 1", "x", "x is not callable."),
        ("x = 1", "x.y.z", "has no 'x.y.z'."),
        (
            "import no_such_module_anywhere",
            "f",
            "raised ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        ),
        ("1/0", "f", "raised ZeroDivisionError: division by zero."),
        ("def f(:", "f", "raised SyntaxError: "),
        ("raise SystemExit(0)", "f", "raised SystemExit: 0"),
        ("raise KeyboardInterrupt", "f", None),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(
    module: Callable[..., str], text: str, attribute: str, reason: str | None
) -> None:
    path = f"{module(text)}:{attribute}"
    with pytest.raises(BadHandler if reason else KeyboardInterrupt) as caught:
        load(path)
    if reason:
        assert reason in str(caught.value)
        assert path in str(caught.value)


def test_a_module_that_is_not_there_is_refused() -> None:
    for path in ("no_such_module_anywhere:f", "os.nothing:f", "..relative:f", "a b:f", "os/path:f"):
        with pytest.raises(BadHandler, match="importing"):
            load(path)


# Choosing


def settings(**chosen: Any) -> Settings:
    return Settings(**chosen)


def chosen(**given: Any) -> Any:
    return resolve(settings(**given), "jobs", COLUMNS, None)


def test_the_settings_choose_one_handler(module: Callable[..., str]) -> None:
    name = module("def f(size): return size")
    assert chosen(job=f"{name}:f").columns == ("size",)
    assert chosen(command="true {name}").columns == ("name",)
    assert resolve(settings(), "jobs", COLUMNS, f"{name}:f").columns == ("size",)
    assert resolve(settings(command="true"), "jobs", COLUMNS, f"{name}:f").columns == ()  # no stand-in then


def test_no_handler_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NoHandler, match=r"No handler is set for table jobs\. Name one with --job module:function"):
        chosen()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"job": "os:getcwd", "command": "true"}, "job and command can't be used: set only one"),
        ({"job": "os:getcwd", "handlers": {"a": "os:getcwd"}, "job_column": "name"}, "job and handlers can't"),
        ({"command": "true", "handlers": {"a": "os:getcwd"}, "job_column": "name"}, "command and handlers can't"),
        ({"job_column": "name"}, "the config file has no [handlers]."),
        ({"job_column": "name", "command": "true"}, "the config file has no [handlers]."),
        ({"handlers": {"a": "os:getcwd"}}, "name the column that picks one with --job-column."),
        ({"handlers": {"a": "os:getcwd", "b": "os:nothing"}, "job_column": "name"}, "Handler os:nothing can't be used"),
        ({"handlers": {"a": "shutil:move"}, "job_column": "name"}, "it needs 'src'"),
        ({"job": "os:nothing"}, "os has no 'nothing'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadHandler) as caught:
        chosen(**given)
    assert reason in str(caught.value)


def test_a_column_picks_the_handler(module: Callable[..., str]) -> None:
    name = module(
        "def mail(name, claim_id): return 'mail', name, claim_id\n"
        "async def count(size, attempt): return 'count', size, attempt\n"
    )
    handler = chosen(handlers={"mail": f"{name}:mail", "7": f"{name}:count"}, job_column="state")
    assert set(handler.columns) == {"state", "name", "size"}
    assert handler({**ROW, "state": "mail"}, 42, 2) == ("mail", "n", 42)
    assert handler({**ROW, "state": 7}, 42, 2) == ("count", 3, 2)  # an integer column


@pytest.mark.parametrize("kind", ["Mail", "", None, "os:system"])
def test_an_unknown_kind_fails_that_row_alone_and_for_good(module: Callable[..., str], kind: str | None) -> None:
    name = module("def mail(name): return name")
    handler = chosen(handlers={"mail": f"{name}:mail", "also": f"{name}:mail"}, job_column="state")
    row = StartedRow(Claim(1, (1,), "rq", tries=3), {**ROW, "state": kind})
    ended = perform(row, handler, 5)
    assert (ended.outcome, ended.final) == (Outcome.FAILED, True)
    assert ended.reason == f"Fail: state is '{kind}', but [handlers] has only: also, mail"


# Commands: splitting and filling in


def command(line: str) -> CommandHandler:
    return CommandHandler.parse(line, COLUMNS, IDS)


def arguments(tmp_path: Path, line: str, **row: Any) -> list[str]:
    """The arguments with which the command was really run."""
    script = tmp_path / "show.py"
    script.write_text("import sys, pathlib, json\npathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2:]))\n")
    out = tmp_path / "out"
    handler = command(f"{PYTHON} {script} {out} {line}")
    values = {**ROW, **row}
    assert handler({name: values[name] for name in handler.columns}, 42, 2) is None
    found: list[str] = json.loads(out.read_text())
    return found


NASTY = [
    "a b",
    "'; rm -rf / #",
    '"',
    "it's",
    "$(touch pwned)",
    "`touch pwned`",
    "${HOME}",
    "a\nb\r\n",
    "--help",
    "-rf",
    "",
    " ",
    "*",
    "{}",
    "{name}",
    "{0}",
    "{{size}}",
    "%s %(name)s",
    "\\",
    "\\n",
    "ü🎈",
    "|",
    "> file",
    "&",
    "~",
]


def test_a_value_is_always_exactly_one_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in NASTY:
        assert arguments(tmp_path, "{name} x{name}y", name=value) == [value, f"x{value}y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "show.py"]


def test_the_line_is_split_once_as_a_shell_would(tmp_path: Path) -> None:
    assert arguments(tmp_path, "'a {name} b' --out={size}.png c\\ d \"e'f\"", name="x y") == [
        "a x y b",
        "--out=3.png",
        "c d",
        "e'f",
    ]
    assert arguments(tmp_path, "{claim_id} {attempt} {{name}} {{{name}}} {name}{size}") == [
        "42",
        "2",
        "{name}",
        "{n}",
        "n3",
    ]
    assert arguments(tmp_path, "$HOME * ~ ; echo") == ["$HOME", "*", "~", ";", "echo"]


def test_a_command_selects_the_columns_that_it_names_each_once() -> None:
    assert command("do {size} {name} {size} {claim_id} {{id}}").columns == ("size", "name")
    hidden = CommandHandler.parse("do {claim_id}", ("claim_id",), IDS)
    assert hidden.columns == ("claim_id",)
    odd = CommandHandler.parse("do '{full name}' {größe} {a:b} {c!r}", ("full name", "größe", "a:b", "c!r"), IDS)
    assert odd.columns == ("full name", "größe", "a:b", "c!r")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "it is empty."),
        ("  ", "it is empty."),
        ("echo 'a", "No closing quotation."),
        ("echo a\\", "No escaped character."),
        ("echo {colour}", "{colour} is no column of the table. It has: id, state, name, size."),
        ("echo {}", "{} is no column of the table."),
        ("{NAME} x", "{NAME} is no column of the table."),
        ("echo {name.upper}", "{name.upper} is no column of the table."),
        ("echo {name!r}", "{name!r} is no column of the table."),
        ("echo {name:>9}", "{name:>9} is no column of the table."),
    ],
)
def test_a_command_that_cannot_work_is_refused_at_the_start(line: str, reason: str) -> None:
    with pytest.raises(BadHandler) as caught:
        command(line)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "column name is NULL, which"), ("a\0b", "a value contains a NUL character")]
)
def test_a_value_that_can_be_no_argument_fails_the_row_for_good(value: str | None, reason: str) -> None:
    with pytest.raises(Fail, match=reason):
        command("true {name}")({"name": value}, 1, 1)


def test_a_null_that_is_not_used_harms_nobody() -> None:
    command("true {{name}} {size}")({"size": 0}, 1, 1)


# Commands: running


def test_a_program_that_is_not_there_fails_the_row_for_good(tmp_path: Path) -> None:
    with pytest.raises(Fail, match="/no/such/program can't be run: No such file or directory"):
        command("/no/such/program {name}")({"name": "x"}, 1, 1)
    (tmp_path / "plain").write_text("no program")
    with pytest.raises(Fail, match="plain can't be run: Permission denied"):
        command(f"{tmp_path}/plain")({}, 1, 1)
    with pytest.raises(Fail, match="can't be run: Argument list too long"):
        command("true {name}")({"name": "x" * 10_000_000}, 1, 1)


def script(text: str) -> CommandHandler:
    """A command that runs a Python program, the text being an argument as it is."""
    return CommandHandler("script", (PYTHON, "-c", text), ())


def test_exit_code_and_the_end_of_standard_error_are_kept() -> None:
    with pytest.raises(CommandFailed) as caught:
        script("import sys; print('out'); print('first', file=sys.stderr); sys.exit('the reason')")({}, 1, 1)
    assert str(caught.value) == "exit code 1: first\nthe reason"
    with pytest.raises(CommandFailed) as caught:
        script("raise SystemExit(7)")({}, 1, 1)
    assert str(caught.value) == "exit code 7"
    with pytest.raises(CommandFailed) as caught:
        script("import os; os.kill(os.getpid(), 9)")({}, 1, 1)
    assert str(caught.value) == "signal SIGKILL"


def test_a_signal_without_a_name_is_no_crash() -> None:
    with pytest.raises(CommandFailed, match=f"signal .*{signal.SIGRTMIN + 3}"):
        script(f"import os; os.kill(os.getpid(), {signal.SIGRTMIN + 3})")({}, 1, 1)


def test_standard_error_that_is_huge_or_binary_is_kept_by_its_end() -> None:
    with pytest.raises(CommandFailed) as caught:
        script(
            "import os, sys; os.write(2, b'\\xff' * 9); [os.write(2, b'x' * 4096) for _ in range(999)]; sys.exit('end')"
        )({}, 1, 1)
    text = str(caught.value)
    assert text.endswith("xxxend")
    assert 8 * 1024 <= len(text) <= 17 * 1024
    with pytest.raises(CommandFailed, match="exit code 3: \N{REPLACEMENT CHARACTER}a"):
        script("import os; os.write(2, b'\\xffa'); os._exit(3)")({}, 1, 1)


def test_standard_error_written_in_small_pieces_is_kept_whole() -> None:
    with pytest.raises(CommandFailed) as caught:
        script("import os, time\nfor n in range(100): os.write(2, b'%03d ' % n); time.sleep(0.001)\nos._exit(3)")(
            {}, 1, 1
        )
    assert str(caught.value) == "exit code 3: " + " ".join(f"{n:03}" for n in range(100))


def test_standard_input_is_empty_and_success_says_nothing() -> None:
    script("import sys; assert sys.stdin.read() == ''; print('fine', file=sys.stderr)")({}, 1, 1)


def test_what_a_command_leaves_running_does_not_hold_its_row(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    began = time.monotonic()
    script(f"import subprocess; open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))")({}, 1, 1)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert time.monotonic() - began < 10


FAMILY = """
import os, signal, subprocess, sys, time
{before}
children = [os.getpid(), subprocess.Popen(['sleep', '600']).pid]
if os.fork() == 0:
    time.sleep(600)
open(sys.argv[1], 'a').write(' '.join(map(str, children)) + '.')
time.sleep(600)
"""


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["meek", "stubborn"])
def test_a_timeout_kills_the_command_with_all_its_children(tmp_path: Path, before: str) -> None:
    pids = tmp_path / "pids"
    handler = CommandHandler("family", (PYTHON, "-c", FAMILY.format(before=before), str(pids)), ())
    row = StartedRow(Claim(1, (1,), "rq", tries=3), {})
    began = time.monotonic()
    ended = perform(row, handler, 1.5)
    assert ended.outcome is Outcome.TIMED_OUT
    assert ended.reason == "ran longer than its timeout of 1.5 s"
    assert time.monotonic() - began < 6
    mine = [int(pid) for pid in pids.read_text().rstrip(".").split()]
    assert len(mine) == 2

    def gone() -> bool:
        return not any(p.info["cmdline"] and str(pids) in p.info["cmdline"] for p in psutil.process_iter(["cmdline"]))

    eventually(gone, timeout=2)
    eventually(lambda: not psutil.pid_exists(mine[1]) or psutil.Process(mine[1]).status() == "zombie", timeout=2)


def test_any_other_end_of_the_row_kills_it_too(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    handler = CommandHandler("family", (PYTHON, "-c", FAMILY.format(before=""), str(pids)), ())

    def interrupt(signum: int, frame: Any) -> None:
        raise RowTimeout

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(RowTimeout):
            handler({}, 1, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    (mine,) = [int(pid) for pid in pids.read_text().rstrip(".").split()][:1]
    assert not psutil.pid_exists(mine)


def test_a_command_runs_in_a_session_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    CommandHandler("s", (PYTHON, "-c", f"import os; open({str(out)!r}, 'w').write(str(os.getsid(0)))"), ())({}, 1, 1)
    assert int(out.read_text()) != os.getsid(0)
