"""How many rows a horse reads at once."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import JSON, Column, Integer, LargeBinary, String, Text
from sqlalchemy.types import NullType

from nih_sched.model import Claim, StartedRow
from nih_sched.runner.portion import CARRIED, FIRST, LEAD, LEAST, LIMIT, NARROW, WORTH, Portion


def rows(*values: Any, name: str = "wide") -> list[StartedRow]:
    return [StartedRow(Claim(n, (n,), "rq"), {name: value}) for n, value in enumerate(values, 1)]


@pytest.mark.parametrize("kind", [Text(), String(NARROW + 1), String(), LargeBinary(), JSON(), NullType()])
def test_wide_columns_are_read_with_care_at_first(kind: Any) -> None:
    assert Portion([Column("id", Integer), Column("wide", kind)]).size == FIRST


@pytest.mark.parametrize("kinds", [[], [Integer()], [String(NARROW), Integer()]])
def test_narrow_ones_are_read_all_at_once(kinds: list[Any]) -> None:
    portion = Portion([Column(f"c{n}", kind) for n, kind in enumerate(kinds)])
    assert portion.size >= 1000
    portion.note(rows("x" * LIMIT, name="c0"))
    assert portion.size >= 1000


def test_it_learns_from_the_heaviest_row() -> None:
    portion = Portion([Column("wide", Text())])
    portion.note(rows("x" * (LIMIT // 4), "x", None))
    assert portion.size == 4
    portion.note(rows("x" * (LIMIT * 3)))
    assert portion.size == 1  # at least one


def test_a_heavy_row_is_forgotten_by_and_by() -> None:
    portion = Portion([Column("wide", LargeBinary())])
    portion.note(rows(b"x" * LIMIT))
    sizes = []
    for _ in range(40):
        portion.note(rows(b"x"))
        sizes.append(portion.size)
    assert sizes[:3] == [2, 4, 8]
    assert sizes == sorted(sizes)
    assert sizes[-1] == LIMIT


def test_nothing_read_teaches_nothing() -> None:
    portion = Portion([Column("wide", Text())])
    portion.note([])
    assert portion.size == FIRST
    portion.note([StartedRow(Claim(1, (1,), "rq"), {}, unreadable="no")])
    assert portion.size > FIRST


@pytest.mark.parametrize("value", [None, 1, 1.5, True, "text", b"bytes", {"a": [1, 2]}, ["x"], object()])
def test_values_of_any_kind_are_weighed(value: Any) -> None:
    portion = Portion([Column("wide", JSON())])
    portion.note(rows(value))
    assert portion.size >= FIRST


def test_the_rest_of_short_rows_is_worth_asking_for() -> None:
    portion = Portion([Column("id", Integer)])
    assert portion.lead(2000) >= 2000  # nothing is known yet
    portion.timed(0, 1.0)
    portion.timed(100, 0.1)
    lead = int(LEAD * 1000)
    assert portion.lead(2000) == lead
    assert portion.is_worth_asking(WORTH)
    assert portion.lead(lead + WORTH) == lead
    assert not portion.is_worth_asking(WORTH - 1)
    assert portion.lead(lead + WORTH - 1) >= lead + WORTH - 1
    portion.timed(1, LEAST / 2)  # they keep worker and horse busy by themselves
    assert not portion.is_worth_asking(2000)
    assert portion.lead(2000) >= 2000
    portion.timed(10, 1.0)
    portion.asks = False
    assert portion.lead(2000) >= 2000


def test_what_is_read_with_care_is_not_asked_for() -> None:
    portion = Portion([Column("wide", Text())])
    portion.timed(100, 0.1)
    assert portion.lead(2000) == FIRST
    assert not portion.is_worth_asking(2000)
    for _ in range(20):
        portion.note(rows("x" * (CARRIED // 2000)))
    assert portion.lead(2000) == int(LEAD * 1000)
    assert portion.is_worth_asking(2000)
    portion.note(rows("x" * (CARRIED // 1000)))
    assert not portion.is_worth_asking(2000)
    assert portion.is_worth_asking(1000)
    portion.note(rows("x" * (LIMIT // WORTH * 2)))
    assert portion.lead(2000) == portion.size == WORTH // 2
