"""nih-sched: any SQL table becomes a job queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nih_sched.errors import Fail, NihError, RetryLater
from nih_sched.homes import at_first_use

if TYPE_CHECKING:
    from nih_sched.doorbell import ring
    from nih_sched.jobs import get_jobs, get_jobs_async
    from nih_sched.settings import Settings
    from nih_sched.supervisor import run

__version__ = "0.1.0"
__all__ = ["Fail", "NihError", "RetryLater", "Settings", "get_jobs", "get_jobs_async", "ring", "run"]

# A handler module that only raises Fail needn't load RQ and SQLAlchemy.
__getattr__ = at_first_use(
    __name__,
    {
        "get_jobs": "jobs",
        "get_jobs_async": "jobs",
        "Settings": "settings",
        "ring": "doorbell",
        "run": "supervisor",
    },
)
