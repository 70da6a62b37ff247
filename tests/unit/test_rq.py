"""What we override of RQ's worker: look again at nih_sched.worker when one of these changes."""

from __future__ import annotations

import hashlib
import inspect

import pytest
from rq.worker import Worker as RQWorker
from rq.worker.base import BaseWorker

from nih_sched.worker import Worker

# The first characters of the SHA-256 of each one's source in RQ 3.0.0.
OVERRIDDEN = {
    "bootstrap": "7197ad79",
    "teardown": "bfc25728",
    "subscribe": "3437c20b",
    "execute_job": "69165f53",
    "fork_work_horse": "18679b6c",
    "monitor_work_horse": "218a5b8f",
    "wait_for_horse": "08472169",
    "maintain_heartbeats": "b73451c9",
    "heartbeat": "63b1089f",
    "setup_work_horse_signals": "cfc682cb",
    "_install_signal_handlers": "f30e3c58",
    "request_stop": "f934e7e7",
    "should_run_maintenance_tasks": "eda86dbb",
    "dequeue_timeout": "62cbfcfc",
}
# What we call, or what calls us, and how.
SIGNATURES = {
    "perform_job": ["self", "job", "queue", "execution"],
    "prepare_execution": ["self", "job"],
    "handle_job_failure": ["self", "job", "queue", "started_job_registry", "exc_string", "execution"],
    "kill_horse": ["self", "sig"],
    "request_stop_execution": ["self", "execution_id"],
}


def source(name: str) -> str:
    found = inspect.getattr_static(RQWorker, name)
    return inspect.getsource(found.fget if isinstance(found, property) else found)


def test_every_override_is_listed() -> None:
    ours = {name for name in vars(Worker) if name in {*dir(RQWorker), *dir(BaseWorker)}}
    assert ours - {"__init__", "__doc__", "__module__", "max_connection_wait_time"} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_we_override_is_as_it_was(name: str) -> None:
    assert hashlib.sha256(source(name).encode()).hexdigest()[:8] == OVERRIDDEN[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_we_call_is_called_so(name: str) -> None:
    assert list(inspect.signature(getattr(RQWorker, name)).parameters) == SIGNATURES[name]
