"""drain: run a table's ready rows to their end inside a test, without Redis and without processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import fakeredis
from sqlalchemy import Engine

from nih_sched import broker, runner
from nih_sched.producer import Producer
from nih_sched.runner.handler import function_handler
from nih_sched.settings import Settings
from nih_sched.store import Claims, Desk
from nih_sched.store.desk import desk_on
from nih_sched.worker import work_off


def drain(engine: Engine, table: str, handler: Callable[..., Any], **settings: Any) -> dict[str, int]:
    """Run `handler` for each ready row of `table`, retries included, until none is left; the real way of a row.

    Args:
        engine: your test's database; our tables nih_sched_* are made in it.
        table: the table's name.
        handler: your function, called as by the scheduler.
        settings: fields of nih_sched.Settings, such as status_key="status"; delay is 0 here by default, so that
            retries don't take a test's time.

    Returns:
        how many claims ended, by outcome: {"done": 3, "failed": 1}.

    Raises:
        NihError: what the scheduler would refuse, too.
    """
    chosen = Settings(**{"table": table, "delay": 0.0, "max_concurrent_jobs": 1, "burst": True, **settings})
    logger = logging.getLogger("rq.worker")
    level = logger.level
    desk: Desk = desk_on(engine, chosen)
    name = getattr(handler, "__qualname__", repr(handler))
    runner.prepare(chosen, desk, function_handler(name, handler, desk.rows.columns), owns_process=False)
    redis = fakeredis.FakeStrictRedis()
    logger.setLevel(logging.CRITICAL)
    try:
        Claims(desk, "", 0).give_all_back()  # what one has left behind that was cut short: nobody carries it
        producer = Producer(chosen, desk, redis)
        try:
            while True:
                tick = producer.tick()
                work_off(broker.queue_of(redis, desk.source.name))
                if producer.is_over(tick):
                    return producer.ended()
                if not tick.claimed and not tick.sent:
                    time.sleep(0.005)
        except BaseException:
            producer.stop()
            raise
    finally:
        logger.setLevel(level)
        runner.clear()
