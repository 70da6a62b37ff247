"""What a person asks of a source: how it does, why a row waits, what became of it. Commands and web show the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nih_sched.homes import at_first_use

if TYPE_CHECKING:
    from nih_sched.reports.listed import Group, Groups, Listed, ListedRow, groups, keys, rows, select
    from nih_sched.reports.minutes import Hour, Minute, hour
    from nih_sched.reports.overall import Status, status
    from nih_sched.reports.reasons import SENTENCES, Why, why
    from nih_sched.reports.servers import RedisSeen
    from nih_sched.reports.shown import Attempt, Shown, show
    from nih_sched.reports.situation import Situation

__all__ = [
    "SENTENCES",
    "Attempt",
    "Group",
    "Groups",
    "Hour",
    "Listed",
    "ListedRow",
    "Minute",
    "RedisSeen",
    "Shown",
    "Situation",
    "Status",
    "Why",
    "groups",
    "hour",
    "keys",
    "rows",
    "select",
    "show",
    "status",
    "why",
]

__getattr__ = at_first_use(
    __name__,
    {
        "Attempt": "shown",
        "Group": "listed",
        "Groups": "listed",
        "Hour": "minutes",
        "Listed": "listed",
        "ListedRow": "listed",
        "Minute": "minutes",
        "RedisSeen": "servers",
        "SENTENCES": "reasons",
        "Shown": "shown",
        "Situation": "situation",
        "Status": "overall",
        "Why": "reasons",
        "groups": "listed",
        "hour": "minutes",
        "keys": "listed",
        "rows": "listed",
        "select": "listed",
        "show": "shown",
        "status": "overall",
        "why": "reasons",
    },
)
