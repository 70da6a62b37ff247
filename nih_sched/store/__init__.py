"""Every SQL statement that runs on the user's table and on our ledger, each with its fence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nih_sched.homes import at_first_use

if TYPE_CHECKING:
    from nih_sched.store.attempts import Attempts
    from nih_sched.store.checkup import Checkup
    from nih_sched.store.claims import Claims
    from nih_sched.store.desk import Desk, open_desk, source_desk, source_facts, source_name
    from nih_sched.store.leases import Hold, Lease, Leases
    from nih_sched.store.looks import Looks, Progress, Seen
    from nih_sched.store.orphans import Orphan, Orphans
    from nih_sched.store.retries import Due, Retries

__all__ = [
    "Attempts",
    "Checkup",
    "Claims",
    "Desk",
    "Due",
    "Hold",
    "Lease",
    "Leases",
    "Looks",
    "Orphan",
    "Orphans",
    "Progress",
    "Retries",
    "Seen",
    "open_desk",
    "source_desk",
    "source_facts",
    "source_name",
]

__getattr__ = at_first_use(
    __name__,
    {
        "Attempts": "attempts",
        "Checkup": "checkup",
        "Claims": "claims",
        "Desk": "desk",
        "Due": "retries",
        "Hold": "leases",
        "Lease": "leases",
        "Leases": "leases",
        "Looks": "looks",
        "Orphan": "orphans",
        "Orphans": "orphans",
        "Progress": "looks",
        "Retries": "retries",
        "Seen": "looks",
        "open_desk": "desk",
        "source_desk": "desk",
        "source_facts": "desk",
        "source_name": "desk",
    },
)
