"""How long a producer waits until its next look, by the time since it had something to do."""

from __future__ import annotations

from typing import Any

import pytest

from nih_sched import clock, pace
from nih_sched.pace import Pace, Tick
from nih_sched.settings import Settings
from nih_sched.store import Seen
from nih_sched.wake import Sign

NOTHING = Seen(ready=False, moving=False, due=None, paused=False)


class Looks:
    """An idle table's."""

    def around(self, *, rows: bool) -> Seen:
        return NOTHING

    def ready_up_to(self, limit: int) -> int:
        return 0


class Wake:
    """Notes what is waited for; nothing tells of new rows."""

    hears_database = False

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def wait(self, seconds: float, quiet: float, *, brisk: bool) -> Sign:
        self.pauses.append(seconds)
        return Sign.TIME


@pytest.mark.parametrize(
    ("since", "pause"), [(0.02, 0.007), (0.4, 0.008), (1.0, 0.02), (4.0, 0.08), (4.99, 0.0998), (5.01, 9.0)]
)
def test_the_longer_nothing_has_come_the_more_rarely_it_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, since: float, pause: float
) -> None:
    now = 1000.0
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    looks: Any = Looks()
    wake: Any = Wake()
    its = Pace(Settings(poll_interval=9.0), looks, by_time=False)
    its.after(Tick(claimed=1, sent=0, room=8), 9.0, may_be_over=False)
    its.wait(wake)  # while that one moves
    its.after(Tick(claimed=0, sent=0, room=8), 9.0, may_be_over=False)
    assert not its.moving
    now += since
    its.ticked(9.0)
    its.wait(wake)
    assert wake.pauses[-1] == pytest.approx(pause)
    assert pace.LATELY == 5.0


def test_a_ready_row_that_is_locked_is_looked_at_soon() -> None:
    looks: Any = Looks()
    looks.around = lambda rows: Seen(ready=True, moving=False, due=None, paused=False)
    its = Pace(Settings(poll_interval=9.0), looks, by_time=False)
    assert its.after(Tick(claimed=0, sent=0, room=8), 9.0, may_be_over=False) == pace.LOCKED_WAIT
