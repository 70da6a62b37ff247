"""Celery on Redis."""

from __future__ import annotations

import os
import sys

import bench_work
from celery import Celery

PAYLOAD = "thirty characters of a payload"
app = Celery("celery_app", broker=f"redis+socket://{os.environ['REDIS_URL'].removeprefix('unix://')}?virtual_host=0")
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=128, worker_hijack_root_logger=False)


@app.task(name="noop")
def noop(id: int, payload: str) -> None:
    """Nothing, counted."""
    bench_work.noop(id, payload)


if __name__ == "__main__":
    with app.producer_pool.acquire() as producer:

        def send(number: int) -> None:
            """One job."""
            noop.apply_async((number, PAYLOAD), producer=producer)

        if sys.argv[1] == "probe":
            bench_work.probe(send, int(sys.argv[2]))
        else:
            for number in range(1, int(sys.argv[2]) + 1):
                send(number)
