"""/metrics: the counts of all processes, and a few gauges sampled now, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nih_sched.metrics.counting import COUNTERS, HISTOGRAMS
from nih_sched.store import Desk, Leases
from nih_sched.store.overview import Overview
from nih_sched.store.tally import Tally

READY_UP_TO = 100_000  # rows that are counted at each scrape
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "claimed": "Rows claimed",
    "done": "Attempts that were done",
    "failed": "Rows that failed for good",
    "retried": "Attempts that failed with tries left",
    "rescued": "Claims put right after a death",
    "stale": "Outcomes that came too late",
    "interrupted": "Attempts that were interrupted",
    "cancelled": "Attempts cancelled while they ran",
    "database_errors": "Times the database was lost",
    "redis_errors": "Times Redis was lost",
}
SPREADS = {
    "run": ("nih_sched_run_seconds", "How long attempts ran; rows of a batch count with their mean"),
    "wait": ("nih_sched_wait_seconds", "From claim to start; a sample of some attempts every 5 s"),
    "batch": ("nih_sched_batch_rows", "Rows that were started together"),
}


class _Counted(Collector):
    def __init__(self, desk: Desk, created: str | None) -> None:
        self._desk = desk
        self._created = created

    def collect(self) -> Iterator[Metric]:
        totals = Tally(self._desk).totals()
        totals.setdefault(self._desk.source.name, {})
        for name in COUNTERS:
            counter = CounterMetricFamily(f"nih_sched_{name}", f"{HELP[name]}.", labels=["source"])
            for source, counts in totals.items():
                counter.add_metric([source], counts.get(name, 0.0))
            yield counter
        for name, (title, text) in SPREADS.items():
            spread = HistogramMetricFamily(title, f"{text}.", labels=["source"])
            for source, counts in totals.items():
                spread.add_metric([source], _buckets(name, counts), counts.get(f"{name}_sum", 0.0))
            yield spread
        yield from self._sampled()

    def _sampled(self) -> Iterator[Metric]:
        overview, source = Overview(self._desk), self._desk.source.name
        first = overview.first_ready(self._created)
        age = 0.0 if first is None else first[1]
        leases = [one for one in Leases(self._desk.engine, self._desk.ledger).all() if one.died is None]
        sampled = {
            "ready_rows": (f"Rows ready to run, counted up to {READY_UP_TO}", overview.ready(READY_UP_TO).rows),
            "running_rows": ("Rows that run now, counted up to 1000", len(overview.running())),
            "claimed_rows": ("Rows claimed that haven't begun", overview.claimed()),
            "retries_waiting": ("Rows that wait for a retry", overview.retries().count),
            "oldest_ready_seconds": ("Age of the ready row that is first in line; needs --created-column", age),
        }
        for name, (text, value) in sampled.items():
            if value is not None:
                gauge = GaugeMetricFamily(f"nih_sched_{name}", f"{text}.", labels=["source"])
                gauge.add_metric([source], value)
                yield gauge
        yield GaugeMetricFamily("nih_sched_leases", "Workers presumed alive.", value=len(leases))


def exposition(desk: Desk, created: str | None = None) -> bytes:
    """What /metrics answers.

    Args:
        desk: a source's; the counts are those of all sources, the gauges its own.
        created: the column that says when a row was added.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counted(desk, created))
    return generate_latest(registry)


def _buckets(name: str, counts: dict[str, float]) -> list[tuple[str, float]]:
    total, found = 0.0, []
    for bound in HISTOGRAMS[name]:
        total += counts.get(f"{name}_le_{bound:g}", 0.0)
        found.append(("+Inf" if bound == float("inf") else f"{bound:g}", total))
    return found
