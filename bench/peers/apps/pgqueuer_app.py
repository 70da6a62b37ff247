"""PgQueuer: `fill JOBS`, `probe JOBS`, and `work`, a process that runs them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import asyncpg
import bench_work
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

DSN = os.environ["DATABASE_DSN"]
PAYLOAD = "thirty characters of a payload"
BATCH = int(os.environ.get("BENCH_PGQUEUER_BATCH", "100"))
CONSUMERS = int(os.environ.get("BENCH_PGQUEUER_CONSUMERS", "1"))  # in each process, each with a connection


async def fill(jobs: int) -> None:
    """Jobs, into its tables."""
    connection = await asyncpg.connect(DSN)
    queries = Queries(AsyncpgDriver(connection))
    for first in range(1, jobs + 1, 1000):
        some = range(first, min(first + 1000, jobs + 1))
        payloads: list[bytes | None] = [_payload(id) for id in some]
        await queries.enqueue(["noop"] * len(some), payloads, [0] * len(some))
    await connection.close()


def probe(jobs: int) -> None:
    """Jobs, one by one."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        queries = Queries(AsyncpgDriver(runner.run(asyncpg.connect(DSN))))
        bench_work.probe(lambda number: runner.run(queries.enqueue("noop", _payload(number), 0)), jobs)


def _payload(id: int) -> bytes:
    return json.dumps({"id": id, "payload": PAYLOAD}).encode()


async def work() -> None:
    """Run jobs until told to stop."""
    consumers = [PgQueuer(AsyncpgDriver(await asyncpg.connect(DSN))) for _ in range(CONSUMERS)]
    loop = asyncio.get_running_loop()
    for one in consumers:

        @one.entrypoint("noop")
        async def noop(job: Job) -> None:
            bench_work.noop(**json.loads(job.payload or b"{}"))

    def stop() -> None:
        for one in consumers:
            one.shutdown.set()

    loop.add_signal_handler(signal.SIGTERM, stop)
    await asyncio.gather(*(one.run(batch_size=BATCH) for one in consumers))


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        for words in (["install"], ["autovac"]):
            subprocess.run([sys.executable, "-m", "pgqueuer", "--pg-dsn", DSN, *words], check=True)
        uvloop.run(fill(int(sys.argv[2])))
    elif sys.argv[1] == "probe":
        probe(int(sys.argv[2]))
    else:
        uvloop.run(work())
