"""How many rows there are, told from a part of them."""

from __future__ import annotations

import pytest

from nih_sched.store.overview import Counts


@pytest.mark.parametrize(
    ("part", "ready", "corrected"),
    [
        ({"Done": 690, "Failed": 36, "Pending": 274}, 300, {"Done": 665, "Failed": 35, "Pending": 300}),
        ({"Done": 900, "Failed": 100}, 500, {"Done": 450, "Failed": 50, "Pending": 500}),  # the part had none of them
        ({"Done": 10, "Pending": 990}, 995, {"Done": 5, "Pending": 995}),
        ({"Done": 10, "Pending": 990}, 1200, {"Done": 0, "Pending": 1200}),  # it has grown since
        ({"Pending": 1000}, 900, {"Pending": 900}),
        ({}, 0, {"Pending": 0}),
    ],
)
def test_what_is_known_of_one_word_corrects_the_others(
    part: dict[str, int], ready: int, corrected: dict[str, int]
) -> None:
    assert Counts(part, whole=False, about=True).beside("Pending", ready).by_word == corrected
