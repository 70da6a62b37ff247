"""A producer killed between every two statements of claim, commit and enqueue: nothing is lost, nothing doubled.

The producer's own code knows nothing of it: this test listens to SQLAlchemy and to Redis, and kills at the n-th step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest
from conftest import Work
from servers import scheduler
from sqlalchemy import event

from nih_sched import broker
from nih_sched.producer import Producer
from nih_sched.settings import Settings
from nih_sched.store import open_desk

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes

ROWS = 3


class Steps:
    """Counts steps, and kills this process at the chosen one."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def produce_until(work: Work, last: int) -> None:
    """Be a producer for one tick, killed before its step number `last`; exit code 0 when there are fewer."""
    settings = Settings(database_url=work.database.url, table="work", job="handlers:count", max_concurrent_jobs=1)
    desk = open_desk(settings)
    connection = broker.connect(os.environ["REDIS_URL"])
    producer = Producer(settings, desk, connection)
    step = Steps(last)
    for name in ("before_cursor_execute", "begin", "commit"):
        event.listen(desk.engine, name, step)
    for kind in (type(connection), type(connection.pipeline())):
        execute = kind.execute_command

        def stepped(self: Any, *args: Any, _execute: Any = execute, **options: Any) -> Any:
            step()
            return _execute(self, *args, **options)

        kind.execute_command = stepped  # type: ignore[method-assign]
    send = type(connection.pipeline()).execute

    def sent(self: Any, *args: Any, **options: Any) -> Any:
        step()
        answer = send(self, *args, **options)
        step()
        return answer

    type(connection.pipeline()).execute = sent  # type: ignore[method-assign]
    producer.tick()
    os._exit(0)


def test_a_producer_killed_at_each_step_loses_and_doubles_nothing(work: Work) -> None:
    number, killed = 0, 0
    fork = multiprocessing.get_context("fork")
    while True:
        work.insert(*range(number * ROWS, (number + 1) * ROWS))
        process = fork.Process(target=produce_until, args=(work, number))
        process.start()
        process.join(30)
        number += 1
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    assert killed > 10  # BEGIN, lock, insert, update, COMMIT, and Redis's commands
    done = scheduler("--job", "handlers:count", "--burst", env=work.env, cwd=work.folder, timeout=60)
    assert done.returncode == 0, done.stderr
    assert work.states() == {"Done": number * ROWS}
    assert work.ran() == {str(i): 1 for i in range(number * ROWS)}
