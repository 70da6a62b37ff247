"""What a check finds, and what all checks are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nih_sched.settings import Settings
from nih_sched.store import Checkup, Desk

if TYPE_CHECKING:
    from redis import Redis


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or could be better.

    Args:
        name: for programs; it stays the same.
        what: is the matter, with numbers and names.
        why: it matters.
        remedy: what to type or to do.
        is_problem: whether rows are lost, stuck or in danger; else it is advice.
        fix: puts it right, and says what it did; None where that is not ours to do.
    """

    name: str
    what: str
    why: str
    remedy: str
    is_problem: bool = True
    fix: Callable[[], str] | None = field(default=None, compare=False)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        facts = {"name": self.name, "level": "problem" if self.is_problem else "advice"}
        return {**facts, "what": self.what, "why": self.why, "type": self.remedy, "fixable": self.fix is not None}


@dataclass(frozen=True)
class Visit:
    """What a check may look at.

    Args:
        settings: as for a scheduler.
        desk: the source's.
        redis: an open connection; None where there is none, which the checks of Redis have said by then.
    """

    settings: Settings
    desk: Desk
    redis: Redis | None

    @cached_property
    def checkup(self) -> Checkup:
        """The statements."""
        return Checkup(self.desk)
