"""Pause, resume, requeue and cancel, as table and ledger see them."""

from __future__ import annotations

import pytest

from conformance.places import Events, Place, claim, failed, finish, only, ready, run_once, start
from nih_sched import reports, steer
from nih_sched.errors import CantCancel, ChunkRefused, NoSuchRow, NoSuchSource, UsageError
from nih_sched.model import Outcome
from nih_sched.runner.cancelling import TICK, Watch
from nih_sched.runner.hand import new_hand
from nih_sched.store import Attempts, Claims, Looks, Retries
from nih_sched.store.cancels import Cancels
from nih_sched.store.pauses import Pauses
from nih_sched.store.rows import parse_key
from nih_sched.worker.rq_worker import LOOK

PICKY = (
    "CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(100), "
    "CHECK (id <> {} OR state <> 'Pending'))"
)


def test_while_a_source_is_paused_none_of_its_rows_is_claimed_or_starts_and_running_ones_end(
    place: Place, events: Events
) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    running, waiting = claim(desk, 2)
    start(desk, running)
    assert steer.pause(desk, "ada@here", "a vendor is down") == [desk.source.name]
    # One that was on its way while the pause was made.
    place.run("UPDATE nih_sched_sources SET paused_at = NULL")
    late = claim(desk, 1)
    place.run("UPDATE nih_sched_sources SET paused_at = updated_at")
    assert place.states() == {1: "Started", 2: "Queued", 3: "Pending"}
    assert late[0].key == (2,)
    assert late[0].id != waiting.id  # the first one was given back at once
    assert start(desk, *late) == []
    assert claim(desk) == []
    assert Looks(desk).ready_up_to(10) == 0
    assert ready(desk) == 1  # all the same: for those who count
    assert finish(desk, running)[0] is not None
    assert steer.pause(desk, "bob", "me too") == []
    assert place.states() == {1: "Done", 2: "Pending", 3: "Pending"}
    (pause,) = Pauses(desk).all()
    assert (pause.source, pause.by, pause.reason) == (desk.source.name, "ada@here", "a vendor is down")
    assert Pauses(place.desk()).of(desk.source.name) == pause  # a restart changes nothing
    assert steer.resume(desk, "ada") == [desk.source.name]
    assert steer.resume(desk, "ada") == []
    assert len(start(desk, *claim(desk), run="again")) == 2
    told = [(event, facts["by"]) for event, facts in events if event in ("paused", "resumed")]
    assert told == [("paused", "ada@here"), ("resumed", "ada")]


def test_begun_rows_that_their_owner_cancels_or_deletes_before_their_turn_are_known(place: Place) -> None:
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    claims = claim(desk)
    assert len(start(desk, *claims)) == 5
    assert Cancels(desk).unwanted(claims) == set()
    place.set(2, "Cancelled")
    place.run("DELETE FROM jobs WHERE id = 3")
    place.set(4, "Pending")
    place.run("UPDATE jobs SET state = NULL WHERE id = 5")
    assert Cancels(desk).unwanted(claims) == {claims[1].id, claims[2].id}
    same_word = place.desk(cancelled_val="Started")
    assert Cancels(same_word).unwanted(claims) == {claims[2].id}


@only("sqlite")
@pytest.mark.usefixtures("hand")
@pytest.mark.parametrize("tick", [TICK, LOOK])
def test_whenever_a_cancel_comes_there_is_time_left_to_end_the_rows_processes(
    place: Place, monkeypatch: pytest.MonkeyPatch, tick: float
) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (row,) = start(desk, *claim(desk))
    now = 0.0
    monkeypatch.setattr("nih_sched.runner.cancelling.clock.monotonic", lambda: now)
    monkeypatch.setattr("nih_sched.runner.cancelling.os.kill", lambda pid, number: None)  # the horse is deaf
    waits = []
    for phase in range(10):
        place.set(1, "Started")
        new_hand().take(row.claim.id)
        watch, now, cancelled = Watch(), 0.0, 1.01 + phase / 5
        while not (watch.is_due(row.claim.id) and watch.look(desk, 1)):
            before, now = now, now + tick
            if before < cancelled <= now:
                place.set(1, "Cancelled")
        waits.append(now - cancelled)
    assert 2.5 < max(waits) < 4.0  # of the 5 that are promised


