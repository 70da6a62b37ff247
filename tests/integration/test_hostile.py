"""Hostile rows: only that row is affected, and the next row starts clean."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
from conftest import Work
from servers import SCHEDULER, eventually, run, scheduler, spawn_scheduler

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

MODULE = r'''
import ctypes, hashlib, json, os, resource, signal, subprocess, sys, threading, time
from handlers import note
from nih_sched import Fail, RetryLater

def hash_of(text): return hashlib.sha256(text.encode()).hexdigest()

def state():
    """What a row finds when it starts."""
    signals = {n: str(signal.getsignal(n)).partition(" at ")[0] for n in signal.valid_signals()}
    mask = os.umask(0)
    os.umask(mask)
    environ = sorted((k, hash_of(v)) for k, v in os.environ.items() if not k.startswith(("RQ_", "_NIH_SCHED_")))
    return [
        os.getcwd(), *environ, signals, mask,
        threading.active_count(), sorted(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        sys.getrecursionlimit(), resource.getrlimit(resource.RLIMIT_NOFILE), sys.path, os.nice(0),
        sorted(name for name in sys.modules if name.startswith("trash")),
    ]

def keep(name, *words):
    with open(name, "a") as file:
        file.write(json.dumps(words, default=str) + "\n")

def job(id, kind, attempt):
    note(id)
    if kind != "good":
        return globals()[kind]()
    keep("states", id, state())
    return "clean"

class Silent(Exception):
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __str__

class Leaving(Exception):
    def __str__(self): raise SystemExit(4)
    __repr__ = __str__

class Number(Exception):
    def __str__(self): return 7

class Closed(Exception):
    def __getattribute__(self, name): raise KeyboardInterrupt

class Noted(Exception):
    @property
    def __notes__(self): raise SystemExit(5)

class Nameless(type):
    @property
    def __name__(cls): raise RuntimeError("no name")

class Unnamed(Exception, metaclass=Nameless):
    pass

class Soon(RetryLater):
    def __init__(self): pass
    @property
    def seconds(self): raise RuntimeError("when?")

class Mute:
    def __str__(self): raise RuntimeError("no text")

class Quitting:
    def __str__(self): raise SystemExit(6)

class Endless:
    def __str__(self):
        while True: time.sleep(0.1)

class EndlessError(Exception):
    def __str__(self):
        while True: time.sleep(0.1)

def silent(): raise Silent
def leaving(): raise Leaving
def number(): raise Number
def closed(): raise Closed
def noted(): raise Noted
def unnamed(): raise Unnamed
def soon(): raise Soon
def long_text(): raise ValueError("a\0\x1b[2Jb\ud800" + "y" * 10_000_000 + "the end")
def bad_name(): raise type("Bad\x1b[2JName", (Exception,), {})("x")
def chained():
    error = ValueError("loop")
    error.__cause__ = error
    raise error
def group(): raise BaseExceptionGroup("many", [SystemExit(1), ValueError("x"), KeyboardInterrupt()])
def interrupt(): raise KeyboardInterrupt
def generator_exit(): raise GeneratorExit
def recursion(): return recursion()
def deep():
    made = []
    for _ in range(100_000): made = [made]
    return made
def circular():
    made = []
    made.append(made)
    return made
def mute(): return Mute()
def quitting(): return Quitting()
def endless(): return Endless()
def endless_error(): raise EndlessError
def tuples(): return {(1, 2): "x"}
def surrogate(): return "\ud800 \0 \x1b[2J"
def large(): return "z" * 10_000_000
def a_generator(): return (n for n in range(3))
def nan(): return float("nan")
def exit0(): sys.exit(0)
def exit3(): sys.exit(3)
def leave0(): os._exit(0)
def leave3(): os._exit(3)
def abort(): os.abort()
def segfault(): ctypes.string_at(0)
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def group_killed(): os.kill(0, signal.SIGKILL)
def swallow():
    while True:
        try: time.sleep(0.05)
        except Exception: pass
def threads():
    for _ in range(20): threading.Thread(target=time.sleep, args=(300,)).start()
def busy_thread():
    def spin():
        while True: pass
    threading.Thread(target=spin).start()
def children():
    for _ in range(3): keep("children", subprocess.Popen(["sleep", "300"]).pid)
def deaf_child():
    line = "import os, signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w').close(); time.sleep(300)"
    keep("children", subprocess.Popen([sys.executable, "-c", line]).pid)
    while not os.path.exists("ready"): time.sleep(0.01)
def folder(): os.chdir("/")
def no_folder():
    os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
def environment():
    os.environ.clear()
    os.environ["HOME"] = "/nowhere"
def signals():
    for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1, signal.SIGALRM, signal.SIGPIPE):
        signal.signal(n, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
def alarm(): signal.alarm(1); signal.setitimer(signal.ITIMER_REAL, 0)
def mask(): os.umask(0o777)
def limits(): resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
def no_output():
    sys.stdout.close(); sys.stderr = None
    os.close(1); os.close(2)
def trash():
    sys.path.clear(); sys.setrecursionlimit(200); sys.modules["trash"] = None
def descriptors(): os.closerange(3, 256)
def two_of_us(): os.fork()
def detached():
    keep("children", subprocess.Popen(["sleep", "300"], start_new_session=True).pid)
    time.sleep(60)
'''
ONE = ("--job", "hostile:job", "--burst", "--max-concurrent-jobs", "1", "--tries", "0")


@pytest.fixture(autouse=True)
def _module(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir(exist_ok=True)
    (tmp_path / "app" / "hostile.py").write_text(MODULE)


def insert(work: Work, kinds: list[str]) -> dict[str, int]:
    """A row for each, and a good row after each; return the hostile ones' ids."""
    found: dict[str, int] = {}
    for place, kind in enumerate(kinds):
        found[kind] = 2 * place + 1
        work.insert(found[kind], kind=kind)
        work.insert(found[kind] + 1, kind="good")
    return found


