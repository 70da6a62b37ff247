"""Rows that come by ones and twos are claimed, and begin, with as few round trips as their database lets one do it.

Each way takes what is as it nearly always is, and touches nothing else: that is left for the careful way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import Integer

from nih_sched.model import StartedRow, State
from nih_sched.store.desk import Desk
from nih_sched.store.records import Records
from nih_sched.store.swift import mariadb, postgresql
from nih_sched.store.swift.parts import Taken

__all__ = ["Taken", "begin", "claim", "fits"]


def fits(desk: Desk) -> bool:
    """Whether all can be said in SQL: a row's key is its table's primary key, and one whole number."""
    (key, *others) = desk.rows.keys
    plain = not others and key.primary_key and isinstance(key.type, Integer)
    able = desk.dialect.writes_in_ctes or getattr(desk.engine.dialect, "is_mariadb", False)
    # A write that changes nothing would still fire the user's triggers.
    return able and plain and desk.rows.words[State.QUEUED] != desk.rows.words[State.STARTED]


def claim(desk: Desk, count: int, rq_ids: Callable[[int], Sequence[str]], producer: str, tries: int) -> Taken:
    """Claim up to so many ready rows, each to travel alone, as Claims does it; where it fits().

    Raises:
        KeysDontMatch: the table lets no row of its be Queued, without a word.
    """
    way = postgresql.claim if desk.dialect.writes_in_ctes else mariadb.claim
    return way(desk, count, rq_ids, producer, tries)


def begin(desk: Desk, records: Records, claim_ids: Sequence[int], columns: Sequence[str]) -> list[StartedRow]:
    """Begin those of these claims against which nothing stands, and their rows; where it fits().

    What isn't as it was claimed, what is locked, and all under a lost lease, is left alone.

    Raises:
        LeaseLost: nothing began.
    """
    way = postgresql.begin if desk.dialect.writes_in_ctes else mariadb.begin
    return way(desk, records, claim_ids, columns)
