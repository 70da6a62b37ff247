"""What a person asks of a source: how it does, why a row waits, what became of it. Commands and web show the same."""

from nih_sched.reports.hour import Hour, Minute, hour
from nih_sched.reports.rows import Group, Groups, Listed, ListedRow, groups, keys, rows, select
from nih_sched.reports.servers import RedisSeen
from nih_sched.reports.show import Attempt, Shown, show
from nih_sched.reports.situation import Situation
from nih_sched.reports.status import Status, status
from nih_sched.reports.why import SENTENCES, Why, why

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
