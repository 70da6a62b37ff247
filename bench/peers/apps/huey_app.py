"""Huey on Redis."""

from __future__ import annotations

import os
import sys

import bench_work
from huey import RedisHuey

PAYLOAD = "thirty characters of a payload"
huey = RedisHuey("bench", url=os.environ["REDIS_URL"], results=False)


@huey.task(name="noop")
def noop(id: int, payload: str) -> None:
    """Nothing, counted."""
    bench_work.noop(id, payload)


if __name__ == "__main__":
    import huey_app

    send = huey_app.noop  # by the module's name, as the consumer knows it
    if sys.argv[1] == "probe":
        bench_work.probe(lambda number: send(number, PAYLOAD), int(sys.argv[2]))
    else:
        for number in range(1, int(sys.argv[2]) + 1):
            send(number, PAYLOAD)
