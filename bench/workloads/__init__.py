"""The workloads, by the names of --workloads."""

from __future__ import annotations

from collections.abc import Mapping

from bench.plan import Workload
from bench.workloads.bulk import bulk
from bench.workloads.growth import growth
from bench.workloads.idle import idle
from bench.workloads.latency import latency
from bench.workloads.noop import noop
from bench.workloads.operator import operator
from bench.workloads.shared import fairness, scaling
from bench.workloads.spaced import fifty_ms, mixed, one_ms

WORKLOADS: Mapping[str, Workload] = {
    "noop": noop,
    "1ms": one_ms,
    "50ms": fifty_ms,
    "mixed": mixed,
    "latency": latency,
    "growth": growth,
    "idle": idle,
    "scaling": scaling,
    "fairness": fairness,
    "bulk": bulk,
    "operator": operator,
}
