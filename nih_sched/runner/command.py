"""--command: an argument list filled in for each row and run without a shell."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from subprocess import PIPE
from typing import Any

from nih_sched.errors import BadHandler, Fail
from nih_sched.runner.hand import share_hand

TAIL = 16 * 1024  # bytes of standard error that are kept
SHELLS_SIGNALS = frozenset({129, 130, 143})  # how a shell tells of SIGHUP, SIGINT and SIGTERM
KILL_AFTER = 2.0  # seconds from SIGTERM to SIGKILL
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


class CommandFailed(Exception):
    """The command ended with a non-zero exit code or by a signal; the text ends with what it said last."""

    def __init__(self, text: str, signalled: bool) -> None:
        super().__init__(text)
        self.signalled = signalled


@dataclass(frozen=True)
class CommandHandler:
    """A command line, split into arguments once; a row's value is always one argument, whatever it contains."""

    name: str
    arguments: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, command: str, columns: Sequence[str], ids: Sequence[str]) -> CommandHandler:
        """Split the command and hold its {fields} against the table's columns.

        Raises:
            BadHandler: unbalanced quotes, nothing to run, or a field that is no column.
        """
        try:
            arguments = tuple(shlex.split(command))
        except ValueError as error:
            raise BadHandler(handler=f"--command {command!r}", reason=f"{error}.") from error
        if not arguments:
            raise BadHandler(handler="--command", reason="it is empty.")
        fields = [m.group(1) for argument in arguments for m in _FIELD.finditer(argument) if m.group(1) is not None]
        for field in fields:
            if field not in columns and field not in ids:
                raise BadHandler(
                    handler=f"--command {command!r}",
                    reason=f"{{{field}}} is no column of the table. It has: {', '.join(columns)}.",
                )
        return cls(command, arguments, tuple(dict.fromkeys(f for f in fields if f in columns)))

    def __call__(self, values: Mapping[str, Any], claim_id: int, attempt: int) -> None:
        """Run it to its end, its standard output going where ours goes; what it writes is kept for the row.

        Raises:
            CommandFailed: it failed. Fail: a value can't be an argument, or there is no such program.
        """
        facts = {"claim_id": claim_id, "attempt": attempt, **values}
        arguments = [_FIELD.sub(lambda m: _fill(m, facts), argument) for argument in self.arguments]
        if any("\0" in argument for argument in arguments):
            raise Fail("a value contains a NUL character, which no argument of a command can")
        try:
            # A session of its own, so that all that the command starts can be stopped with it.
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            raise Fail(f"{arguments[0]} can't be run: {error.strerror}") from error
        tail = bytearray()
        reader = threading.Thread(target=_read, args=(process, tail), daemon=True)
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        reader.join(timeout=1.0)  # something that it left running may hold the pipe open
        if code:
            end = bytes(tail).decode(errors="replace").strip()
            how = f"exit code {code}" if code > 0 else f"signal {signal_name(-code)}"
            raise CommandFailed(f"{how}: {end}" if end else how, code < 0 or code in SHELLS_SIGNALS)


def _fill(match: re.Match[str], facts: Mapping[str, Any]) -> str:
    name = match.group(1)
    if name is None:
        return match.group(0)[0]
    if facts[name] is None:
        raise Fail(f"column {name} is NULL, which no argument of a command can be")
    return str(facts[name])


def signal_name(number: int) -> str:
    """A signal as people call it; real-time signals have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _read(process: subprocess.Popen[bytes], errors: bytearray) -> None:
    """Pass on what it writes to its standard output, keep the end of its standard error, and both for the row."""
    kept = share_hand().tail
    with selectors.DefaultSelector() as waits, contextlib.suppress(OSError, ValueError):
        for stream in (process.stdout, process.stderr):
            waits.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
        while waits.get_map():
            for ready, _ in waits.select():
                chunk = os.read(ready.fd, TAIL)
                if not chunk:
                    waits.unregister(ready.fileobj)
                    continue
                kept.write(chunk)
                if ready.fileobj is process.stderr:
                    errors += chunk
                    del errors[:-TAIL]
                else:
                    _pass_on(chunk)


def _pass_on(chunk: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading it any more: that is no fault of the row
        while chunk:
            chunk = chunk[os.write(1, chunk) :]


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(timeout=KILL_AFTER)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also when the row's alarm rings again meanwhile; and for children that outlived their parent.
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
