"""Where a failure came from: its kind, and the innermost line of the user's own code. Failures are grouped by it."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import cache
from types import TracebackType

LONGEST = 190  # characters that the ledger keeps
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def place_of(kind: str, trace: TracebackType | None) -> str:
    """`ValueError at app/mail.py:12 in send`; without a line of the user's, the kind alone.

    Args:
        kind: the exception's name.
        trace: its traceback.
    """
    foreign: tuple[str, int, str] | None = None
    mine: tuple[str, int, str] | None = None
    while trace is not None:
        code = trace.tb_frame.f_code
        named = code.co_filename
        path = named if named.startswith("<") else os.path.abspath(named)
        if not path.startswith(_OURS):
            foreign = (path, trace.tb_lineno or code.co_firstlineno, code.co_name)
            if not path.startswith(_libraries()):
                mine = foreign
        trace = trace.tb_next
    found = mine or foreign
    if found is None:
        return kind[:LONGEST]
    path, line, name = found
    end = f":{line} in {name}"[:100]
    head = f"{kind[:60]} at "
    return f"{head}{_short(path)[-(LONGEST - len(head) - len(end)) :]}{end}"


def _short(path: str) -> str:
    """The path below the folder from which its module was imported, the nearest one."""
    folders = [folder.rstrip(os.sep) for folder in (os.path.abspath(one) for one in sys.path if isinstance(one, str))]
    above = max((folder for folder in folders if path.startswith(folder + os.sep)), key=len, default="")
    return path[len(above) + 1 :] if above else path


@cache
def _libraries() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = {os.path.realpath(path) for path in map(sysconfig.get_path, names) if path}
    plain = {os.path.abspath(path) for path in map(sysconfig.get_path, names) if path}
    return (*(path + os.sep for path in sorted(paths | plain)), "<")
