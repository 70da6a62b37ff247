"""What is counted is added up, whoever counts beside us, and told to Prometheus."""

from __future__ import annotations

import os
import re
from datetime import timedelta

import pytest

from conformance.places import Place, claim, run_once, start, together
from nih_sched import reports, telemetry
from nih_sched.metrics import Counting, adding_up, count_here
from nih_sched.metrics.counting import _Adding
from nih_sched.metrics.exposition import exposition
from nih_sched.store.history import History
from nih_sched.store.horizon import Horizon
from nih_sched.store.tally import Tally


def samples(text: bytes) -> dict[str, float]:
    """Each sample of an exposition by its name and labels, without the source."""
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    named = (re.sub(r'\{source="[^"]*"\}|source="[^"]*",?|,?source="[^"]*"', "", line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in named)}


def test_counts_grow_by_what_several_add_at_once(place: Place) -> None:
    place.jobs("Pending")
    desks = [place.desk() for _ in range(3)]

    def add(desk: object) -> None:
        for _ in range(20):
            Tally(desk).add({"done": 2, "failed": 1})  # type: ignore[arg-type]

    together(*(lambda desk=desk: add(desk) for desk in desks))  # type: ignore[misc]
    hour = reports.hour(desks[0])
    assert len(hour.minutes) == 60
    assert [sum(getattr(one, name) for one in hour.minutes) for name in ("done", "failed")] == [120, 60]
    assert Tally(desks[0]).totals() == {desks[0].source.name: {"done": 120.0, "failed": 60.0}}


def test_waiting_times_are_looked_at_once(place: Place) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    for _ in range(2):
        run_once(desk)
    seen, waits = Tally(desk).waits(0)
    assert len(waits) == 2
    assert all(0 <= wait < 60 for wait in waits)
    assert Tally(desk).waits(seen) == (seen, [])
    run_once(desk)
    assert len(Tally(desk).waits(seen)[1]) == 1


def test_metrics_say_what_was_counted_and_what_is(place: Place) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    (first,) = claim(desk, 1)
    start(desk, first, run="run")
    Tally(desk).add({"done": 3, "run_le_0.5": 2, "run_le_1": 1, "run_sum": 1.5})
    found = samples(exposition(desk, lambda: None, None))
    assert found["nih_sched_done_total"] == 3
    assert found["nih_sched_failed_total"] == 0
    assert found['nih_sched_run_seconds_bucket{le="0.5"}'] == 2
    assert found['nih_sched_run_seconds_bucket{le="+Inf"}'] == found["nih_sched_run_seconds_count"] == 3
    assert (found["nih_sched_ready_rows"], found["nih_sched_running_rows"]) == (2, 1)


def test_an_idle_scheduler_notes_what_has_ended_until_that_is_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs("Pending")
    desk = place.desk()
    run_once(desk)
    monkeypatch.setattr("nih_sched.store.horizon.EVERY", -1.0)
    soon = History(desk).now() + timedelta(hours=1)
    counting = count_here()
    try:
        adding = _Adding(counting, desk, dict)

        def noted() -> int | None:
            place.run("DELETE FROM nih_sched_counts")
            adding.add()
            return Horizon(desk).below(soon)

        assert [noted() for _ in range(3)] == [None, 2, None]
        telemetry.emit("claimed", count=1)
        assert [noted() for _ in range(2)] == [2, None]
    finally:
        counting.close()


def test_events_of_a_process_and_its_children_are_added_up(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    counting = count_here()
    try:
        pid = os.fork()
        if pid == 0:
            telemetry.emit("done_together", count=10, seconds=0.05)
            os._exit(0)
        os.waitpid(pid, 0)
        with adding_up(counting, desk):
            telemetry.emit("claimed", count=7)
            telemetry.emit("failed", key="1", attempt=1, outcome="failed", seconds=2.0, reason="x", claim_id=1)
        ((_, counts),) = Tally(desk).totals().items()
    finally:
        counting.close()
    assert (counts["claimed"], counts["done"], counts["failed"]) == (7, 10, 1)
    assert (counts["run_le_0.01"], counts["run_le_5"]) == (10, 1)
    telemetry.emit("claimed", count=7)  # the pipe is closed: nobody writes into a file that has got its number


def test_what_the_database_does_not_take_is_added_later(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    counting = count_here()
    try:
        telemetry.emit("claimed", count=7)
        place.run("ALTER TABLE nih_sched_counts RENAME TO away")
        adding = _Adding(counting, desk, dict)
        adding.add()
        place.run("ALTER TABLE away RENAME TO nih_sched_counts")
        telemetry.emit("claimed", count=1)
        adding.add()
    finally:
        counting.close()
    assert Tally(desk).totals() == {desk.source.name: {"claimed": 8.0}}


def test_a_full_pipe_loses_counts_and_stops_nobody() -> None:
    counting = Counting()
    for _ in range(20_000):
        counting("claimed", {"count": 1})
    taken = counting.take()["claimed"]
    counting.close()
    assert 1000 < taken < 20_000
