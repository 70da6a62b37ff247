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


if __name__ == "__main__":
    asyncio.run(fill(int(sys.argv[2])))
