"""The producer's wait, with watches and doorbells made of pipes."""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy import Column, Integer, MetaData, String, Table

from nih_sched import clock
from nih_sched.dialects import connect
from nih_sched.dialects.data_version import BRISK, CALM, JUST_AFTER, TOLD, DataVersion
from nih_sched.dialects.file_events import FileEvents
from nih_sched.dialects.postgresql import PostgreSQL
from nih_sched.dialects.watch import Watch, channel_of
from nih_sched.wake import Doorbell, Sign, Wake, channel

LONG = 30.0  # seconds that no test may wait


class Piped(Watch):
    """Tells of what was written to its pipe."""

    def __init__(self, *, sure: bool = True) -> None:
        self.sure = sure
        self.ears, self.mouth = os.pipe()

    def fileno(self) -> int | None:
        return self.ears

    def rung(self) -> bool:
        return bool(os.read(self.ears, 100).strip(b"."))  # full stops are nothing to tell of

    def say(self, text: bytes = b"!") -> None:
        os.write(self.mouth, text)

    def close(self) -> None:
        os.close(self.ears)
        os.close(self.mouth)


class Counted(Watch):
    """Has no file descriptor, and tells at the fifth look."""

    every = 0.001
    sure = False
    looks = 0

    def rung(self) -> bool:
        self.looks += 1
        return self.looks == 5


class Deaf(Doorbell):
    """A doorbell that nobody hung."""

    def __init__(self) -> None:
        super().__init__(redis.Redis(), "none")

    def tend(self) -> None:
        pass


@pytest.fixture
def stop() -> clock.Bell:
    return clock.Bell()


@pytest.fixture
def watch() -> Piped:
    return Piped()


@pytest.fixture
def wake(stop: clock.Bell, watch: Piped) -> Iterator[Wake]:
    made = Wake(stop, watch, Deaf())
    yield made
    made.close()


def test_a_wait_ends_with_its_time(wake: Wake) -> None:
    began = time.monotonic()
    assert wake.wait(0.05) is Sign.TIME
    assert time.monotonic() - began >= 0.05
    assert wake.wait(-1.0) is Sign.TIME
    assert not wake.stopped


def test_a_wait_ends_when_something_tells(wake: Wake, watch: Piped) -> None:
    watch.say()
    assert wake.wait(LONG) is Sign.RING
    threading.Timer(0.05, watch.say).start()
    assert wake.wait(LONG) is Sign.RING
    watch.sure = False
    watch.say()
    assert wake.wait(LONG) is Sign.CHANGE


def test_what_is_nothing_to_tell_of_ends_no_wait(wake: Wake, watch: Piped) -> None:
    watch.say(b".")
    assert wake.wait(0.05) is Sign.TIME


def test_what_comes_while_it_is_quiet_is_heard_afterwards(wake: Wake, watch: Piped) -> None:
    watch.say()
    began = time.monotonic()
    assert wake.wait(LONG, quiet=0.1) is Sign.RING
    assert time.monotonic() - began >= 0.1


def test_what_comes_in_a_wait_that_is_quiet_to_its_end_is_heard(wake: Wake, watch: Piped) -> None:
    watch.say()
    assert wake.wait(0.02, quiet=0.05) is Sign.RING


@pytest.mark.parametrize("quiet", [0.0, LONG])
def test_a_stop_ends_each_wait(wake: Wake, stop: clock.Bell, quiet: float) -> None:
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: stop.ring())
    try:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
        began = time.monotonic()
        wake.wait(LONG, quiet)
        assert wake.stopped
        wake.wait(LONG, quiet)
        assert time.monotonic() - began < LONG / 2
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_stop_before_the_beginning_ends_the_first_wait(stop: clock.Bell) -> None:
    stop.ring()
    wake = Wake(stop, Watch(), Deaf())
    began = time.monotonic()
    wake.wait(LONG)
    assert time.monotonic() - began < LONG / 2
    wake.close()


def test_a_watch_without_a_file_descriptor_is_looked_at(stop: clock.Bell) -> None:
    watch = Counted()
    wake = Wake(stop, watch, Deaf())
    assert wake.wait(LONG) is Sign.CHANGE
    assert watch.looks == 5
    wake.close()


