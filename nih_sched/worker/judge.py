"""Judging an RQ job before it runs, and a horse's end after."""

from __future__ import annotations

import os
import sys
from typing import Any

from rq.exceptions import DeserializationError
from rq.job import Job

from nih_sched import runner
from nih_sched.broker import FUNCTION


def not_ours(job: Job) -> str | None:
    """Why this job may not run here, or None. Callbacks are code by name, too."""
    try:
        if job.func_name != FUNCTION or job.instance is not None or job.kwargs:
            return "it isn't a job of nih-sched's"
        source, claim_ids = job.args
    except (DeserializationError, ValueError, TypeError, AttributeError):
        return "it can't be read as a job of nih-sched's"
    if not isinstance(source, str) or not isinstance(claim_ids, list) or not all(type(c) is int for c in claim_ids):
        return "its arguments aren't a source and claim ids"
    if job._success_callback_name or job._failure_callback_name or job._stopped_callback_name:
        return "it names callbacks"
    return None


def how_it_died(status: int | None, rusage: Any) -> str:
    """A horse's end in words, from what os.wait4 said: signal or exit code, and peak memory."""
    if status is None:
        return "its process is gone"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        how = f"its process was killed by signal {number} ({runner.signal_name(number)})"
    else:
        how = f"its process ended with exit code {os.waitstatus_to_exitcode(status)}"
    if rusage is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, kilobytes here
        how += f", peak memory {rusage.ru_maxrss * unit / 2**20:.0f} MB"
    return how
