"""nih-sched: any SQL table becomes a job queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nih_sched.errors import Fail, NihError, RetryLater

if TYPE_CHECKING:
    from nih_sched.doorbell import ring
    from nih_sched.jobs import get_jobs, get_jobs_async
    from nih_sched.settings import Settings
    from nih_sched.supervisor import run

__version__ = "0.1.0"
__all__ = ["Fail", "NihError", "RetryLater", "Settings", "get_jobs", "get_jobs_async", "ring", "run"]

# Imported when first used: a handler module that only raises Fail needn't load RQ and SQLAlchemy.
_HOMES = {
    "get_jobs": "nih_sched.jobs",
    "get_jobs_async": "nih_sched.jobs",
    "Settings": "nih_sched.settings",
    "ring": "nih_sched.doorbell",
    "run": "nih_sched.supervisor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib  # noqa: PLC0415 - see above

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nih_sched' has no attribute {name!r}")
