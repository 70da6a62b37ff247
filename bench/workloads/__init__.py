"""The workloads, by the names of --workloads."""

from __future__ import annotations

from collections.abc import Mapping

from bench.plan import Workload
from bench.workloads.latency import latency
from bench.workloads.noop import noop

WORKLOADS: Mapping[str, Workload] = {
    "noop": noop,
    "latency": latency,
}
