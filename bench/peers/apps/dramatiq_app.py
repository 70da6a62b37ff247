"""Dramatiq on Redis."""

from __future__ import annotations

import os
import sys

import bench_work
import dramatiq
from dramatiq.brokers.redis import RedisBroker

PAYLOAD = "thirty characters of a payload"
dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))


@dramatiq.actor(actor_name="noop")
def noop(id: int, payload: str) -> None:
    """Nothing, counted."""
    bench_work.noop(id, payload)


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        bench_work.probe(lambda number: noop.send(number, PAYLOAD), int(sys.argv[2]))
    else:
        for number in range(1, int(sys.argv[2]) + 1):
            noop.send(number, PAYLOAD)
