"""What we override of RQ's worker: look again at nih_sched.worker when one of these changes."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest
from rq.executions import prepare_execution
from rq.job import Job
from rq.queue import Queue
from rq.worker import Worker as RQWorker
from rq.worker.base import BaseWorker
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from nih_sched import redis_client
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
    "connection_timeout": "d430e6ac",
    "set_state": "bb8d4f1d",
    "check_for_suspension": "e8095ae1",
    "dequeue_job_and_maintain_ttl": "2715cf34",
    "prepare_execution": "899b4eaa",
    "prepare_job_execution": "d08dd329",
    "handle_execution_ended": "23748b02",
    "handle_job_success": "9dda7c7d",
    "setup_work_horse_signals": "cfc682cb",
    "_install_signal_handlers": "f30e3c58",
    "request_stop": "f934e7e7",
    "should_run_maintenance_tasks": "eda86dbb",
    "dequeue_timeout": "62cbfcfc",
}
# What those of ours do in RQ's stead that isn't a worker's method.
REPLACED = {
    prepare_execution: "e8d5a964",
    Job.fetch: "4c0184a1",
    Job.refresh: "818b52b4",
    Job._handle_success: "35b96f82",
    Job.cleanup: "16734aeb",
    RQWorker.perform_job: "1f0e4067",
    RQWorker.work: "04b5cdf8",
    BaseWorker.handle_exception: "fffd9b29",  # of the one that a drain has
}
# What we call, or what calls us, and how.
SIGNATURES = {
    "perform_job": ["self", "job", "queue", "execution"],
    "handle_job_failure": ["self", "job", "queue", "started_job_registry", "exc_string", "execution"],
    "kill_horse": ["self", "sig"],
    "request_stop_execution": ["self", "execution_id"],
}


def source(name: str) -> str:
    found = inspect.getattr_static(RQWorker, name)
    return inspect.getsource(found.fget if isinstance(found, property) else found)


def digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:8]


def test_every_override_is_listed() -> None:
    classes = Worker.__mro__[: Worker.__mro__.index(RQWorker)]
    ours = {name for one in classes for name in vars(one) if name in {*dir(RQWorker), *dir(BaseWorker)}}
    assert ours - {"__init__", "__doc__", "__module__", "max_connection_wait_time"} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_we_override_is_as_it_was(name: str) -> None:
    assert digest(source(name)) == OVERRIDDEN[name]


@pytest.mark.parametrize("replaced", REPLACED, ids=lambda one: one.__qualname__)
def test_what_we_do_in_its_stead_is_as_it_was(replaced: Any) -> None:
    assert digest(inspect.getsource(replaced)) == REPLACED[replaced]


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_we_call_is_called_so(name: str) -> None:
    assert list(inspect.signature(getattr(RQWorker, name)).parameters) == SIGNATURES[name]


def test_what_a_look_reads_has_the_names_that_rq_gives_it() -> None:
    assert f"{redis_client.QUEUE}jobs" == f"{Queue.redis_queue_namespace_prefix}jobs"
    assert f"{redis_client.WORKERS}jobs" == WORKERS_BY_QUEUE_KEY % "jobs"
    assert BaseWorker.redis_worker_namespace_prefix == redis_client.WORKER