def test_a_pause_holds_retries_and_the_rest_of_a_batch_too(place: Place) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk()
    failed(desk)
    first, second = claim(desk, tries=0)
    run = Attempts(desk, "run", "worker")
    assert len(run.start([first.id], [])) == 1
    Pauses(desk).pause([desk.source.name], "ada", None)
    assert run.start([second.id], []) == []
    assert start(desk, *(due.claim for due in Retries(desk).due(10)), run="retry") == []
    assert Looks(desk).around(rows=True).due is None
    assert len(Claims(desk, "", 0).give_all_back()) == 1
    assert place.states() == {1: "Queued", 2: "Started", 3: "Pending"}
    Pauses(desk).resume([desk.source.name])
    assert len(start(desk, *(due.claim for due in Retries(desk).due(10)), run="retry")) == 1


def test_other_sources_are_paused_by_name_or_all_together(place: Place) -> None:
    place.jobs("Pending", "New")
    one, other = place.desk(), place.desk(ready_val="New")
    claim(other)
    assert steer.pause(one, "ada", source=other.source.name) == [other.source.name]
    assert place.states() == {1: "Pending", 2: "New"}
    assert len(claim(one)) == 1
    assert steer.pause(one, "ada", source="all") == [one.source.name]
    assert steer.resume(one, "ada", source="all") == sorted([one.source.name, other.source.name])
    with pytest.raises(NoSuchSource, match=f"There is no source nonesuch. There are: .*{other.source.name}"):
        steer.pause(one, "ada", source="nonesuch")


def test_requeue_sets_ended_rows_back_to_ready_with_all_their_tries(place: Place, events: Events) -> None:
    place.jobs("Pending", "Cancelled", "Done", "Mine", "Pending")
    desk = place.desk()
    run_once(desk, Outcome.FAILED, final=True)
    result = steer.requeue(desk, [(i,) for i in (1, 2, 3, 4, 5, 99)], "ada")
    assert (result.changed, result.unfit, result.absent) == (3, 2, 1)
    assert result.left == [((4,), "Mine"), ((5,), "Pending")]
    assert result.missing == [(99,)]
    assert place.states() == {1: "Pending", 2: "Pending", 3: "Pending", 4: "Mine", 5: "Pending"}
    again = claim(desk)[0]
    assert (again.key, again.failures, again.tries) == ((1,), 0, 3)
    assert [facts for event, facts in events if event == "requeued"] == [{"by": "ada", "count": 3, "keys": "1, 2, 3"}]


def test_cancel_ends_claims_that_have_not_begun_and_leaves_running_ones_to_their_workers(
    place: Place, events: Events
) -> None:
    place.jobs("Pending", "Pending", "Pending", "Done")
    desk = place.desk()
    running, queued = claim(desk, 2)
    start(desk, running)
    result = steer.cancel(desk, [(1,), (2,), (3,), (4,)], "ada")
    assert (result.changed, result.running, result.unfit) == (3, 1, 1)
    assert place.states() == {1: "Cancelled", 2: "Cancelled", 3: "Cancelled", 4: "Done"}
    assert place.attempts("outcome", "reason", "open_key IS NULL") == [
        (None, None, False),
        ("cancelled", "cancelled by ada", True),
    ]
    assert start(desk, queued) == []
    assert claim(desk) == []
    finish(desk, running, Outcome.CANCELLED, reason="stopped")
    assert place.attempts("outcome")[0] == ("cancelled",)
    assert place.states()[1] == "Cancelled"
    assert [(f["count"], f["running"]) for event, f in events if event == "cancelled_rows"] == [(3, 1)]
    assert steer.requeue(desk, [(1,)], "ada").changed == 1
    assert [one.key for one in claim(desk)] == [(1,)]


