"""What a worker does for its horse while a row is in hand for long."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from conformance.places import Events, Place, claim, only, start
from nih_sched.model import Ended, Outcome
from nih_sched.runner import parent
from nih_sched.runner.hand import Hand
from nih_sched.runner.parent import LONGEST, PACE, Steward


def test_what_has_run_is_not_given_back_with_the_rest(place: Place, hand: Hand) -> None:
    place.jobs(*["Pending"] * 4)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    assert hand.take(claims[0].id)
    assert hand.tell(Ended(claims[0], Outcome.DONE, at=0.0))  # and isn't written: the database was away, say
    assert hand.take(claims[1].id)
    site: Any = SimpleNamespace(worker="worker")
    steward = Steward(site, desk.source.name, [one.id for one in claims])
    steward._claim = claims[1].id
    steward._give_rest_back(desk)
    assert place.states() == {1: "Started", 2: "Started", 3: "Pending", 4: "Pending"}
    assert not hand.take(claims[2].id)
    steward._write(desk)
    assert place.states() == {1: "Done", 2: "Started", 3: "Pending", 4: "Pending"}
    assert hand.unwritten() == []


def test_it_writes_while_rows_run(place: Place, hand: Hand, events: Events) -> None:
    place.jobs(*["Pending"] * 12)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    site: Any = SimpleNamespace(worker="worker", desk_for=lambda source, patience: desk, close=lambda: None)
    steward = Steward(site, desk.source.name, [one.id for one in claims])
    for one in claims[:3]:
        hand.take(one.id)
        hand.tell(Ended(one, Outcome.DONE, at=0.0))
    hand.take(claims[3].id)
    steward.look(0)
    assert set(place.states().values()) == {"Started"}  # it may have company soon
    time.sleep(PACE)
    steward.look(0)
    assert place.states() == {n: "Done" if n <= 3 else "Started" for n in range(1, 13)}
    assert not hand.is_behind
    assert events[1:] == [("done_together", {"count": 3, "seconds": 0.0})]


@pytest.mark.usefixtures("events")
def test_a_job_whose_rows_began_late_keeps_its_time_for_them(
    place: Place, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(parent.clock, "monotonic", lambda: now)
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    claims = claim(desk)
    site: Any = SimpleNamespace(worker="worker", desk_for=lambda source, patience: desk, close=lambda: None)
    steward = Steward(site, desk.source.name, [one.id for one in claims])
    steward.look(0)
    now += 2 * LONGEST  # the database was slow
    start(desk, *claims)
    for one in claims[:3]:
        assert hand.take(one.id)
        steward.look(0)
        now += LONGEST / 2 + 0.1
        hand.tell(Ended(one, Outcome.DONE, at=0.0))
    assert not hand.take(claims[3].id)
    assert place.states() == {1: "Done", 2: "Done", 3: "Started", 4: "Pending", 5: "Pending"}


@only("postgresql", "mariadb")
def test_a_row_that_its_owner_has_locked_holds_it_up_for_a_moment_only(place: Place, hand: Hand) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    claims = claim(desk)
    start(desk, *claims)
    assert hand.take(claims[0].id)
    site: Any = SimpleNamespace(worker="worker")
    steward = Steward(site, desk.source.name, [one.id for one in claims])
    steward._claim = claims[0].id
    with place.engine.connect() as owner:
        owner.execute(text("UPDATE jobs SET name = 'locked' WHERE id = 3"))
        end = threading.Timer(40, owner.rollback)
        end.start()
        with pytest.raises(DBAPIError):  # and isn't done once the owner is
            steward._give_rest_back(desk)
        end.cancel()
        owner.rollback()
    assert not hand.take(claims[1].id)  # its horse gives the rest back
    assert set(place.states().values()) == {"Started"}
