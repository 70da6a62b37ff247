"""A stock `rq worker -S json` runs our jobs, and rq-dashboard shows each of them in the right registry."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest
from conftest import Work, stock_worker
from servers import eventually, scheduler, spawn, spawn_scheduler

from nih_sched import broker, web

pytestmark = pytest.mark.many  # what the measured tests measure already, in many more processes


def shown(client: Any, source: str, registry: str) -> list[str]:
    """The descriptions of the jobs that rq-dashboard lists in a registry."""
    answer = client.get(f"/rq/0/data/jobs/{source}/{registry}/50/asc/1.json")
    assert answer.status_code == 200, answer.text
    return sorted(job["description"] for job in answer.json["jobs"])


def test_a_stock_worker_runs_rows_to_done_and_retries_failing_ones(work: Work, redis_url: str) -> None:
    work.insert(1, 2, 3)
    line = ("--tries", "1", "--delay", "100", "--job", "handlers:first_fails")
    scheduler("init", env=work.env, cwd=work.folder)
    source = scheduler("source", env=work.env, cwd=work.folder).stdout.strip()
    app = web.make_app(redis_url, web.Access("pw"), serializer=broker.SERIALIZER)
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = "Basic " + b64encode(b"admin:pw").decode()
    env = work.env | {"NIH_SCHED_JOB": "handlers:first_fails"}
    with (
        spawn(stock_worker(source), env=env, cwd=work.folder),
        spawn_scheduler("producer", *line, env=work.env, cwd=work.folder),
    ):
        eventually(lambda: len(shown(client, source, "scheduled")) == 3, timeout=40)
        assert work.states() == {"Queued": 3}
        # Who is slow has all three there at once, too; and nobody has to wait.
        work.sql("UPDATE nih_sched_attempts SET due_at = claimed_at WHERE due_at IS NOT NULL")
        eventually(lambda: work.states() == {"Done": 3}, timeout=40)
        eventually(lambda: shown(client, source, "finished") == [f"{source} claim {n}" for n in (1, 2, 3)])
        assert shown(client, source, "scheduled") == []
        counts = "SELECT name, sum(value) FROM nih_sched_counts GROUP BY name"
        eventually(lambda: (found := dict(map(tuple, work.sql(counts)))).get("done") == 3 and found["retried"] == 3)
    found = dict(map(tuple, work.sql(counts)))
    assert sum(value for name, value in found.items() if name.startswith("run_le_")) == 6
    assert broker.take_counts(broker.connect(redis_url), source) == {}  # each was taken once
    assert [(a.attempt, a.outcome) for a in work.attempts(2)] == [(1, "failed"), (2, "done")]


def test_a_finally_failed_job_stands_in_the_failed_registry_without_the_rows_words(lite: Work, redis_url: str) -> None:
    lite.insert(1)
    lite.sql("UPDATE work SET kind = '<b>x</b>'")
    (lite.folder / "evil.py").write_text("def job(kind):\n    raise ValueError(kind)\n")
    line = ("--tries", "1", "--delay", "0.2", "--job", "evil:job", "--burst", "--max-concurrent-jobs", "1")
    assert scheduler(*line, env=lite.env, cwd=lite.folder).returncode == 1
    source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
    queue = broker.queue_of(broker.connect(redis_url), source)
    (failed,) = queue.failed_job_registry.get_job_ids()
    job = queue.fetch_job(failed)
    told = job.latest_result().exc_string
    assert "claim 1, attempt 2: failed" in told
    assert "<b>" not in told + job.description
    assert job.retries_left == 0
    assert queue.scheduled_job_registry.count == queue.count == 0
    assert "ValueError: <b>x</b>" in lite.attempts()[1].traceback


def test_our_class_under_the_stock_command_serves_several_queues(lite: Work, redis_url: str) -> None:
    lite.insert(1, 2, 3)
    (lite.folder / "process.py").write_text("import os\n\n\ndef number(id):\n    return os.getpid()\n")
    env = lite.env | {"NIH_SCHED_JOB": "process:number"}
    scheduler("init", env=env, cwd=lite.folder)
    source = scheduler("source", env=env, cwd=lite.folder).stdout.strip()
    worker = stock_worker(source, "-w", "nih_sched.worker.Worker", "another-queue")
    with (
        spawn(worker, env=env, cwd=lite.folder) as process,
        spawn_scheduler("producer", "--batch-size", "1", env=env, cwd=lite.folder),
    ):
        eventually(lambda: lite.states() == {"Done": 3}, timeout=20)
        lite.insert(4)
        eventually(lambda: lite.states() == {"Done": 4}, timeout=20)
        queue = broker.queue_of(broker.connect(redis_url), source)
        eventually(lambda: queue.finished_job_registry.count == 4)
        assert "Traceback" not in process.output
    assert [a.outcome for key in range(1, 5) for a in lite.attempts(key)] == ["done"] * 4
    assert len({a.result for key in range(1, 5) for a in lite.attempts(key)}) == 1  # one horse


def test_each_job_carries_a_retry_with_exactly_its_tries(lite: Work, redis_url: str) -> None:
    lite.insert(1)
    line = ("producer", "--tries", "3", "--delay", "0.5", "--backoff", "2", "--max-delay", "1.5")
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder):
        eventually(lambda: lite.states() == {"Queued": 1})
        source = scheduler("source", env=lite.env, cwd=lite.folder).stdout.strip()
        queue = broker.queue_of(broker.connect(redis_url), source)
        (job,) = eventually(queue.get_jobs)
        assert job.retries_left == 3
        assert job.retry_intervals == [0.5, 1.0, 1.5]
        assert job.func_name == "nih_sched.runner.run"
        assert job.args == [source, [1]]
    assert lite.states() == {"Pending": 1}
    assert queue.count == 0
