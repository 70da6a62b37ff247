"""What is said of a source and of its rows, each on every kind of database."""

from __future__ import annotations

import contextlib
import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from conformance.places import (
    Place,
    claim,
    due_for,
    failed,
    finish,
    leases_of,
    next_attempt,
    only,
    run_once,
    start,
    take,
)
from nih_sched import reports, steer
from nih_sched.dialects import After
from nih_sched.errors import NoSuchRow, UsageError
from nih_sched.model import Key, Outcome
from nih_sched.reports import words
from nih_sched.store import Desk
from nih_sched.store.history import History
from nih_sched.store.horizon import Horizon
from nih_sched.store.listing import Listing
from nih_sched.store.overview import Count, Counts, Overview
from nih_sched.store.pruning import Pruning
from nih_sched.store.selection import Selection
from nih_sched.store.tally import Tally

NOWHERE = "redis://127.0.0.1:1/0"


def why(desk: Desk, key: Any, redis_url: str | None = NOWHERE, **facts: Any) -> str:
    """The sentence without its `Row 7: `."""
    key = key if isinstance(key, tuple) else (key,)
    return reports.why(desk, key, redis_url, **facts).sentence.partition(": ")[2]


def keys(listed: reports.Listed) -> list[Any]:
    return [row.key[0] if len(row.key) == 1 else row.key for row in listed.rows]


def fit(desk: Desk, limit: int = 100, *, after: Key | None = None, descending: bool = False, **asked: Any) -> Any:
    return keys(reports.rows(desk, reports.select(desk, **asked), limit, after=after, descending=descending))


def test_why_of_rows_that_have_ended(place: Place) -> None:
    place.jobs("Pending", "Pending", "Done", "Failed", "Cancelled", "Draft")
    desk = place.desk(tries=0)
    run_once(desk, seconds=1.5)
    run_once(desk, Outcome.FAILED, reason="ValueError: no\nsecond line", final=True)
    assert why(desk, 1).startswith("Done at ")
    assert " in 1.5 s, by attempt 1 on worker." in why(desk, 1)
    assert why(desk, 2).startswith("Failed for good at ")
    assert why(desk, 2).endswith(" UTC after attempt 1 of 4, with ValueError: no.")
    assert why(desk, 3) == "Done, and not by us: the ledger has no attempt of it that was done."
    assert why(desk, 4) == "Failed, and not by us: the ledger has no attempt of it that failed."
    assert why(desk, 5) == "Cancelled by its owner: `scheduler requeue` makes it ready again."
    assert why(desk, 6) == "not ready: its state is 'Draft', and only 'Pending' is run."
    with pytest.raises(NoSuchRow, match="no row with the key 99"):
        why(desk, 99)


def test_why_of_rows_on_their_way(place: Place) -> None:
    place.jobs(*["Pending"] * 5)
    desk = place.desk()
    take(desk, "living", "dying", "gone")
    one, two, three, four = claim(desk, 4)
    start(desk, one, lease="living")
    start(desk, two, run="other", lease="dying")
    start(desk, three, run="third", lease="gone")
    leases_of(desk).release("gone")
    assert why(desk, 1).startswith("running for ")
    assert why(desk, 1).endswith(" on worker, attempt 1 of 4.")
    leases_of(desk).end("dying", "its process is gone")
    assert why(desk, 2) == (
        "its worker worker is dead (its process is gone): it moves again as soon as a producer rescues it."
    )
    assert "is gone: it moves again as soon as a producer rescues it" in why(desk, 3)
    place.set(1, "Cancelled")
    assert why(desk, 1) == "cancelled; it still runs on worker, attempt 1 of 4, and is being stopped."
    place.set(1, "Pending")
    assert why(desk, 1).startswith("ready again, while it still runs on worker for ")
    assert "claimed" in why(desk, 4)
    assert "Redis is unreachable" in why(desk, 4)
    place.run("DELETE FROM nih_sched_attempts WHERE id = :i", i=four.id)
    assert why(desk, 4) == (
        "Queued, but with no open claim behind it, so nobody will run it. Type: scheduler doctor --fix."
    )