def lines(work: Work, name: str) -> list[Any]:
    """What the handlers kept there."""
    path = work.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_good(work: Work, kinds: list[str]) -> None:
    """Each row ran once, each good row found the same as the first, and its result is kept."""
    ids = range(1, 2 * len(kinds) + 1)
    assert work.ran() == {str(i): 1 for i in ids}
    found = dict(lines(work, "states"))
    assert sorted(found) == [i for i in ids if i % 2 == 0]
    for row, state in found.items():
        differ = [pair for pair in zip(state, found[2], strict=True) if pair[0] != pair[1]]
        assert not differ, f"after {kinds[row // 2 - 1]}"
        assert [(a.outcome, a.result) for a in work.attempts(row)] == [("done", '"clean"')], kinds[row // 2 - 1]


def check_ledger(work: Work) -> None:
    """Nothing there is too long or can't be shown."""
    for record in work.sql("SELECT reason, traceback, result FROM nih_sched_attempts"):
        for text in record:
            assert text is None or (len(text.encode()) <= 70_000 and "\0" not in text)


def living(pids: list[int]) -> list[int]:
    """Those of them that run."""
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


RAISED = {
    "silent": "Silent: (its text can't be read)",
    "leaving": "Leaving: (its text can't be read)",
    "number": "Number: (its text can't be read)",
    "long_text": "ValueError: a\\x00",
    "bad_name": "Bad",
    "chained": "ValueError: loop",
    "group": "BaseExceptionGroup: many (3 sub-exceptions)",
    "interrupt": "KeyboardInterrupt",
    "generator_exit": "GeneratorExit",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "exit0": "SystemExit: 0",
    "exit3": "SystemExit: 3",
    "swallow": "ran longer than its timeout of 2 s",
    "killed": "its process was killed by signal 9 (SIGKILL)",
    "group_killed": "its process was killed by signal 9 (SIGKILL)",
    "abort": "its process was killed by signal 6 (SIGABRT)",
    "segfault": "its process was killed by signal 11 (SIGSEGV)",
    "leave0": "its process ended with exit code 0",
    "leave3": "its process ended with exit code 3",
}


def test_what_handlers_raise_and_how_they_leave(work: Work) -> None:
    kinds = list(RAISED)
    rows = insert(work, kinds)
    done = scheduler(*ONE, "--timeout", "2", env=work.env, cwd=work.folder)
    assert done.returncode == 1, done.stderr
    check_good(work, kinds)
    check_ledger(work)
    assert work.states() == {"Done": len(kinds), "Failed": len(kinds)}
    for kind, expected in RAISED.items():
        (attempt,) = work.attempts(rows[kind])
        assert attempt.reason.startswith(expected), kind
        assert attempt.outcome == {"swallow": "timed out"}.get(kind, "crashed" if "process" in expected else "failed")
    assert work.attempts(rows["long_text"])[0].reason.endswith("the end")
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("kind", ["closed", "noted", "unnamed", "soon"])
def test_an_exception_that_resists_every_look(lite: Work, kind: str) -> None:
    insert(lite, [kind])
    with spawn_scheduler(*ONE, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.poll() is not None, timeout=15)
    check_good(lite, [kind])
    assert lite.states() == {"Done": 1, "Failed": 1}
    assert lite.attempts(1)[0].outcome in ("failed", "crashed")


@pytest.mark.parametrize("kind", ["endless", "endless_error"])
def test_a_text_that_never_comes_has_a_timeout_too(lite: Work, kind: str) -> None:
    insert(lite, [kind])
    with spawn_scheduler(*ONE, "--timeout", "1", env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.poll() is not None, timeout=25)
    check_good(lite, [kind])
    assert set(lite.states()) <= {"Done", "Failed"}


RETURNED = {
    "deep": '"a list that can\'t be kept (RecursionError)"',
    "circular": '"a list that can\'t be kept (ValueError)"',
    "mute": '"a Mute that can\'t be kept (RuntimeError)"',
    "tuples": '"a dict that can\'t be kept (TypeError)"',
    "surrogate": '"\\\\ud800 \\\\x00 ',
    "large": '"zzzz',
    "a_generator": '"<generator object',
    "nan": "NaN",
    "threads": None,
    "busy_thread": None,
    "children": None,
    "deaf_child": None,
    "folder": None,
    "no_folder": None,
    "environment": None,
    "signals": None,
    "alarm": None,
    "mask": None,
    "limits": None,
    "no_output": None,
    "trash": None,
}


def test_what_handlers_return_and_leave_behind(work: Work) -> None:
    kinds = list(RETURNED)
    rows = insert(work, kinds)
    done = scheduler(*ONE, env=work.env, cwd=work.folder)
    assert done.returncode == 0, done.stderr
    assert work.states() == {"Done": 2 * len(kinds)}
    check_good(work, kinds)
    check_ledger(work)
    for kind, expected in RETURNED.items():
        (attempt,) = work.attempts(rows[kind])
        if expected is None:
            assert attempt.result is None, kind
        else:
            assert attempt.result.startswith(expected.replace("\\\\", "\\")) or kind == "surrogate", kind
    children = [pid for (pid,) in lines(work, "children")]
    assert len(children) == 4
    assert not living(children)


def test_a_result_whose_text_ends_the_program(lite: Work) -> None:
    insert(lite, ["quitting"])
    with spawn_scheduler(*ONE, env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.poll() is not None, timeout=15)
    check_good(lite, ["quitting"])
    assert set(lite.states()) <= {"Done", "Failed"}


def test_a_handler_that_closes_all_files(work: Work) -> None:
    insert(work, ["descriptors"])
    with spawn_scheduler(*ONE, env=work.env, cwd=work.folder) as process:
        eventually(lambda: process.poll() is not None, timeout=20)
    check_good(work, ["descriptors"])
    assert set(work.states()) <= {"Done", "Failed"}


def test_a_handler_that_returns_twice(work: Work) -> None:
    insert(work, ["two_of_us"])
    with spawn_scheduler(*ONE, env=work.env, cwd=work.folder) as process:
        eventually(lambda: process.poll() is not None, timeout=20)
    check_good(work, ["two_of_us"])
    assert set(work.states()) <= {"Done", "Failed"}
    assert len(work.attempts(1)) == 1


def test_a_detached_child_doesnt_outlive_its_rows_timeout(lite: Work) -> None:
    insert(lite, ["detached"])
    with spawn_scheduler(*ONE, "--timeout", "1", env=lite.env, cwd=lite.folder) as process:
        eventually(lambda: process.poll() is not None)
        ((child,),) = lines(lite, "children")
        still = living([child])
    assert lite.attempts(1)[0].outcome == "timed out"
    assert not still


# Values

SQL = ["'; DROP TABLE work; --", '"; DELETE FROM work; --', "%s %(id)s %% :id ?", "\\' OR 1=1 --", "$1 {id} {0} {}"]
SHELL = ["$(touch hacked)", "`touch hacked`", "; touch hacked", "| touch hacked", "> hacked", "-rf", "--", "*", "~", ""]
BRACES = ["{", "}", "{{", "}}", "{id}", "{{id}}", "{nope}", "{0}", "%d", "${HOME}", "$HOME", "'", '"', "\\", "'\"\\"]
CONTROL = ["a\x1b[2J\x07b", "line\r\nline\n", "\t", "\x7f\x85", "\u202e\u2028", "\U0001f600", "é" * 100, " a "]


def values(work: Work) -> list[str]:
    """Hostile texts that this database takes."""
    more = ["nul\0nul"] if work.database.name == "sqlite" else []
    return [*SQL, *SHELL, *BRACES, *CONTROL, *more]


def make_texts(work: Work) -> None:
    """A table whose key and data are texts."""
    if work.database.name == "mariadb":
        text, key = "LONGTEXT", "VARCHAR(300) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"
    else:
        text, key = "TEXT", "TEXT"
    work.sql(f"CREATE TABLE texts (name {key} NOT NULL PRIMARY KEY, state VARCHAR(20) NOT NULL, body {text})")


def insert_texts(work: Work, records: list[tuple[str, str]]) -> None:
    """Ready rows with these names and bodies."""
    statement = sqlalchemy.text("INSERT INTO texts (name, state, body) VALUES (:n, 'Pending', :b)")
    for name, body in records:
        # A transaction for each: ours may idle for 5 s, in which PyMySQL can't quote 10 MB on a busy machine.
        with work.engine.begin() as connection:
            connection.execute(statement, {"n": name, "b": body})


TEXTS = """
import json, hashlib
def job(name, body):
    with open("seen", "a") as file:
        file.write(json.dumps([name, hashlib.sha256(body.encode()).hexdigest()]) + "\\n")
    if len(body) > 1000:
        return body
    raise ValueError(f"{name} and {body}")
"""


def digest(text: str) -> str:
    """As the handler makes it."""
    return hashlib.sha256(text.encode()).hexdigest()


def test_hostile_values_in_every_column(work: Work) -> None:
    (work.folder / "texts.py").write_text(TEXTS)
    make_texts(work)
    hostile = [(text, text) for text in values(work)]
    huge = [(f"huge {n}", part * (10_000_000 // len(part))) for n, part in enumerate(["x", "\x1b'{}\\"])]
    insert_texts(work, hostile + huge)
    line = ("--table", "texts", "--job", "texts:job", "--max-concurrent-jobs", "2", "--tries", "0", "--burst")
    done = scheduler(*line, env=work.env, cwd=work.folder)
    assert done.returncode == 1, done.stderr
    assert sorted(map(tuple, lines(work, "seen"))) == sorted((name, digest(body)) for name, body in hostile + huge)
    assert dict(map(tuple, work.sql("SELECT name, state FROM texts"))) == dict.fromkeys(
        [name for name, _ in hostile], "Failed"
    ) | dict.fromkeys([name for name, _ in huge], "Done")
    assert dict(map(tuple, work.sql("SELECT name, body FROM texts"))) == dict(hostile + huge)
    reasons = {reason for (reason,) in work.sql("SELECT reason FROM nih_sched_attempts WHERE outcome = 'failed'")}
    assert reasons == {f"ValueError: {name} and {body}".replace("\0", "\\x00") for name, body in hostile}
    check_ledger(work)
    assert not {"\x1b", "\x07", "\0", "\u202e"} & set(done.stderr)
    assert len(done.stderr) < 100_000


def test_hostile_values_in_a_command(lite: Work) -> None:
    make_texts(lite)
    hostile = [(str(n), text) for n, text in enumerate(values(lite))]
    insert_texts(lite, [*hostile, ("huge", "x" * 10_000_000)])
    note = 'printf "%s\\0" "$@" end >> seen'
    command = f"sh -c '{note}' sh {{body}} {{{{{{body}}}}}} --x={{body}}{{name}} {{name}}"
    line = ("--table", "texts", "--command", command, "--max-concurrent-jobs", "2", "--tries", "0", "--burst")
    done = scheduler(*line, env=lite.env, cwd=lite.folder)
    assert done.returncode == 1, done.stderr
    words = (lite.folder / "seen").read_bytes().decode().split("\0")[:-1]
    assert words[4::5] == ["end"] * (len(words) // 5)
    seen = {words[n + 3]: words[n : n + 4] for n in range(0, len(words), 5)}
    fit = {name: text for name, text in hostile if "\0" not in text}
    assert seen == {name: [text, f"{{{text}}}", f"--x={text}{name}", name] for name, text in fit.items()}
    assert not (lite.folder / "hacked").exists()
    why = dict(map(tuple, lite.sql("SELECT row_key, reason FROM nih_sched_attempts WHERE outcome = 'failed'")))
    assert "Argument list too long" in why.pop('["huge"]')
    assert all("NUL" in reason for reason in why.values())
    assert len(why) == len(hostile) - len(fit)


# Output

FLOOD = """
import os, sys
from handlers import note
def job(id):
    note(id)
    if id == 1:
        line = "x" * 999_999
        for _ in range(1000): print(line)
    if id == 2:
        for _ in range(500): print("y" * 2_000_000, file=sys.stderr)
"""


def test_a_gigabyte_of_output(lite: Work) -> None:
    (lite.folder / "flood.py").write_text(FLOOD)
    lite.insert(1, 2, 3)
    line = shlex.join([*SCHEDULER, "--job", "flood:job", *ONE[2:]])
    done = run(["sh", "-c", f"{line} > /dev/null 2>&1"], env=lite.env, cwd=lite.folder)
    assert done.returncode == 0
    assert lite.states() == {"Done": 3}
    assert lite.ran() == {"1": 1, "2": 1, "3": 1}


def test_a_gigabyte_of_a_commands_output(lite: Work) -> None:
    lite.insert(1, 2)
    flood = "head -c 250000000 /dev/zero; head -c 250000000 /dev/zero >&2; echo $1 last >&2; exit 7"
    line = shlex.join([*SCHEDULER, "--command", f"sh -c '{flood}' sh {{id}}", *ONE[2:]])
    done = run(["sh", "-c", f"{line} > /dev/null"], env=lite.env, cwd=lite.folder)
    assert done.returncode == 1, done.stderr
    for row in (1, 2):
        (attempt,) = lite.attempts(row)
        assert attempt.reason.startswith("CommandFailed: exit code 7: ")
        assert attempt.reason.endswith(f"{row} last")
    check_ledger(lite)
    assert len(done.stderr) < 10_000