def test_data_version_tells_of_others_commits_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as owner:
        owner.execute("PRAGMA journal_mode = WAL")
        owner.execute("CREATE TABLE t (a)")
    engine = connect(f"sqlite:///{path}")
    watch = DataVersion(engine)
    assert (watch.rung(), watch.live, watch.every) == (False, False, None)
    watch.tend()
    assert watch.live
    assert watch.rung()  # what came before it was there
    assert not watch.rung()
    owner.execute("INSERT INTO t VALUES (1)")
    assert not watch.rung()
    owner.commit()
    assert watch.rung()
    assert not watch.rung()
    owner.execute("SELECT * FROM t").fetchall()
    assert not watch.rung()
    owner.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert os.path.getsize(f"{path}-wal") == 0  # it keeps no view of the file
    watch.close()
    assert not watch.live
    engine.dispose()
    owner.close()


def test_data_version_waits_for_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    owner = sqlite3.connect(path, isolation_level=None)
    owner.execute("CREATE TABLE t (a)")
    engine = connect(f"sqlite:///{path}")
    watch = DataVersion(engine)
    watch.tend()
    watch.rung()
    owner.execute("BEGIN EXCLUSIVE")
    owner.execute("INSERT INTO t VALUES (1)")
    began = time.monotonic()
    assert not watch.rung()
    assert time.monotonic() - began < 5  # SQLite's own patience is 30 s here
    owner.execute("COMMIT")
    assert watch.rung()
    watch.close()
    engine.dispose()
    owner.close()


def test_a_doorbell_without_redis_is_silent() -> None:
    bell = Doorbell(redis.Redis(unix_socket_path="/nowhere/s", retry=None), "source")
    bell.tend()
    assert (bell.fileno(), bell.rung()) == (None, False)
    bell.close()


def test_channels_tell_tables_columns_and_words_apart() -> None:
    def name(schema: str | None = None, table: str = "t", column: str = "a", word: str = "x") -> str:
        made = Table(table, MetaData(), Column(column, String(9)), Column("id", Integer, primary_key=True))
        return channel_of(schema, made, made.c[column], word)

    names = [name(), name(schema="s"), name(table="u"), name(column="b"), name(word="y")]
    assert len(set(names)) == len(names)
    assert name() == name()
    assert all(len(one) <= 63 for one in names)
    assert channel("jobs-Pending-12345678") == "nih_sched:bell:jobs-Pending-12345678"


def test_the_ddl_quotes_names_and_words() -> None:
    table = Table("My Rows", MetaData(), Column("The State", String(9)), schema="Its")
    ddl = PostgreSQL().notify_ddl(table, table.c["The State"], "it's", "Our Own")
    shown = "\n".join(ddl)
    assert 'FUNCTION "Our Own".nih_sched_notify()' in shown
    assert 'ON "Its"."My Rows" FOR EACH ROW' in shown
    assert 'UPDATE OF "The State"' in shown
    assert "\"new\".\"The State\" = 'it''s'" in shown
    assert PostgreSQL().unnotify_ddl("Our Own") == ['DROP FUNCTION IF EXISTS "Our Own".nih_sched_notify() CASCADE']


@pytest.fixture
def told(tmp_path: Path) -> Iterator[tuple[DataVersion, sqlite3.Connection]]:
    """A watch that has looked once, and the file's owner."""
    path = tmp_path / "a.db"
    owner = sqlite3.connect(path, isolation_level=None)
    owner.execute("PRAGMA journal_mode = WAL")
    owner.execute("CREATE TABLE t (a)")
    engine = connect(f"sqlite:///{path}")
    watch = DataVersion(engine)
    watch.tend()
    watch.rung()
    time.sleep(2 * JUST_AFTER)
    yield watch, owner
    watch.close()
    engine.dispose()
    owner.close()


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_the_system_tells_when_the_file_is_written_to(told: tuple[DataVersion, sqlite3.Connection]) -> None:
    watch, owner = told
    line = watch.fileno()
    assert line is not None
    assert watch.every == TOLD
    assert select.select([line], [], [], 0)[0] == []
    owner.execute("INSERT INTO t VALUES (1)")
    assert select.select([line], [], [], 5)[0] == [line]
    assert watch.rung()
    assert (watch.every, watch.fileno()) == (BRISK, None)  # what was written may not be committed yet
    time.sleep(2 * JUST_AFTER)
    assert not watch.rung()
    assert (watch.every, watch.fileno()) == (TOLD, line)
    watch.brisk = True
    assert (watch.every, watch.fileno()) == (BRISK, None)


def test_a_system_that_doesnt_tell_isnt_relied_upon(
    told: tuple[DataVersion, sqlite3.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems."""
    monkeypatch.setattr(FileEvents, "happened", lambda self: False)
    watch, owner = told
    owner.execute("INSERT INTO t VALUES (1)")
    assert watch.rung()
    assert not watch.rung()
    assert (watch.every, watch.fileno(), watch.live) == (CALM, None, True)
