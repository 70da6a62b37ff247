"""Run commands, and account for them and for all that they started: `python under.py '{"commands": …, "out": …}'`.

A program of its own, so that nothing else is among its children. It adopts the orphans among its descendants (on
Linux), waits for every one, and only then asks the kernel what all of them have used.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Start the commands, pass on SIGTERM, write down what they used."""
    plan = json.loads(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    commands: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: object) -> None:
        for one in commands:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, number)  # not send_signal(): it would reap, and so would we

    signal.signal(signal.SIGTERM, pass_on)
    started, started_ns = time.time(), time.monotonic_ns()
    commands += [subprocess.Popen(command) for command in plan["commands"]]
    codes: dict[int, int] = {}
    ended_ns = started_ns
    with contextlib.suppress(ChildProcessError):  # until no child is left
        while True:
            pid, status = os.waitpid(-1, 0)
            codes[pid] = os.waitstatus_to_exitcode(status)
            if any(one.pid == pid for one in commands):
                ended_ns = time.monotonic_ns()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = {
        "started": started,
        "started_ns": started_ns,
        "ended_ns": ended_ns,
        "cpu": used.ru_utime + used.ru_stime,
        "codes": [codes.get(one.pid) for one in commands],
    }
    with open(f"{plan['out']}.new", "w") as file:
        json.dump(spent, file)
    os.replace(f"{plan['out']}.new", plan["out"])


if __name__ == "__main__":
    main()
