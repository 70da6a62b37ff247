"""The other systems: what they are, how they are run at their best, and what they make durable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

APPS = Path(__file__).with_name("apps")
_OWN_QUEUE = "each job's state and end, in its own tables on PostgreSQL; there is no table of the user's"


@dataclass(frozen=True)
class Peer:
    """Another system. Its file in apps/ is run by its own Python: `fill ROWS` makes the jobs, `workers` run them."""

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
