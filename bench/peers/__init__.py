"""The other systems: what they are, how they are run at their best, and what they make durable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

APPS = Path(__file__).with_name("apps")
_OWN_QUEUE = "each job's state and end, in its own tables on PostgreSQL; there is no table of the user's"


@dataclass(frozen=True)
class Peer:
    """Another system. Its file in apps/ is run by its own Python: `fill ROWS` makes the jobs, `workers` run them.

    `probe JOBS` sends them one by one, and prints how long each waited.
    """

    name: str
    app: str
    requires: tuple[str, ...]  # for pip; the first is the system itself
    workers: tuple[tuple[str, ...], ...]  # {python}, {bin} and {app} are filled in; they run side by side
    settings: str
    durable: str
    ended: str | None = (
        None  # SQL: how many jobs ended well, and when the last did; without it the handlers' count tells
    )


_RQ = "SELECT count(*), max(finished_at) FROM jobs WHERE state = 'Done'"
_RQ_NEEDS = ("rq>=3,<4", "sqlalchemy>=2.1,<2.2", "psycopg[binary]")
_RQ_DURABLE = "the row's state and end: two commits by the function itself, on PostgreSQL; the job is in Redis alone"
_NOTHING = "nothing: jobs are in Redis alone, which saves nothing here"
_CELERY = (
    *("{bin}/celery", "-A", "celery_app", "worker", "--pool", "prefork", "--concurrency", "2"),
    *("--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"),
)
_PROCRASTINATE = (
    *("{bin}/procrastinate", "--app", "procrastinate_app.app", "--log-level", "warning"),
    *("worker", "--concurrency", "30"),
)

PEERS = {
    one.name: one
    for one in (
        Peer(
            name="rq-handwritten",
            app="rq_app.py",
            requires=_RQ_NEEDS,
            workers=(("{bin}/rq", "worker", "--url", "{redis}", "--quiet", "default"),) * 2,
            settings="2 stock `rq worker`; the function sets the row Started and Done by SQLAlchemy",
            durable=_RQ_DURABLE,
            ended=_RQ,
        ),
        Peer(
            name="rq-preloaded",
            app="rq_app.py",
            requires=_RQ_NEEDS,
            workers=(("{python}", "{app}", "work"),) * 2,
            settings="the same, in 2 workers that import the application before they fork",
            durable=_RQ_DURABLE,
            ended=_RQ,
        ),
        Peer(
            name="procrastinate",
            app="procrastinate_app.py",
            requires=("procrastinate", "psycopg[binary]"),
            workers=(_PROCRASTINATE,) * 2,
            settings="2 `procrastinate worker --concurrency 30`, LISTEN on, async function",
            durable=_OWN_QUEUE,
            ended="SELECT count(*), max(at) FROM procrastinate_events WHERE type = 'succeeded'",
        ),
        Peer(
            name="pgqueuer",
            app="pgqueuer_app.py",
            requires=("pgqueuer[asyncpg]", "uvloop"),
            workers=(("{python}", "{app}", "work"),) * 2,
            settings="2 processes, batch_size 100, asyncpg, uvloop, after `pgq autovac`, async function",
            durable=_OWN_QUEUE,
            ended="SELECT count(*), max(created) FROM pgqueuer_log WHERE status = 'successful'",
        ),
        Peer(
            name="celery",
            app="celery_app.py",
            requires=("celery[redis]",),
            workers=(_CELERY,),
            settings="1 worker with 2 prefork processes, prefetch multiplier 128, early acks, results ignored",
            durable=_NOTHING,
        ),
        Peer(
            name="dramatiq",
            app="dramatiq_app.py",
            requires=("dramatiq[redis]",),
            workers=(("{bin}/dramatiq", "dramatiq_app", "--processes", "2", "--threads", "8"),),
            settings="2 processes of 8 threads, no results",
            durable=_NOTHING,
        ),
        Peer(
            name="huey",
            app="huey_app.py",
            requires=("huey", "redis"),
            workers=(("{bin}/huey_consumer", "huey_app.huey", "-k", "process", "-w", "2", "--quiet"),),
            settings="1 consumer with 2 worker processes, waiting by BLPOP, no results",
            durable=_NOTHING,
        ),
        Peer(
            name="taskiq",
            app="taskiq_app.py",
            requires=("taskiq", "taskiq-redis", "uvloop"),
            workers=(("{bin}/taskiq", "worker", "taskiq_app:broker", "--workers", "2", "--log-level", "WARNING"),),
            settings="2 processes, ListQueueBroker, uvloop, no results, async function",
            durable=_NOTHING,
        ),
    )
}


def chosen(words: str) -> list[Peer]:
    """By `none`, `all` or a list with commas.

    Raises:
        ValueError: for a name that isn't there.
    """
    if words in ("none", ""):
        return []
    if words == "all":
        return list(PEERS.values())
    names = [one.strip() for one in words.split(",")]
    if unknown := [one for one in names if one not in PEERS]:
        raise ValueError(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return [PEERS[one] for one in names]
