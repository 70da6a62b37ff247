"""/metrics: what all processes have counted, and what a source looks like now, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from nih_sched import reports
from nih_sched.counts import HISTOGRAMS
from nih_sched.store import Desk, Leases
from nih_sched.store.tally import Tally

CONTENT_TYPE = CONTENT_TYPE_LATEST
COUNTERS = {
    "claimed": "Rows claimed.",
    "done": "Attempts that were done.",
    "failed": "Rows that failed for good.",
    "retried": "Attempts that failed with tries left.",
    "rescued": "Claims put right after a death.",
    "stale": "Outcomes that came too late.",
    "interrupted": "Attempts that were interrupted.",
    "cancelled": "Attempts cancelled while they ran.",
    "database_errors": "Times a process lost the database.",
    "redis_errors": "Times a process lost Redis.",
}
SPREADS = {
    "run": ("run_seconds", "How long attempts ran; rows of a batch count with their mean."),
    "wait": ("wait_seconds", "From claim to start; a sample of some claims every 5 s."),
    "batch": ("batch_rows", "Rows that were started together."),
}


class _Source(Collector):
    """Counts of every source and gauges of one; takes less than half a second, whatever the table's size."""

    def __init__(self, desk: Desk, redis_url: Callable[[], str | None], created: str | None) -> None:
        self._desk = desk
        self._redis_url = redis_url
        self._created = created

    def describe(self) -> Iterator[Metric]:
        """Nothing is read before the first scrape."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        yield from self._counted()
        yield from self._seen()

    def _counted(self) -> Iterator[Metric]:
        totals = Tally(self._desk).totals()
        totals.setdefault(self._desk.source.name, {})
        for name, about in COUNTERS.items():
            counter = CounterMetricFamily(f"nih_sched_{name}", about, labels=["source"])
            for source, counts in totals.items():
                counter.add_metric([source], counts.get(name, 0.0))
            yield counter
        for name, (title, about) in SPREADS.items():
            spread = HistogramMetricFamily(f"nih_sched_{title}", about, labels=["source"])
            for source, counts in totals.items():
                spread.add_metric([source], _buckets(name, counts), counts.get(f"{name}_sum", 0.0))
            yield spread

    def _seen(self) -> Iterator[Metric]:
        it = reports.status(self._desk, self._redis_url(), created=self._created)
        rows = GaugeMetricFamily(
            "nih_sched_rows", "Rows by state; at large tables about so many, or at least.", labels=["source", "state"]
        )
        for one in it.states:
            rows.add_metric([it.source, "/".join(one.states) or "other"], one.count.rows)
        yield rows
        leases = [one for one in Leases(self._desk.engine, self._desk.ledger).all() if one.died is None]
        known: list[tuple[str, str, float | None]] = [
            ("ready_rows", "Rows that may be claimed; at large tables at least so many.", it.ready.rows),
            ("oldest_ready_seconds", "Age of the oldest ready row, where a column tells it.", it.oldest_age),
            ("claimed_rows", "Rows that are claimed and haven't begun.", it.claimed),
            ("retries_waiting", "Rows that wait for their next attempt.", it.retries.count),
            ("running_rows", "Rows that run.", sum(len(one.runs) for one in it.workers)),
            ("workers", "Workers that are presumed alive, or that RQ knows.", len(it.workers)),
            ("leases", "Leases of workers that are presumed alive, of any source.", len(leases)),
            ("unclaimed_rows", "Rows on their way with no open claim behind them: see scheduler doctor.", it.unclaimed),
            ("paused", "1 while the source is paused.", it.pause is not None),
            ("led", "1 while a producer leads the source.", it.leader is not None and it.leader.holds),
            ("redis_up", "1 while Redis answers.", it.redis.answers),
        ]
        for name, about, value in known:
            if value is not None:
                family = GaugeMetricFamily(f"nih_sched_{name}", about, labels=["source"])
                family.add_metric([it.source], float(value))
                yield family


def exposition(desk: Desk, redis_url: Callable[[], str | None], created: str | None) -> bytes:
    """A source's metrics in Prometheus' text format.

    Args:
        desk: the source's; the counts are those of all sources, the gauges its own.
        redis_url: finds the Redis of this moment; None while there is none.
        created: the column that says when a row was added.
    """
    registry = CollectorRegistry()
    registry.register(_Source(desk, redis_url, created))
    return generate_latest(registry)


def _buckets(name: str, counts: dict[str, float]) -> list[tuple[str, float]]:
    total, found = 0.0, []
    for bound in HISTOGRAMS[name]:
        total += counts.get(f"{name}_le_{bound:g}", 0.0)
        found.append(("+Inf" if bound == float("inf") else f"{bound:g}", total))
    return found
