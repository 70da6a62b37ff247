"""Procrastinate."""

from __future__ import annotations

import os
import sys

import bench_work
import procrastinate

PAYLOAD = "thirty characters of a payload"
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["DATABASE_DSN"]))


@app.task(name="noop")
async def noop(id: int, payload: str) -> None:
    """Nothing, counted."""
    bench_work.noop(id, payload)


def fill(jobs: int) -> None:
    """Schema and jobs."""
    with app.open():
        app.schema_manager.apply_schema()
        for first in range(1, jobs + 1, 1000):
            some = range(first, min(first + 1000, jobs + 1))
            noop.batch_defer(*({"id": id, "payload": PAYLOAD} for id in some))


def probe(jobs: int) -> None:
    """One by one."""
    with app.open():
        bench_work.probe(lambda number: noop.defer(id=number, payload=PAYLOAD), jobs)


if __name__ == "__main__":
    {"fill": fill, "probe": probe}[sys.argv[1]](int(sys.argv[2]))
