"""What Prometheus is told of a source: read from table and ledger at each scrape, the same whoever is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from nih_sched import reports
from nih_sched.store import Desk

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Source(Collector):
    """Gauges of one source; each look takes less than half a second, whatever the table's size."""

    def __init__(self, desk: Desk, redis_url: Callable[[], str | None], created: str | None) -> None:
        self._desk = desk
        self._redis_url = redis_url
        self._created = created

    def describe(self) -> Iterator[Metric]:
        """Nothing is read before the first scrape."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        it = reports.status(self._desk, self._redis_url(), created=self._created)
        rows = GaugeMetricFamily(
            "nih_sched_rows", "Rows by state; at large tables at least so many.", labels=["source", "state"]
        )
        for one in it.states:
            rows.add_metric([it.source, "/".join(one.states) or "other"], one.count.rows)
        yield rows
        known: list[tuple[str, str, float | None]] = [
            ("ready_rows", "Rows that may be claimed; at large tables at least so many.", it.ready.rows),
            ("oldest_ready_seconds", "Age of the oldest ready row, where a column tells it.", it.oldest_age),
            ("claimed_rows", "Rows that are claimed and haven't begun.", it.claimed),
            ("retries_waiting", "Rows that wait for their next attempt.", it.retries.count),
            ("running_rows", "Rows that run.", sum(len(one.runs) for one in it.workers)),
            ("workers", "Workers that are presumed alive.", len(it.workers)),
            ("done_per_second", "Attempts that were done, over the last minute.", it.done_rate),
            ("failed_per_second", "Attempts that failed, over the last minute.", it.failed_rate),
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
        for name, about, spread in (
            ("run_seconds", "Run time of the newest attempts.", it.run),
            ("wait_seconds", "Time from claim to start of the newest first attempts.", it.waited),
        ):
            family = GaugeMetricFamily(f"nih_sched_{name}", about, labels=["source", "quantile"])
            for quantile, seconds in (("0.5", spread.p50), ("0.95", spread.p95)):
                if seconds is not None:
                    family.add_metric([it.source, quantile], seconds)
            yield family


def exposition(desk: Desk, redis_url: Callable[[], str | None], created: str | None) -> bytes:
    """A source's metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Source(desk, redis_url, created))
    return generate_latest(registry)