def test_a_waiting_retry_is_cancelled_with_its_claim(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    (one,) = failed(desk)
    assert steer.cancel(desk, [one.key], "ada").changed == 1
    assert place.attempts("outcome")[-2:] == [("cancelled",), ("failed",)]
    assert Retries(desk).due(10) == []
    assert place.states() == {1: "Cancelled"}


def test_a_chunk_that_the_database_refuses_is_changed_in_none_of_its_rows(place: Place) -> None:
    place.jobs(*["Failed"] * 5, create=PICKY.format(4))
    desk = place.desk()
    with pytest.raises(ChunkRefused, match="a chunk of 5 rows, 0 rows were changed before"):
        steer.requeue(desk, [(i,) for i in range(1, 6)], "ada")
    assert set(place.states().values()) == {"Failed"}


@only("sqlite")
def test_more_rows_than_a_chunk_are_changed_chunk_by_chunk(place: Place, events: Events) -> None:
    place.jobs(create=PICKY.format(2500))
    place.run("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2600)"
              " INSERT INTO jobs SELECT i, 'Failed', '' FROM n")  # fmt: skip
    desk = place.desk()
    with pytest.raises(ChunkRefused, match="600 rows, 2000 rows were changed before"):
        steer.requeue(desk, ((i,) for i in range(1, 2601)), "ada")
    assert place.run("SELECT count(*) FROM jobs WHERE state = 'Pending'") == [(2000,)]
    assert [facts["count"] for event, facts in events if event == "requeued"] == [1000, 1000]


@only("sqlite")
def test_a_cancelled_word_that_is_also_that_of_a_row_on_its_way_cancels_none(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(cancelled_val="Started")
    with pytest.raises(CantCancel, match="'Started' is also that of a started row"):
        steer.cancel(desk, [(1,)], "ada")
    assert place.states() == {1: "Pending"}


@only("sqlite")
def test_keys_are_read_as_they_are_shown(place: Place) -> None:
    place.jobs(create="CREATE TABLE jobs (a integer, b varchar(20), state varchar(20), PRIMARY KEY (a, b))")
    desk = place.desk()
    assert parse_key(desk, "7,x y") == (7, "x y")
    for wrong in ("7", "x,y", "1,2,3"):
        with pytest.raises(UsageError, match=r"is no key of main.jobs"):
            parse_key(desk, wrong)


@pytest.mark.parametrize("kind", ["smallint", "integer", "bigint", "varchar(50)"])
def test_a_key_beyond_its_column_is_of_no_row(place: Place, kind: str) -> None:
    place.jobs(create=f"CREATE TABLE jobs (id {kind} PRIMARY KEY, state varchar(20))")
    desk = place.desk()
    edges = [sign * (1 << bits) + beside for bits in (15, 31, 63, 64) for sign in (1, -1) for beside in (-1, 0, 1)]
    for text in (*map(str, edges), "9" * 40, "-" + "9" * 40, "9" * 4000, "0"):
        with pytest.raises(NoSuchRow, match="has no row with the key"):
            reports.show(desk, parse_key(desk, text))
        with pytest.raises(NoSuchRow):
            reports.why(desk, parse_key(desk, text), None)
    for text in ("a\0b", "a\ud800", "x" * 100_000, "", "'", "%", "\n"):
        with pytest.raises(UsageError):  # no key at all, or of no row
            reports.show(desk, parse_key(desk, text))
    for word in ("a\0b", "a\ud800", "x" * 1000, "9" * 40):
        with pytest.raises(UsageError, match="is no state"):
            reports.select(desk, state=word)


def test_sql_by_which_rows_are_chosen_can_change_nothing(place: Place) -> None:
    place.jobs("Failed")
    desk = place.desk()
    writes = "EXISTS (WITH gone AS (DELETE FROM jobs RETURNING id) SELECT 1 FROM gone)"
    for sql in ("1 = 1); DELETE FROM jobs; --", "1 = 1); COMMIT; DELETE FROM jobs; --", writes):
        with pytest.raises(UsageError):
            list(reports.keys(desk, reports.select(desk, state="failed", where=sql)))
    assert place.states() == {1: "Failed"}
    assert steer.requeue(desk, reports.keys(desk, reports.select(desk, state="failed")), "ada").changed == 1


@only("sqlite")
def test_rows_are_found_and_changed_beyond_a_page(place: Place) -> None:
    place.jobs()
    place.run("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2600)"
              " INSERT INTO jobs SELECT i, 'Failed', '' FROM n")  # fmt: skip
    desk = place.desk()
    assert steer.requeue(desk, reports.keys(desk, reports.select(desk, state="failed")), "ada").changed == 2600
