"""Taskiq on Redis."""

from __future__ import annotations

import asyncio
import os
import sys

import bench_work
from taskiq_redis import ListQueueBroker

PAYLOAD = "thirty characters of a payload"
broker = ListQueueBroker(url=os.environ["REDIS_URL"])


@broker.task(task_name="noop")
async def noop(id: int, payload: str) -> None:
    """Nothing, counted."""
    bench_work.noop(id, payload)


async def fill(jobs: int) -> None:
    """Jobs, sent one by one."""
    await broker.startup()
    for number in range(1, jobs + 1):
        await noop.kiq(number, PAYLOAD)
    await broker.shutdown()


def probe(jobs: int) -> None:
    """One by one."""
    with asyncio.Runner() as runner:
        runner.run(broker.startup())
        bench_work.probe(lambda number: runner.run(_send(number)), jobs)
        runner.run(broker.shutdown())


async def _send(number: int) -> None:
    await noop.kiq(number, PAYLOAD)


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        probe(int(sys.argv[2]))
    else:
        asyncio.run(fill(int(sys.argv[2])))