def test_why_of_retries(place: Place, redis_url: str) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk(delay=3600.0)
    (one,) = claim(desk, 1)
    (row,) = start(desk, one)
    finish(desk, row.claim, Outcome.FAILED, reason="ValueError: bad")
    said = why(desk, 1, redis_url)
    assert said.startswith("retry 1 of 3 at ")
    assert "after ValueError: bad" in said
    due_for(desk, one, 61)
    assert "retry 1 of 3 overdue for 1 min 1 s after ValueError: bad" in why(desk, 1, redis_url)
    assert why(desk, 1).startswith("Redis is unreachable")
    assert why(desk, 1).endswith("; then retry 1 of 3 is sent.")
    statement = update(desk.ledger.sources).values(redis_lost_at=After(-86400.0))
    desk.transact(lambda c: c.execute(statement))
    assert "Redis is unreachable since 20" in why(desk, 1)


def test_why_of_ready_rows(place: Place, redis_url: str) -> None:
    place.jobs(*["Pending"] * 12)
    desk = place.desk(where="id <> 3")
    assert why(desk, 3, where="id <> 3") == "ready, but left out by --where 'id <> 3'."
    assert why(desk, 4).startswith("ready, but Redis is unreachable (")
    assert why(desk, 4, None) == ("ready, but no scheduler runs on this machine, and no Redis is named by --redis-url.")
    assert why(desk, 4, redis_url) == "ready, but no producer and no worker of its source is up. Type: scheduler run."
    steer.pause(desk, "ann", "a deploy")
    assert why(desk, 4).startswith(f"waiting, because source {desk.source.name} is paused by ann since ")
    assert why(desk, 4).endswith(": a deploy.")
    assert why(desk, 3, where="id <> 3").startswith("ready, but left out")


def test_a_composite_key_is_found(place: Place) -> None:
    place.run("CREATE TABLE jobs (id integer, lang varchar(5), state varchar(20), PRIMARY KEY (id, lang))")
    for number in (1, 2, 3):
        for lang in ("de", "en"):
            place.run("INSERT INTO jobs VALUES (:i, :l, 'Pending')", i=number, l=lang)
    desk = place.desk(tries=0)
    run_once(desk, Outcome.FAILED, reason="gone: 429", final=True)
    assert why(desk, (1, "de")).startswith("Failed for good at ")
    assert fit(desk, state="failed", where="error LIKE '%429%' AND lang = 'de'") == [(1, "de")]
    found = reports.rows(desk, Selection(), 4)
    assert keys(found) == [(1, "de"), (1, "en"), (2, "de"), (2, "en")]
    assert found.next == (2, "en")
    assert keys(reports.rows(desk, Selection(), 4, after=found.next)) == [(3, "de"), (3, "en")]
    assert fit(desk, after=(2, "en"), descending=True) == [(2, "de"), (1, "en"), (1, "de")]


