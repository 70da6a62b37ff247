"""What a producer claims and sends, and what is sent anew; with a Redis of Python's."""

from __future__ import annotations

import time
from itertools import groupby

import fakeredis
import pytest

from conformance.places import Events, Place, claim, finish, start
from nih_sched import producer as producer_
from nih_sched import reconciler
from nih_sched.producer import Producer
from nih_sched.reconciler import Reconciler
from nih_sched.settings import Settings
from nih_sched.store import Claims, Looks, claims


@pytest.mark.usefixtures("events")
def test_who_is_hungry_eats_first_and_only_its_jobs_are_split(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (claims, producer_):
        monkeypatch.setattr(module, "TAKEN", 5)
    place.jobs(*["Pending"] * 40)
    settings = Settings(database_url=place.url, batch_size=5, max_concurrent_jobs=2)
    one = Producer(settings, place.desk(), fakeredis.FakeStrictRedis())

    def jobs() -> list[int]:
        return [len(list(its)) for _, its in groupby(rq_id for (rq_id,) in place.attempts("rq_id"))]

    one.tick()
    assert jobs() == [3, 2, 5]
    one.tick()  # none of them was taken
    assert jobs() == [3, 2, 5, 5, 5]
    for _ in range(9):
        one.tick()
    assert jobs() == [3, 2, *[5] * 6]  # four for each worker


def test_what_redis_may_have_lost_is_looked_for_once_it_is_back(
    place: Place, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    for name, value in {"EVERY": 0.0, "UNCARRIED_AFTER": 0.0, "SHARE": 1e9, "LONGEST": 1e9}.items():
        monkeypatch.setattr(reconciler, name, value)
    place.jobs("Pending")
    desk = place.desk()
    one = Reconciler(desk, fakeredis.FakeStrictRedis(), "one")
    one.tick()
    claim(desk)
    one.tick()
    assert "sent_again" not in dict(events)
    one.doubt_redis()
    one.tick()
    assert "sent_again" in dict(events)


def test_where_a_look_takes_long_what_stands_nowhere_is_soon_looked_for_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    now = 1000.0
    monkeypatch.setattr(reconciler.clock, "boot", lambda: now)
    monkeypatch.setattr(reconciler, "SHARE", 1e9)
    place.jobs("Pending")
    desk = place.desk()
    one = Reconciler(desk, fakeredis.FakeStrictRedis(), "one")
    look = one._look_for_uncarried

    def long_look() -> set[str]:
        nonlocal now
        now += 0.5
        return look()

    monkeypatch.setattr(one, "_look_for_uncarried", long_look)
    one.tick()
    claim(desk)
    while now < 1000.0 + reconciler.LONGEST + 5:
        one.tick()
        now += 0.5
    assert "sent_again" in dict(events)


def test_how_long_rows_run_is_known_while_they_do(place: Place) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk()
    its = claim(desk)
    done, runs, waits = (one.id for one in its)
    start(desk, *its[:2])
    finish(desk, its[0], seconds=0.2)
    looks, ids = Looks(desk), [done, runs, waits]
    soon = looks.progress(ids)
    assert (soon[done], soon[runs].runs, soon[waits]) == ((False, 0.2), True, (False, None))
    time.sleep(0.05)
    Claims(desk, "", 0).give_back([waits])
    later = looks.progress(ids)
    assert set(later) == {done, runs}
    assert soon[runs].seconds + 0.04 <= later[runs].seconds < soon[runs].seconds + 60
