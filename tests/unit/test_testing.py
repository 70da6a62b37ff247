"""drain: a table's rows run to their end in the user's own test, on the user's own engine."""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Database, eventually
from sqlalchemy import Engine, StaticPool, create_engine, text

from nih_sched import runner
from nih_sched.errors import BadHandler, Fail, NoPrimaryKey, NoSuchTable, RetryLater
from nih_sched.producer import Producer
from nih_sched.runner import share_hand, site
from nih_sched.runner.traces import Traces
from nih_sched.testing import drain

CREATE = "CREATE TABLE mails (id integer PRIMARY KEY, state varchar(20) NOT NULL, address varchar(100))"
SIGNALS = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    engine = create_engine(database.url)
    yield engine
    engine.dispose()


@pytest.fixture
def memory() -> Iterator[Engine]:
    """What a user's unit test has: SQLite in memory."""
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with_rows(engine, "a", "b", "c")
    yield engine
    engine.dispose()


def with_rows(engine: Engine, *addresses: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(CREATE))
        for number, address in enumerate(addresses):
            connection.execute(
                text("INSERT INTO mails VALUES (:n, 'Pending', :address)"), {"n": number, "address": address}
            )


def states(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {row.address: row.state for row in connection.execute(text("SELECT address, state FROM mails"))}


def history(engine: Engine, *columns: str) -> list[tuple[Any, ...]]:
    query = f"SELECT {', '.join(columns)} FROM nih_sched_attempts ORDER BY row_key, attempt"
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def test_every_row_is_run_to_its_end_on_each_database(engine: Engine) -> None:
    with_rows(engine, "good", "always", "once", "final", "later", "slow")
    calls: list[tuple[str, int]] = []

    def send(address: str, attempt: int) -> str:
        calls.append((address, attempt))
        if address == "always" or (address == "once" and attempt == 1):
            raise ConnectionError(f"no answer to {address}")
        if address == "final":
            raise Fail("no such address")
        if address == "later" and attempt < 3:
            raise RetryLater(0.01)
        if address == "slow" and attempt == 1:
            time.sleep(30)
        return f"sent to {address}"

    found = drain(engine, "mails", send, tries=2, timeout=0.5)
    assert found == {"done": 4, "failed": 2}
    assert states(engine) == {
        "good": "Done",
        "always": "Failed",
        "once": "Done",
        "final": "Failed",
        "later": "Done",
        "slow": "Done",
    }
    counts = {address: sum(a == address for a, _ in calls) for address in states(engine)}
    assert counts == {"good": 1, "always": 3, "once": 2, "final": 1, "later": 3, "slow": 2}
    assert all([n for a, n in calls if a == address] == list(range(1, counts[address] + 1)) for address in counts)
    assert history(engine, "row_key", "attempt", "failures", "outcome", "reason") == [
        ("[0]", 1, 0, "done", None),
        ("[1]", 1, 1, "failed", "ConnectionError: no answer to always"),
        ("[1]", 2, 2, "failed", "ConnectionError: no answer to always"),
        ("[1]", 3, 3, "failed", "ConnectionError: no answer to always"),
        ("[2]", 1, 1, "failed", "ConnectionError: no answer to once"),
        ("[2]", 2, 1, "done", None),
        ("[3]", 1, 1, "failed", "Fail: no such address"),
        ("[4]", 1, 0, "postponed", "asked to be run again in 0.01 s"),
        ("[4]", 2, 0, "postponed", "asked to be run again in 0.01 s"),
        ("[4]", 3, 0, "done", None),
        ("[5]", 1, 1, "timed out", "ran longer than its timeout of 0.5 s"),
        ("[5]", 2, 1, "done", None),
    ]
    assert [row[0] for row in history(engine, "open_key")] == [None] * 12


def test_it_may_be_called_again_and_again(memory: Engine) -> None:
    assert drain(memory, "mails", lambda address: None) == {"done": 3}
    assert drain(memory, "mails", lambda address: pytest.fail("was run again")) == {}
    with memory.begin() as connection:
        connection.execute(text("UPDATE mails SET state = 'Pending' WHERE address = 'b'"))
    seen: list[str] = []
    assert drain(memory, "mails", lambda address: seen.append(address) or None) == {"done": 1}
    assert seen == ["b"]


def test_a_hand_that_was_closed_in_this_process_is_none_of_its_business(memory: Engine) -> None:
    hand = share_hand()
    hand.take(1)
    hand.close()
    assert drain(memory, "mails", lambda address: None) == {"done": 3}


def test_ctrl_c_between_two_rows_ends_it_and_the_next_one_goes_on(
    memory: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def send(address: str) -> None:
        seen.append(address)

    def ctrl_c(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Traces, "left", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            drain(memory, "mails", send, batch_size=3)
    assert seen == ["a"]
    assert set(states(memory).values()) == {"Pending"}
    assert drain(memory, "mails", send) == {"done": 3}
    assert seen == ["a", "a", "b", "c"]  # nobody had seen the first one's end


def test_what_one_that_was_killed_has_claimed_runs_too(memory: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("nih_sched.testing.work_off", lambda queue: exec("raise SystemExit"))
        patch.setattr(Producer, "stop", lambda producer: None)
        with pytest.raises(SystemExit):
            drain(memory, "mails", lambda address: None)
    assert set(states(memory).values()) == {"Queued"}
    assert drain(memory, "mails", lambda address: None) == {"done": 3}


def test_rows_that_each_leave_something_behind_take_no_longer_than_others(
    memory: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[int] = []
    monkeypatch.setattr(runner, "give_back", lambda site, source, ids: back.extend(ids))
    with memory.begin() as connection:
        for n in range(3, 300):
            connection.execute(text("INSERT INTO mails VALUES (:n, 'Pending', 'x')"), {"n": n})

    def send(id: int) -> None:
        monkeypatch.setenv("NIH_SCHED_LEFT_BEHIND", str(id))

    assert drain(memory, "mails", send) == {"done": 300}
    assert back == []


def test_the_schedulers_settings_count(memory: Engine) -> None:
    with memory.begin() as connection:
        connection.execute(text("UPDATE mails SET state = 'new'"))

    def send(address: str) -> None:
        if address == "c":
            raise ValueError(address)

    found = drain(
        memory,
        "mails",
        send,
        ready_val="new",
        done_val="sent",
        failed_val="bounced",
        where="address <> 'a'",
        tries=0,
    )
    assert found == {"done": 1, "failed": 1}
    assert states(memory) == {"a": "new", "b": "sent", "c": "bounced"}


def test_a_wait_between_tries_is_kept_if_asked_for(memory: Engine) -> None:
    starts: list[float] = []

    def send(address: str) -> None:
        if address == "a":
            starts.append(time.monotonic())
            raise ValueError

    assert drain(memory, "mails", send, tries=2, delay=0.2, backoff=2.0) == {"done": 2, "failed": 1}
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert len(gaps) == 2
    assert gaps[0] >= 0.2
    assert gaps[1] >= 0.4
    assert sum(gaps) < 3


def test_async_handlers_and_rows_that_a_handler_adds(memory: Engine) -> None:
    async def send(id: int) -> None:
        if id < 3:
            with memory.begin() as connection:
                connection.execute(
                    text("INSERT INTO mails VALUES (:n, 'Pending', :a)"), {"n": id + 10, "a": f"more {id}"}
                )

    assert drain(memory, "mails", send) == {"done": 6}
    assert set(states(memory).values()) == {"Done"}


@pytest.mark.parametrize(
    ("table", "handler", "error"),
    [
        ("nowhere", lambda: None, NoSuchTable),
        ("mails", lambda colour: None, BadHandler),
        ("keyless", lambda: None, NoPrimaryKey),
    ],
)
def test_what_the_scheduler_refuses_is_refused_here(
    memory: Engine, table: str, handler: Callable[..., Any], error: type[Exception]
) -> None:
    with memory.begin() as connection:
        connection.execute(text("CREATE TABLE keyless (state varchar(20))"))
    with pytest.raises(error):
        drain(memory, table, handler)
    assert site._here is None
    assert set(states(memory).values()) == {"Pending"}


@pytest.mark.parametrize("end", [ValueError, SystemExit, KeyboardInterrupt, Fail])
def test_the_process_is_left_as_it_was(memory: Engine, end: type[BaseException]) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    level = logging.getLogger("rq.worker").level
    path, threads, began = list(sys.path), set(threading.enumerate()), list[set[threading.Thread]]()

    def send(address: str) -> None:
        assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]  # Ctrl-C still ends the user's test
        began.append(set(threading.enumerate()) - threads)
        raise end

    assert drain(memory, "mails", send, tries=1) == {"failed": 3}
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert site._here is None
    assert logging.getLogger("rq.worker").level == level
    assert sys.path == path
    assert began  # threads: RQ's own, which hears commands, may live on for a minute
    assert not any(began)
    with memory.connect() as connection:  # the user's engine still works
        assert connection.execute(text("SELECT count(*) FROM mails")).scalar_one() == 3


def test_an_alarm_of_the_test_itself_still_rings(memory: Engine) -> None:
    # As pytest-timeout sets one for each test.
    rung: list[float] = []
    old = signal.signal(signal.SIGALRM, lambda signum, frame: rung.append(time.monotonic()))
    signal.setitimer(signal.ITIMER_REAL, 0.6)
    due = time.monotonic() + 0.6
    try:
        assert drain(memory, "mails", lambda address: time.sleep(0.02)) == {"done": 3}
        eventually(lambda: rung, timeout=5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert rung[0] >= due - 0.01


def test_a_drain_in_a_thread_works_too(memory: Engine) -> None:
    found: list[dict[str, int]] = []
    thread = threading.Thread(target=lambda: found.append(drain(memory, "mails", lambda address: None)))
    thread.start()
    thread.join(30)
    assert found == [{"done": 3}]