def test_show_has_each_attempt_with_everything(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(tries=1)
    (one,) = claim(desk, 1, tries=1)
    (row,) = start(desk, one, run="first")
    finish(desk, row.claim, Outcome.FAILED, run="first", reason="R1", traceback="T1", error="V at a.py:1 in f")
    again = next_attempt(desk, one, "second")
    finish(
        desk, again, Outcome.FAILED, run="second", reason="R2", traceback="T2", error="V at a.py:2 in f", seconds=0.2
    )
    found = reports.show(desk, (1,))
    assert found.state == "failed"
    assert [(a.record.attempt, a.texts.traceback, a.record.error) for a in found.attempts] == [
        (2, "T2", "V at a.py:2 in f"),
        (1, "T1", "V at a.py:1 in f"),
    ]
    assert found.attempts[0].heading == f"attempt 2 of 2, claim {one.id}: failed after 0.2 s"
    assert dict(found.attempts[0].facts())["reason"] == "R2"
    text = json.dumps(found.as_json())
    assert json.loads(text)["attempts"][1]["traceback"] == "T1"
    with pytest.raises(NoSuchRow):
        reports.show(desk, (2,))


def test_two_tables_of_one_ledger_share_no_history(place: Place) -> None:
    place.jobs("Pending", "Pending")
    place.run("CREATE TABLE others (id int PRIMARY KEY, state varchar(20))")
    place.run("INSERT INTO others VALUES (1, 'Pending')")
    desk, other = place.desk(tries=0), place.desk(table="others", tries=0)
    (one,) = claim(other, 1, tries=0)
    start(other, one)
    assert reports.show(desk, (1,)).attempts == ()
    assert why(desk, 1, None).startswith("ready, but ")
    assert why(other, 1).startswith("running for ")
    finish(other, one, Outcome.FAILED, reason="theirs", error="A at x:1 in f")
    place.run("UPDATE jobs SET state = 'Failed' WHERE id = 1")
    assert [group.error for group in reports.groups(desk).groups] == ["not by us"]
    assert (fit(desk, since=3600.0), fit(desk, text="theirs"), fit(desk, error="A at x:1 in f")) == ([], [], [])
    assert (fit(other, since=3600.0), fit(other, text="theirs"), fit(other, error="A at x:1 in f")) == ([1], [1], [1])
    (row,) = reports.rows(desk, reports.select(desk, state="failed"), 5).rows
    assert (row.attempts, row.outcome, row.error) == (0, None, None)
    narrow = place.desk(where="id = 2")  # another source of the same table: its claims are of the same rows
    (two,) = claim(narrow, 1)
    assert [one.record.claim for one in reports.show(desk, (2,)).attempts] == [two.id]


def test_list_by_state_where_text_and_time(place: Place) -> None:
    place.jobs(*["Pending"] * 4, "Draft", "Done")
    desk = place.desk(tries=0)
    for reason in ("HTTPError: 429", "HTTPError: 500"):
        (one,) = claim(desk, 1, tries=0)
        start(desk, one)
        finish(desk, one, Outcome.FAILED, reason=reason, error=f"HTTPError at a.py:{reason[-3:]} in f")
    assert fit(desk, state="failed") == [1, 2]
    assert fit(desk, state="Draft") == [5]
    assert fit(desk, state="failed", where="error LIKE '%429%'") == [1]
    assert fit(desk, where="id > 4 -- all of them") == [5, 6]
    assert fit(desk, where="error IS NULL") == [3, 4, 5, 6]
    assert fit(desk, since=3600.0) == [1, 2]
    attempts = desk.ledger.attempts
    old = {name: After(-7200.0) for name in ("claimed_at", "started_at", "finished_at")}
    desk.transact(lambda c: c.execute(update(attempts).where(attempts.c.id == 1).values(old)))
    assert fit(desk, since=3600.0) == [2]
    assert fit(desk, text="http") == [1, 2]
    assert fit(desk, text="N5") == [5]
    assert fit(desk, error="HTTPError at a.py:500 in f") == [2]
    assert fit(desk, limit=2, descending=True) == [6, 5]
    (row,) = reports.rows(desk, reports.select(desk, text="429"), 5).rows
    assert (row.state, row.word, row.attempts, row.outcome, row.error) == (
        "failed",
        "Failed",
        1,
        "failed",
        "HTTPError: 429",
    )
    assert row.values["name"] == "n1"
    assert list(reports.keys(desk, reports.select(desk, state="failed"))) == [(1,), (2,)]


def test_rows_that_wait_for_a_retry_are_told_from_queued_ones_of_the_same_word(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk(delay=3600.0)
    failed(desk)
    claim(desk, 1)
    assert place.states() == {1: "Queued", 2: "Queued"}
    assert (fit(desk, state="retrying"), fit(desk, state="queued")) == ([1], [2])
    assert reports.status(desk, NOWHERE).retries.count == 1


def test_a_persons_sql_can_only_read_and_only_for_a_while(place: Place) -> None:
    place.jobs("Pending", "Done")
    desk = place.desk()
    for sql in ("nonsense here", "no_such_column = 1", "id IN (SELECT"):
        with pytest.raises(UsageError, match="can't be used"):
            fit(desk, where=sql)
    with desk.dialect.looking(desk.engine, 1.0) as connection, pytest.raises(Exception, match=r"(?i)read.?only"):
        connection.exec_driver_sql("UPDATE jobs SET state = 'Done'")
    place.set(1, "Draft")  # the connection that was read-only writes again
    desk.transact(lambda c: c.exec_driver_sql("UPDATE jobs SET name = 'x' WHERE id = 1"))


@only("sqlite", "postgresql", "mariadb")
def test_what_takes_too_long_stops_and_says_how_far_it_came(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Pending"] * 9)
    desk = place.desk()
    monkeypatch.setattr("nih_sched.store.listing.PAGE", 2)
    listing, clock = Listing(desk), iter(range(100))
    monkeypatch.setattr("nih_sched.store.listing.clock.monotonic", lambda: float(next(clock)))
    page = listing.page(Selection(text="n"), 100, seconds=5.0)
    assert page.was_cut
    assert page.stopped == page.rows[-1].key
    assert 0 < len(page.rows) < 9
    found = reports.rows(desk, Selection(text="nothing"), 100)
    assert not found.rows
    assert "Stopped" in found.sentence
    assert found.as_json()["complete"] is False


def test_a_walk_in_steps_finds_what_a_statement_would(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Pending", "Done", "Draft"] * 7)
    desk = place.desk()
    monkeypatch.setattr("nih_sched.store.listing.SCANNED", 2)
    monkeypatch.setattr("nih_sched.store.listing.MOST", 4)
    monkeypatch.setattr("nih_sched.store.listing.SOON", -1.0)
    monkeypatch.setattr("nih_sched.store.listing.AT_ONCE", -1.0)
    real, calls = Listing._run, []

    def first_is_overdue(self: Listing, query: Any, seconds: float, **how: Any) -> Any:
        calls.append(seconds)
        if seconds < 0:
            raise _overdue(desk)
        return real(self, query, seconds, **how)

    monkeypatch.setattr(Listing, "_run", first_is_overdue)
    assert fit(desk, state="Done") == [2, 5, 8, 11, 14, 17, 20]
    assert fit(desk, state="Done", descending=True) == [20, 17, 14, 11, 8, 5, 2]
    assert len(calls) > 10
    monkeypatch.setattr("nih_sched.store.listing.KEYS", 3)
    monkeypatch.setattr("nih_sched.store.listing.PAGE", 2)
    assert fit(desk, state="Done", text="n") == [2, 5, 8, 11, 14, 17, 20]
    assert fit(desk, 3, state="Done", text="n", after=(5,)) == [8, 11, 14]
    assert fit(desk, state="Done", where="error IS NULL", descending=True) == [20, 17, 14, 11, 8, 5, 2]
    monkeypatch.setattr("nih_sched.store.listing.AT_ONCE", 5.0)  # whatever other way the database has
    assert fit(desk, state="Done", descending=True) == [20, 17, 14, 11, 8, 5, 2]
    assert fit(desk, state="Done", where="id > 8") == [11, 14, 17, 20]


def test_rows_of_a_time_that_are_sparse_are_found_by_the_ledger(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Pending"] * 9)
    desk = place.desk(tries=0)
    for number in range(9):
        run_once(desk, Outcome.FAILED if number % 2 else Outcome.DONE, reason="why", final=True)
    attempts = desk.ledger.attempts
    old = {name: After(-7200.0) for name in ("claimed_at", "started_at", "finished_at")}
    desk.transact(lambda c: c.execute(update(attempts).where(attempts.c.id.not_in([2, 5, 8])).values(old)))
    for name in ("SPARSE", "SPARSE_OF_STATE"):
        monkeypatch.setattr(f"nih_sched.store.listing.{name}", -1.0)  # it is as if the walk had found nothing for long
    monkeypatch.setattr("nih_sched.store.history.STEP", 2)
    assert fit(desk, since=3600.0) == [2, 5, 8]
    assert fit(desk, since=3600.0, descending=True) == [8, 5, 2]
    assert fit(desk, since=3600.0, after=(2,)) == [5, 8]
    assert fit(desk, since=3600.0, state="failed", text="WHY", where="id > 2") == [8]
    assert fit(desk, since=1e-6) == []
    two = reports.rows(desk, reports.select(desk, since=3600.0), 2)
    assert (keys(two), two.next, two.was_cut) == ([2, 5], (5,), False)
    monkeypatch.setattr("nih_sched.store.listing.FEW", 2)  # more than the ledger is asked for
    assert fit(desk, since=3600.0) == [2, 5, 8]


def test_rows_of_a_time_are_found_behind_what_had_ended_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Pending"] * 9)
    desk = place.desk(tries=0)
    monkeypatch.setattr("nih_sched.store.horizon.EVERY", -1.0)
    for _ in range(2):
        run_once(desk)
    held = claim(desk, 1)[0]  # row 3, which ends late
    for _ in range(2):
        run_once(desk)
    horizon = Horizon(desk)
    horizon.note()
    now = History(desk).now()
    assert horizon.below(now + timedelta(hours=1)) is None  # at its first look it can't know what isn't committed yet
    run_once(desk)
    horizon.note()
    horizon.note()  # in the same minute: that of the first stands
    assert horizon.below(now + timedelta(hours=1)) == held.id
    assert horizon.below(now) is None
    assert desk.source.name not in Tally(desk).totals()  # it is no count
    attempts, counts = desk.ledger.attempts, desk.ledger.counts
    old = {name: After(-7200.0) for name in ("claimed_at", "started_at", "finished_at")}
    desk.transact(lambda c: c.execute(update(attempts).where(attempts.c.open_key.is_(None)).values(old)))
    desk.transact(lambda c: c.execute(update(attempts).values(claimed_at=After(-7200.0))))
    desk.transact(lambda c: c.execute(update(counts).values(minute=counts.c.minute - 90)))
    finish(desk, start(desk, held, run="late")[0].claim, Outcome.DONE, run="late")
    run_once(desk)
    asked: list[int | None] = []
    lately = History.lately

    def noted(self: History, *what: Any, first: int | None = None, **how: Any) -> Any:
        asked.append(first)
        return lately(self, *what, first=first, **how)

    monkeypatch.setattr(History, "lately", noted)
    monkeypatch.setattr(Listing, "stretches", lambda *_, **how: pytest.fail("the table was walked"))
    monkeypatch.setattr("nih_sched.store.history.STEP", 2)
    monkeypatch.setattr("nih_sched.store.listing.AT_ONCE", 20.0)  # however busy the machine is
    monkeypatch.setattr("nih_sched.store.listing.SPARSE", 20.0)
    assert fit(desk, since=3600.0) == [3, 7]
    assert fit(desk, since=3600.0, descending=True, state="done") == [7, 3]
    assert set(asked) == {held.id}
    desk.transact(lambda c: c.execute(update(counts).values(minute=counts.c.minute - 5000)))
    Pruning(desk, 86400.0, 86400.0).fold()
    assert place.run("SELECT minute, value FROM nih_sched_counts") == [(0, 0.0)]
    assert horizon.below(now) is None  # folded together, they would say what nobody has seen


def test_what_has_ended_is_noted_to_its_end_though_nothing_moves_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs("Pending", "Pending", "Pending")
    desk = place.desk(tries=3)
    monkeypatch.setattr("nih_sched.store.horizon.EVERY", -1.0)
    run_once(desk)
    soon = History(desk).now() + timedelta(hours=1)

    def noted(horizon: Horizon) -> int | None:
        place.run("DELETE FROM nih_sched_counts")
        horizon.note()
        return horizon.below(soon)

    horizon = Horizon(desk)
    assert [noted(horizon) for _ in range(3)] == [None, 2, None]  # that is all
    horizon.moved()
    assert [noted(horizon) for _ in range(2)] == [2, None]
    run_once(desk, Outcome.FAILED, reason="why")  # its record is copied, under an id of its own
    (claimed,) = (row[0] for row in place.run("SELECT max(id) FROM nih_sched_attempts WHERE of_claim IS NULL"))
    horizon.moved()
    assert [noted(horizon) for _ in range(3)] == [2, claimed, claimed]  # it is open, and what may come is looked for
    # Whoever begins to note when all is old, as a scheduler that was started anew, needn't wait.
    assert noted(Horizon(desk)) is None
    attempts = desk.ledger.attempts
    desk.transact(lambda c: c.execute(update(attempts).values(claimed_at=After(-200.0))))
    assert noted(Horizon(desk)) == claimed


def test_failures_are_grouped_as_far_as_there_is_time_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Failed", "Done"] * 9)
    desk = place.desk()
    monkeypatch.setattr("nih_sched.store.listing.PAGE", 4)
    now, real = [0.0], History.briefs

    def slowly(self: History, keys: Any, *only: Any) -> Any:
        now[0] += 5
        return real(self, keys, *only)

    monkeypatch.setattr(History, "briefs", slowly)
    monkeypatch.setattr("nih_sched.store.listing.clock.monotonic", lambda: now[0])
    found = reports.groups(desk, 9.0)
    assert (found.looked_at, found.was_cut, found.stopped) == (8, True, (3,))
    assert [(one.error, one.count) for one in found.groups] == [("not by us", 8)]
    assert found.sentence == "Of the newest 8 failed rows alone, down to key 3: 9 s were over."
    assert found.as_json()["complete"] is False
    found = reports.groups(desk, 500.0)
    assert (found.looked_at, found.was_cut, found.stopped, found.sentence) == (9, False, None, "")


def _overdue(desk: Desk) -> Exception:
    """What the database raises for a statement that takes too long."""
    slow = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
        "postgresql": "SELECT pg_sleep(9)",
        "mysql": "SELECT count(*) FROM information_schema.columns a, information_schema.columns b, "
        "information_schema.columns c",
    }[desk.dialect.name]
    with pytest.raises(Exception) as raised, desk.dialect.looking(desk.engine, 0.05) as connection:
        connection.exec_driver_sql(slow).all()
    assert desk.dialect.is_overdue(raised.value)  # type: ignore[arg-type]
    return raised.value


def test_failures_are_grouped_by_kind_and_place(place: Place) -> None:
    place.jobs(*["Pending"] * 5, "Failed")
    desk = place.desk(tries=0)
    claims = claim(desk, 5, tries=0)
    start(desk, *claims)
    for one, error in zip(
        claims, ["A at x:1 in f", "A at x:1 in f", "B at y:2 in g", "A at x:1 in f", None], strict=True
    ):
        finish(desk, one, Outcome.FAILED if error else Outcome.CRASHED, reason=f"why {one.id}, 7 MB", error=error)
    found = reports.groups(desk)
    counts = {group.error: group.count for group in found.groups}
    assert counts == {"A at x:1 in f": 3, "B at y:2 in g": 1, f"crashed: why {claims[4].id}": 1, "not by us": 1}
    assert found.groups[0].keys == ["4", "2", "1"]
    assert found.groups[0].newest is not None
    assert found.sentence == ""
    assert fit(desk, state="failed", error="A at x:1 in f") == [1, 2, 4]
    # Older versions wrote neither kind nor place; a class's own name may hold line ends; interruptions fail a row too.
    change = "UPDATE nih_sched_attempts SET outcome = :outcome, error = :error WHERE id = :id"
    for claimed, outcome in zip(claims, ("timed out", "crashed", "lost", "interrupted", "failed"), strict=True):
        odd = "A\r\n b\tat x" if outcome == "failed" else None
        place.run(change, id=claimed.id, outcome=outcome, error=odd)
    place.run("UPDATE jobs SET state = 'Failed'")
    groups = reports.groups(desk).groups
    assert sorted(group.error for group in groups) == [
        *("A b at x", "crashed", "interrupted", "lost", "not by us", "timed out")
    ]
    for group in groups:
        assert len(fit(desk, state="failed", error=group.error)) == group.count == 1
        chosen = reports.keys(desk, reports.select(desk, state="failed", error=group.error))
        assert steer.requeue(desk, chosen, "ada").changed == 1
    assert reports.groups(desk).groups == ()
    json.dumps(found.as_json())


def test_status_counts_times_and_names(place: Place) -> None:
    place.run("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), name varchar(100), added timestamp NULL)")
    for number in range(1, 9):
        place.run("INSERT INTO jobs VALUES (:i, 'Pending', 'n', CURRENT_TIMESTAMP)", i=number)
    desk = place.desk(tries=0)
    leases = take(desk, "living")
    run_once(desk, seconds=0.5)
    run_once(desk, Outcome.FAILED, reason="ValueError: x", final=True)
    one, _ = claim(desk, 2)
    start(desk, one, lease="living")
    found = reports.status(desk, NOWHERE, created="added")
    counts = {str(one.word): str(one.count) for one in found.states}
    assert counts == {"Pending": "4", "Queued": "1", "Started": "1", "Done": "1", "Failed": "1", "Cancelled": "0"}
    assert (found.ready.rows, found.claimed, found.unclaimed, found.oldest_key) == (4, 1, 0, "5")
    assert found.oldest_age is not None
    assert -1.5 < found.oldest_age < 60
    assert found.done_rate == pytest.approx(1 / 60)
    assert found.run.of == 2
    (failure,) = found.failures
    assert (failure.key, failure.reason) == ("2", "ValueError: x")
    workers = {worker.name: worker.sentence.partition(" for ")[0] for worker in found.workers}
    assert workers == {"worker of living": "idle", "worker": "runs row 3"}
    assert not found.redis.answers
    text = json.loads(json.dumps(found.as_json(), default=str))
    assert text["oldest_ready"]["key"] == "5"
    leases.release("living")


def test_running_rows_that_are_too_many_to_name_are_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Pending"] * 5, "Started")
    desk = place.desk()
    start(desk, *claim(desk))
    real = Overview.running
    monkeypatch.setattr(Overview, "running", lambda self: real(self, 2))
    monkeypatch.setattr("nih_sched.reports.overall.NAMED", 2)
    found = reports.status(desk, NOWHERE)
    assert sum(len(worker.runs) for worker in found.workers) == 2
    assert found.unclaimed == 1  # the one that nobody has claimed


def test_large_tables_are_counted_as_far_as_there_is_time_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.jobs(*["Done"] * 9, "Failed", "Pending")
    desk = place.desk()
    monkeypatch.setattr("nih_sched.store.overview.STEP", 3)
    monkeypatch.setattr("nih_sched.store.overview.WALK", 30.0)
    assert Overview(desk)._newest_by_word() == Counts({"Pending": 1, "Failed": 1, "Done": 9}, whole=True)
    monkeypatch.setattr("nih_sched.store.overview.WALK", 0.0)
    monkeypatch.setattr(Overview, "by_word", lambda self: self._newest_by_word())
    found = reports.status(desk, NOWHERE)
    assert {str(one.count) for one in found.states} == {"0+", "1"}
    claim(desk, 1)  # what is on its way is in the ledger
    assert {str(one.word): str(one.count) for one in reports.status(desk, NOWHERE).states} == {
        **dict.fromkeys(["Started", "Done", "Failed", "Cancelled"], "0+"),
        "Pending": "0",
        "Queued": "1+",
    }


def test_what_was_counted_of_a_large_table_is_not_said_to_be_less(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs(*["Pending"] * 3)
    desk = place.desk(retrying_val="Retrying")
    leases = take(desk, "living")
    one, _ = claim(desk, 2)
    start(desk, one, lease="living")
    monkeypatch.setattr(Overview, "by_word", lambda self: Counts({"Pending": 25, "Odd": 1}, whole=False))
    monkeypatch.setattr(Overview, "ready", lambda self, **how: Count(0, more=True))  # there was no time at all
    found = reports.status(desk, NOWHERE)
    assert {one.word: str(one.count) for one in found.states} == {
        **dict.fromkeys(["Done", "Failed", "Cancelled"], "0+"),
        "Pending": "25+",
        "Started": "1+",
        **dict.fromkeys(["Queued", "Retrying"], "0+"),  # of a claim's row the ledger doesn't know which of both it is
        "Odd": "1+",
    }
    leases.release("living")


@pytest.mark.parametrize("where", [None, "id <> 4000"])
def test_of_a_large_table_a_part_is_read_where_the_database_can(
    place: Place, monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    place.run("CREATE TABLE jobs (id integer PRIMARY KEY, state varchar(20), filler char(200))")
    number = {
        "postgresql": "SELECT n FROM generate_series(1, 4000) AS s(n)",
        "mariadb": "SELECT seq AS n FROM seq_1_to_4000",
        "sqlite": "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 4000) SELECT n FROM s",
    }[place.name]
    word = "CASE WHEN n % 10 = 0 THEN 'odd' WHEN n > 3998 THEN 'Pending' ELSE 'Done' END"
    place.run(f"INSERT INTO jobs SELECT n, {word}, 'x' FROM ({number}) numbers")
    place.run("INSERT INTO jobs VALUES (5000, 'Pending', 'x'), (5001, 'Pending', 'x')")
    place.run("ANALYZE TABLE jobs" if place.name == "mariadb" else "ANALYZE")
    monkeypatch.setattr("nih_sched.dialects.postgresql.LARGE", 3000)
    monkeypatch.setattr("nih_sched.dialects.postgresql.SAMPLE", 40)  # pages, of 120
    monkeypatch.setattr("nih_sched.store.overview.AT_ONCE", 20.0)
    desk = place.desk(where=where)
    claim(desk, 1)
    found = reports.status(desk, NOWHERE)
    counts = {one.word: one.count for one in found.states}
    reads_all = place.name != "postgresql"
    assert counts["Done"].about is counts["odd"].about is not reads_all
    assert counts["Done"].rows == 3599 if reads_all else 2500 < counts["Done"].rows < 4700
    assert str(counts["odd"]).startswith("400" if reads_all else "about ")
    assert str(counts["Queued"]) == ("1" if reads_all else "1+")  # the ledger knows of it
    assert str(counts["Pending"]) == "2"
    assert found.unclaimed == (0 if reads_all else None)
    json.dumps(found.as_json(), default=str)


def test_ready_rows_that_take_long_to_count_are_not_said_to_be_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.jobs(*["Pending"] * 5, "Done")
    desk = place.desk()
    slow, looking = _overdue(desk), type(desk.dialect).looking
    patient = [0.05]  # whoever asks for more time than that doesn't get it

    @contextlib.contextmanager
    def impatient(self: Any, engine: Any, seconds: float) -> Any:
        if patient[0] < seconds < 0.15:
            raise slow
        with looking(self, engine, seconds) as connection:
            yield connection

    monkeypatch.setattr("nih_sched.store.overview.STEP", 3)
    monkeypatch.setattr("nih_sched.store.overview.AT_ONCE", 20.0)
    monkeypatch.setattr(type(desk.dialect), "looking", impatient)
    assert str(Overview(desk).ready(seconds=0.1)) == "3+"
    found = reports.status(desk, NOWHERE)
    assert (found.ready.rows, found.ready.more) == (5, False)  # as all rows were counted
    desk = place.desk(where="id > 0")
    assert str(reports.status(desk, NOWHERE).ready) == "3+"
    patient[0] = 0.0
    assert str(Overview(desk).ready(seconds=0.1)) == "0+"


def test_instants_are_said_in_utc_with_the_date_only_where_it_is_not_todays(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    run_once(desk)
    now = reports.show(desk, (1,)).attempts[0].now
    assert words.instant(now, now) == f"{now:%H:%M:%S} UTC"
    assert words.instant(now - timedelta(days=2), now).startswith(f"{now - timedelta(days=2):%Y-%m-%d} ")
