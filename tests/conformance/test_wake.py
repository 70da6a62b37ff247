"""What an idle producer asks, what wakes it, and what its reconciler does meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import fakeredis
import pytest
from servers import eventually
from sqlalchemy import event, select, text

from conformance.places import Events, Place, claim, failed, finish, leases_of, only, start, take
from nih_sched import clock, reconciler
from nih_sched.dialects import listen
from nih_sched.dialects.watch import Watch
from nih_sched.model import Outcome
from nih_sched.pace import BUSY_WAIT, GLANCE
from nih_sched.producer import Producer
from nih_sched.reconciler import Reconciler
from nih_sched.settings import Settings
from nih_sched.store import Attempts, Desk, Looks, Seen
from nih_sched.store.pauses import Pauses
from nih_sched.wake import Doorbell, Sign, Wake

NOTHING = Seen(ready=False, moving=False, paused=False, due=None)


def around(desk: Desk, *, rows: bool = True) -> Seen:
    return Looks(desk).around(rows=rows)


# The look


def test_a_look_sees_what_there_is_to_do(place: Place) -> None:
    place.jobs()
    desk, other = place.desk(delay=100.0), place.desk(ready_val="Other")
    assert around(desk) == NOTHING
    place.run("INSERT INTO jobs (id, state) VALUES (1, 'Pending')")
    assert around(desk) == replace(NOTHING, ready=True)
    assert around(desk, rows=False) == NOTHING
    (one,) = claim(desk)
    assert around(desk) == replace(NOTHING, moving=True)
    assert around(other) == NOTHING
    (row,) = start(desk, one)
    assert around(desk, rows=False) == replace(NOTHING, moving=True)
    finish(desk, row.claim, Outcome.FAILED)
    seen = around(desk)
    assert (seen.ready, seen.moving) == (False, False)
    assert seen.due == pytest.approx(100.0, abs=30)
    place.set(1, "Pending")
    assert around(desk).ready


def scans(place: Place, desk: Desk) -> list[tuple[Any, ...]]:
    """How often PostgreSQL has read each table in whole, what this desk has asked included."""
    desk.read(lambda connection: connection.execute(text("SELECT pg_stat_force_next_flush()")))
    return place.run("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname LIKE '%s' ORDER BY 1")


@only("postgresql")
def test_looks_need_the_index_alone_whatever_the_database_believes(place: Place) -> None:
    place.jobs(*["Pending"] * 5000)
    desk = place.desk()
    rows = desk.rows
    desk.dialect.recommended_index(rows.table, rows.status, "Pending", rows.keys).create(place.engine)
    place.run("ANALYZE jobs")  # all ready
    claims = claim(desk, 5000, few=0)
    place.run("ANALYZE nih_sched_attempts")  # all open
    place.run("UPDATE jobs SET state = CASE WHEN id = 5000 THEN 'Pending' ELSE 'Done' END")
    place.run("UPDATE nih_sched_attempts SET open_key = NULL WHERE id > :first", first=claims[1].id)
    looks, before = Looks(desk), scans(place, desk)
    assert around(desk) == replace(NOTHING, ready=True, moving=True)
    assert (looks.ready_up_to(1), looks.ready_up_to(100)) == (1, 1)
    assert (looks.open_claims_up_to(1), looks.open_claims_up_to(9)) == (1, 2)
    assert looks.open_claims_up_to(9, "producer") == 2
    assert scans(place, desk) == before


@only("postgresql")
def test_looks_need_no_analyzed_ledger(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    ended = "'x', 's', 1, 0, 0, 'me', now() FROM generate_series(1, 50000)"
    facts = "row_key, source, attempt, failures, tries, claimed_by, claimed_at"
    place.run(f"INSERT INTO nih_sched_attempts ({facts}) SELECT {ended}")
    before = scans(place, desk)
    assert around(desk) == NOTHING
    assert scans(place, desk)[1:] == before[1:]  # of an empty table it reads all


def test_a_look_sees_its_own_next_retry_behind_those_of_others(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nih_sched.store.looks.HEADS", 2)
    place.jobs(*["Other"] * 3, "Pending")
    desk, other = place.desk(delay=500.0), place.desk(ready_val="Other", delay=100.0)
    for its, many in ((other, 3), (desk, 1)):
        failed(its, many)
    assert around(desk).due == pytest.approx(500.0, abs=30)
    assert around(other).due == pytest.approx(100.0, abs=30)
    Pauses(desk).pause([desk.source.name], "me", None)
    assert around(desk).due is None


def test_a_look_keeps_to_where(place: Place) -> None:
    place.jobs("Pending", "Pending")
    assert around(place.desk(where="id > 2 -- two")) == NOTHING
    assert around(place.desk(where="id > 1")).ready


def test_a_look_at_a_paused_source_sees_what_moves_alone(place: Place) -> None:
    place.jobs("Pending", "Pending")
    desk = place.desk()
    claim(desk, 1)
    Pauses(desk).pause([desk.source.name], "me", None)
    assert around(desk) == replace(NOTHING, moving=True, paused=True)


def test_what_is_due_is_seen(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk(delay=0.0)
    failed(desk)
    seen = eventually(lambda: (seen := around(desk)).due == 0.0 and seen)
    assert not seen.moving


# The idle loop


class Noted(Wake):
    """Notes what each turn asked of the database, and stops after some."""

    def __init__(self, stop: clock.Bell, watch: Watch, turns: int) -> None:
        super().__init__(stop, watch, Doorbell(fakeredis.FakeStrictRedis(), "nobody"))
        self.asked: list[list[str]] = []
        self.said: list[str] = []
        self.pauses: list[float] = []
        self.quiets: list[float] = []
        self._bell, self._turns = stop, turns

    def tend(self) -> None:
        pass

    def wait(self, seconds: float, quiet: float = 0.0, *, brisk: bool = False) -> Sign:
        self.asked.append(self.said.copy())
        self.said.clear()
        self.pauses.append(seconds)
        self.quiets.append(quiet)
        if len(self.asked) == self._turns:
            self._bell.ring()
        self.rest(min(max(0.0, seconds), 0.1))
        return Sign.TIME


class Told(Watch):
    """Says that it would tell."""

    live = True


class Nobody:
    """Rescues nothing, as there is nothing."""

    def tick(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def doubt_redis(self) -> None:
        pass


def idle_turns(place: Place, watch: Watch, **settings: Any) -> Noted:
    """A producer of an empty table, after some turns."""
    desk = place.desk(**settings)
    producer = Producer(Settings(database_url=place.url, **settings), desk, fakeredis.FakeStrictRedis())
    wake = Noted(clock.Bell(), watch, turns=6)
    event.listen(desk.engine, "before_cursor_execute", lambda c, cursor, sql, *rest: wake.said.append(sql))
    assert producer.loop(wake, Nobody()) is None
    wake.close()
    return wake


def test_an_idle_look_is_one_statement(place: Place) -> None:
    place.jobs()
    wake = idle_turns(place, Watch(), poll_interval=0.05)
    assert [len(asked) for asked in wake.asked[1:]] == [1] * 5
    assert all("jobs" in asked[0] for asked in wake.asked[1:])
    assert max(wake.pauses) <= 0.05


def test_it_is_quiet_for_a_while_after_a_tick_and_not_after_each_glance(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nih_sched.pace.OPEN_WAIT", 30.0)
    place.jobs("Pending")
    wake = idle_turns(place, Watch(), poll_interval=30.0)
    assert max(wake.pauses) <= GLANCE
    assert 0 < wake.quiets[0] <= BUSY_WAIT
    assert max(wake.quiets[2:]) <= 0  # a bell that rings now is heard at once


def test_a_table_is_looked_at_less_often_while_something_tells(place: Place) -> None:
    place.jobs()
    assert min(idle_turns(place, Told(), poll_interval=0.05).pauses[:1]) > 4
    assert max(idle_turns(place, Told(), poll_interval=0.05, where="id > 0").pauses) <= 0.05


def test_between_polls_the_ledger_alone_is_looked_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nih_sched.pace.LEDGER_WAIT", 0.05)
    place.jobs()
    wake = idle_turns(place, Watch(), poll_interval=30.0)
    assert [len(asked) for asked in wake.asked[1:]] == [1] * 5
    assert not any(" jobs" in asked[0] for asked in wake.asked[1:])


@pytest.mark.usefixtures("events")
def test_a_row_that_its_owner_has_locked_is_looked_at_again(place: Place) -> None:
    if place.name == "sqlite":
        pytest.skip("knows no locked rows")
    place.jobs("Pending")
    place.desk()
    with place.engine.connect() as owner, owner.begin():
        owner.execute(text("SELECT id FROM jobs FOR UPDATE")).all()
        wake = idle_turns(place, Told(), poll_interval=0.05)
    assert max(wake.pauses) <= 0.05


def test_a_burst_ends_at_once_though_its_last_row_ended_between_two_looks(place: Place) -> None:
    place.jobs("Pending")
    desk = place.desk()
    settings = Settings(database_url=place.url, burst=True, poll_interval=0.05)
    producer = Producer(settings, desk, fakeredis.FakeStrictRedis())
    (row,) = start(desk, *claim(desk))
    look, wake = producer.looks.around, Noted(clock.Bell(), Told(), turns=6)

    def after_its_end(*, rows: bool) -> Seen:
        finish(desk, row.claim)
        return look(rows=rows)

    producer.looks.around = after_its_end  # type: ignore[method-assign]
    ended = producer.loop(wake, Nobody())
    wake.close()
    assert ended == {"done": 1}
    assert max(wake.pauses) <= 0.1


@pytest.mark.usefixtures("events")
def test_nor_is_the_end_of_max_rows_put_off_when_that_happens_while_its_source_is_paused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nih_sched.producer.PAUSE_EVERY", 0.0)
    place.jobs("Pending")
    desk = place.desk()
    producer = Producer(Settings(database_url=place.url, max_rows=1), desk, fakeredis.FakeStrictRedis())
    assert producer.tick().claimed == 1
    ((claim_id,),) = place.attempts("id")
    (row,) = Attempts(desk, "run", "worker").start([claim_id], ())
    Pauses(desk).pause([desk.source.name], "me", None)
    tick = producer.tick()
    assert not producer.is_over(tick)
    finish(desk, row.claim)
    assert producer.pause_after(tick, 5.0) <= 0.1
    assert producer.is_over(producer.tick())


# The reconciler at rest


@pytest.fixture
def resting(place: Place, monkeypatch: pytest.MonkeyPatch, events: Events) -> tuple[Desk, Reconciler]:
    monkeypatch.setattr(reconciler, "LINGER", 0.0)
    monkeypatch.setattr(reconciler, "EVERY", 0.0)
    monkeypatch.setattr(reconciler, "REST_EVERY", 0.0)
    place.jobs()
    desk = place.desk()
    return desk, Reconciler(desk, fakeredis.FakeStrictRedis(), "one")


def leads(desk: Desk) -> str | None:
    sources = desk.ledger.sources
    query = select(sources.c.leader).where(sources.c.name == desk.source.name)
    found: str | None = desk.read(lambda connection: connection.execute(query).scalar())
    return found


def test_who_has_nothing_to_look_after_lets_another_lead(resting: tuple[Desk, Reconciler], events: Events) -> None:
    desk, one = resting
    two = Reconciler(desk, fakeredis.FakeStrictRedis(), "two")
    one.tick()
    two.tick()
    assert '"one"' in str(leads(desk))
    one.rest()
    assert leads(desk) is None
    two.tick()
    assert '"two"' in str(leads(desk))
    two.rest()
    two.tick()
    assert [name for name, _ in events].count("leading") == 2  # that two leads again is no news


def test_the_watch_goes_on_for_a_while(place: Place) -> None:
    place.jobs()
    desk = place.desk()
    one = Reconciler(desk, fakeredis.FakeStrictRedis(), "one")
    one.tick()
    one.rest()
    assert '"one"' in str(leads(desk))
    one.close()
    assert leads(desk) is None


def test_dead_leases_are_forgotten_at_rest(resting: tuple[Desk, Reconciler]) -> None:
    desk, one = resting
    leases = take(desk, "alive", "dead")
    one.rest()
    assert leases.end("dead", "its worker died")
    one.rest()
    assert [lease.id for lease in leases_of(desk).all()] == ["alive"]
    one.rest()
    assert leads(desk) is None


def test_leases_that_stand_still_are_ended_at_rest(
    resting: tuple[Desk, Reconciler], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, one = resting
    leases = take(desk, "renewed", "lost", seconds=120.0)
    now = clock.boot()
    for after in range(0, 140, 10):
        monkeypatch.setattr(clock, "boot", lambda instant=now + after: instant)
        leases.renew(["renewed"], 120.0)
        one.rest()
    assert [lease.id for lease in leases_of(desk).all()] == ["renewed"]


# The databases' own ways


def watched(place: Place) -> tuple[Desk, Watch]:
    place.jobs("Done")
    desk = place.desk()
    return desk, desk.watch()


@only("mariadb")
def test_nothing_tells_where_nothing_can(place: Place) -> None:
    desk, watch = watched(place)
    watch.tend()
    place.set(1, "Pending")
    assert (watch.live, watch.fileno(), watch.every, watch.rung()) == (False, None, None, False)
    assert desk.dialect.notify_ddl(desk.rows.table, desk.rows.status, "Pending", None) == []


def make_triggers(desk: Desk) -> None:
    for statement in desk.dialect.notify_ddl(desk.rows.table, desk.rows.status, "Pending", None):
        desk.transact(lambda connection, sql=statement: connection.execute(text(sql)))


@only("postgresql")
def test_a_listener_needs_triggers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "LOOK_AGAIN", 0.0)
    desk, watch = watched(place)
    watch.tend()
    assert (watch.fileno(), watch.live) == (None, False)
    make_triggers(desk)
    watch.tend()
    assert watch.fileno() is not None
    eventually(watch.rung)
    assert watch.live
    place.set(1, "Queued")
    assert not watch.rung()
    place.set(1, "Pending")
    eventually(watch.rung)
    place.run("ALTER TABLE jobs DISABLE TRIGGER USER")
    watch.tend()
    assert (watch.fileno(), watch.live) == (None, False)


@only("postgresql")
def test_a_listener_that_hears_nothing_of_itself_gives_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind PgBouncer in transaction mode."""
    monkeypatch.setattr(listen, "PROOF", 0.0)
    desk, watch = watched(place)
    make_triggers(desk)
    watch.tend()
    assert watch.fileno() is not None
    watch.tend()
    assert (watch.fileno(), watch.live) == (None, False)
    watch.tend()
    assert watch.fileno() is None


@only("postgresql")
def test_a_lost_listener_says_so_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "FIRST_WAIT", 0.0)
    desk, watch = watched(place)
    make_triggers(desk)
    watch.tend()
    eventually(watch.rung)
    place.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    eventually(watch.rung)
    assert (watch.live, watch.rung()) == (False, False)
    watch.tend()
    eventually(watch.rung)
    assert watch.live
    watch.close()


@only("sqlite")
def test_a_commit_of_another_connection_tells(place: Place) -> None:
    _, watch = watched(place)
    watch.tend()
    watch.rung()
    threading.Timer(0.05, lambda: place.set(1, "Pending")).start()
    eventually(watch.rung, every=0.005)
    assert watch.live
    watch.close()
