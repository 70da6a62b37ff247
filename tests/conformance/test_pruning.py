"""Old history is forgotten, and nothing else is."""

from __future__ import annotations

import pytest
from sqlalchemy import insert, update

from conformance.places import Place, claim, finish, next_attempt, run_once, start
from nih_sched.dialects import After
from nih_sched.model import Outcome
from nih_sched.reconciler.pruner import Pruner
from nih_sched.store import Desk
from nih_sched.store.history import History
from nih_sched.store.pruning import MINUTES, Pruning

DAY = 86400.0


def aged(desk: Desk, days: float, *claim_ids: int) -> None:
    """Have these claims, with all that they were, be so old."""
    c = desk.ledger.attempts.c
    old = {"claimed_at": After(-days * DAY)}
    these = c.id.in_(claim_ids) | c.of_claim.in_(claim_ids)
    desk.transact(lambda x: x.execute(update(desk.ledger.attempts).where(these).values(old)))
    ended = these & c.finished_at.is_not(None)
    old = {"finished_at": After(-days * DAY)}
    desk.transact(lambda x: x.execute(update(desk.ledger.attempts).where(ended).values(old)))


def prune(desk: Desk, done: float, others: float, *, everywhere: bool = False) -> int:
    """A whole round; how many records it forgot."""
    pruning, count, after = Pruning(desk, done, others, everywhere=everywhere), 0, 0
    while True:
        pruned = pruning.chunk(after)
        count += pruned.records
        if pruned.last is None:
            return count
        after = pruned.last


def left(place: Place) -> list[int]:
    return [claim_id for (claim_id,) in place.attempts("id")]


def test_each_outcome_is_kept_for_its_time_and_open_claims_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nih_sched.store.pruning.CHUNK", 2)
    place.jobs(*["Pending"] * 8)
    desk = place.desk(tries=0)
    running, waiting, _ = claim(desk, 3, tries=1)  # 1, 2, 3
    start(desk, running)
    start(desk, waiting, run="w")
    finish(desk, waiting, Outcome.FAILED, run="w")  # 4 is its first attempt
    for outcome in (Outcome.FAILED, Outcome.FAILED, Outcome.DONE, Outcome.DONE, Outcome.DONE):
        run_once(desk, outcome, final=True)  # 5 to 9
    its = dict(enumerate(left(place), 1))  # MariaDB leaves out some numbers
    aged(desk, 41, its[1], its[2], its[3])
    aged(desk, 40, its[5])
    aged(desk, 2, its[6], its[7])
    aged(desk, 0.5, its[8])
    rows = place.states()
    assert prune(desk, DAY, 30 * DAY) == 2
    assert left(place) == [its[n] for n in (1, 2, 3, 4, 6, 8, 9)]
    assert prune(desk, 0.0, 30 * DAY) == 1  # what has just ended is kept for a minute
    assert left(place) == [its[n] for n in (1, 2, 3, 4, 6, 9)]
    assert place.states() == rows


def test_a_claim_is_forgotten_with_all_its_attempts(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk(tries=2)
    (one,) = claim(desk, 1)
    start(desk, one, run="first")
    finish(desk, one, Outcome.FAILED, run="first")
    run_once(desk)
    again = next_attempt(desk, one, "second")
    finish(desk, again, run="second")
    aged(desk, 0.5, one.id)
    assert prune(desk, DAY, 0.0) == 0  # it is done: that it failed before doesn't count
    aged(desk, 2, one.id)
    assert prune(desk, DAY, 30 * DAY) == 2
    assert len(left(place)) == 1


def test_what_the_rows_next_claim_must_know_of_is_kept(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    run_once(desk, Outcome.INTERRUPTED)
    aged(desk, 99, 1)
    assert prune(desk, DAY, DAY) == 0
    run_once(desk)
    assert prune(desk, DAY, DAY) == 1


def test_a_producer_forgets_what_is_its_sources_alone(place: Place) -> None:
    place.jobs("Pending", "Neu")
    one, two = place.desk(), place.desk(ready_val="Neu")
    run_once(one)
    run_once(two)
    aged(one, 2, 1, 2)
    assert prune(one, DAY, DAY) == 1
    assert left(place) == [2]
    assert prune(one, DAY, DAY, everywhere=True) == 1


def test_old_counts_are_folded_and_none_is_lost(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nih_sched.store.pruning.FOLDS", 3)
    place.jobs()
    desk = place.desk()
    minute = int(History(desk).now().timestamp()) // 60
    counts = [(minute - MINUTES - n, name) for n in (1, 2, 3) for name in ("done", "failed")]
    counts += [(0, "done"), (minute, "done"), (minute - 60, "failed")]
    source = desk.source.name
    values = [{"source": source, "minute": m, "name": n, "value": 10.0} for m, n in counts]
    values += [{"source": "another", "minute": 5, "name": "done", "value": 1.0}]
    desk.transact(lambda x: x.execute(insert(desk.ledger.counts), values))
    pruner = Pruner(desk, DAY, DAY)
    pruner._next = 0.0
    pruner.turn()
    found = place.run("SELECT source, minute, name, value FROM nih_sched_counts ORDER BY source, minute, name")
    assert sorted(found) == sorted(
        [
            ("another", 5, "done", 1.0),
            (source, 0, "done", 40.0),
            (source, 0, "failed", 30.0),
            (source, minute - 60, "failed", 10.0),
            (source, minute, "done", 10.0),
        ]
    )
