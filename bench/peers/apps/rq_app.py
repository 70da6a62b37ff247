"""RQ as most would write it by hand: rows in a table, one job each, and a function that keeps the row's state.

`fill ROWS` inserts the rows and enqueues their jobs, `probe ROWS` does so one by one; `work` is a worker that has
imported all this before it forks.
"""

from __future__ import annotations

import os
import sys

import bench_work
from redis import Redis
from rq import Queue, Worker
from sqlalchemy import create_engine, text

PAYLOAD = "thirty characters of a payload"
engine = create_engine(os.environ["DATABASE_URL"])  # the driver is imported with it; each horse connects by itself


def job(id: int, payload: str) -> None:
    """Started, the work, Done."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET state = 'Started' WHERE id = :id"), {"id": id})
    bench_work.noop(id, payload)
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET state = 'Done', finished_at = now() WHERE id = :id"), {"id": id})


def fill(rows: int) -> None:
    """Rows and jobs."""
    with engine.begin() as connection:
        columns = "id bigint PRIMARY KEY, state text NOT NULL, payload text NOT NULL, finished_at timestamptz"
        connection.execute(text(f"CREATE TABLE jobs ({columns})"))
        values = f"SELECT i, 'Queued', '{PAYLOAD}' FROM generate_series(1, {rows}) AS i"
        connection.execute(text(f"INSERT INTO jobs (id, state, payload) {values}"))
    queue = _queue()
    for first in range(1, rows + 1, 1000):
        some = range(first, min(first + 1000, rows + 1))
        queue.enqueue_many([Queue.prepare_data("rq_app.job", args=(id, PAYLOAD), result_ttl=500) for id in some])


def probe(rows: int) -> None:
    """Rows and jobs, one by one."""
    queue = _queue()

    def send(number: int) -> None:
        with engine.begin() as connection:
            connection.execute(
                text("INSERT INTO jobs VALUES (:id, 'Queued', :payload)"), {"id": number, "payload": PAYLOAD}
            )
        queue.enqueue("rq_app.job", number, PAYLOAD)

    bench_work.probe(send, rows)


def _queue() -> Queue:
    return Queue("default", connection=Redis.from_url(os.environ["REDIS_URL"]))


def work() -> None:
    """A stock worker; what it will run is imported already."""
    Worker(["default"], connection=Redis.from_url(os.environ["REDIS_URL"])).work(logging_level="WARNING")


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(int(sys.argv[2]))
    elif sys.argv[1] == "probe":
        probe(int(sys.argv[2]))
    else:
        import rq_app  # noqa: F401 - by the name under which jobs ask for it

        work()
