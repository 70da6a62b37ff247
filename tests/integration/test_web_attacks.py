"""Hostile texts in every field, on every page of ours and of /rq, in a real browser: nothing of them may execute."""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import flask
import pytest
import redis
from conftest import Work
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import (
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.serializers import JSONSerializer
from werkzeug.serving import WSGIRequestHandler, make_server

from nih_sched import pages, web
from nih_sched.model import encode_key, open_key
from nih_sched.settings import load
from nih_sched.store import Desk, open_desk
from nih_sched.store.desk import register

PASSWORD = "pw-of-the-attacked"
SEEN = "tells-that-it-came"  # in each text, so that a page that doesn't show them can't pass
HACK = "window.hacked=1"
EVILS = (
    f"{SEEN}<script>{HACK}</script><svg onload={HACK}><img src=x onerror={HACK}><iframe srcdoc='<b onload={HACK}>'>",
    f"\"'--></title></textarea></pre><script>{HACK}</script><base href=//evil.example><b onclick={HACK}>{SEEN}",
    f"{SEEN}{{{{7331*3}}}}{{% raw %}}${{7331*3}}<%= 7331*3 %><%- 7331*3 %>{{{{{{7331*3}}}}}}#{{7331*3}}",
    f"javascript:{HACK}//{SEEN}\" onfocus={HACK} autofocus x='",
    f"';{HACK};//\\';{HACK};//`;{HACK}//</style><link rel=stylesheet href=//evil.example>{SEEN}\u2028\u202e\x1b[31m",
    SEEN + "W" * 10_000,
)
EVIL = " ".join(EVILS[:5])
SCRIPTS = ("text/javascript", "application/javascript", "image/vnd.microsoft.icon")
COMPUTED = str(7331 * 3)
QUEUE = f"'-{HACK}-'{EVILS[0]}{EVILS[1]}".replace("/", "\u2215")  # a path's part can't hold a slash
REGISTRIES = {
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "failed": FailedJobRegistry,
    "deferred": DeferredJobRegistry,
    "scheduled": ScheduledJobRegistry,
    "canceled": CanceledJobRegistry,
}
# Runs in each page before the page's own scripts.
WATCH = """
window.broken = [];
addEventListener("securitypolicyviolation", (one) => window.broken.push(one.violatedDirective + " " + one.blockedURI));
for (const name of ["alert", "confirm", "prompt", "print"]) window[name] = () => { window.hacked = name; };
"""
LOOK = """
const all = [...document.querySelectorAll("*")];
const given = all.flatMap((one) => one.getAttributeNames().map((name) => [name, one.getAttribute(name)]));
const leads = /^(href|src|.*action)$/;
const entries = performance.getEntries().filter((one) => "responseStatus" in one);
return {
  hacked: window.hacked || "",
  broken: window.broken,
  handlers: given.filter(([name]) => /^(on.*|srcdoc|autofocus)$/.test(name)).map(String),
  schemes: given.filter(([name, value]) => leads.test(name) && /^\\s*javascript:/i.test(value)).map(String),
  foreign: all.filter((one) => /^(base|iframe|object|embed)$/.test(one.localName)).map((one) => one.localName),
  failed: entries.filter((one) => one.responseStatus >= 500).map((one) => one.name),
  data: entries.filter((one) => one.name.includes("/data/") && one.responseEnd > 0).length,
  status: performance.getEntriesByType("navigation")[0].responseStatus,
  text: document.body.innerText,
};
"""


def fill_redis(client: redis.Redis, source: str) -> list[str]:
    """A job in each registry, and a worker; returns the jobs' ids."""
    ids = list[str]()
    queue = Queue(QUEUE, connection=client, serializer=JSONSerializer)
    for registry in ("queued", *REGISTRIES):
        ids.append(f"job-{len(ids)}")
        job = queue.enqueue("nih_sched.runner.run", EVIL, job_id=ids[-1], description=EVIL, meta={EVIL: EVIL})
        if registry != "queued":
            queue.remove(job)
            job.set_status(JobStatus(registry))
            entry = f"{job.id}:1" if registry == "started" else job.id
            client.zadd(REGISTRIES[registry](QUEUE, connection=client).key, {entry: time.time() + 3600})
        client.hset(job.key, mapping={"worker_name": EVIL, "exc_info": EVIL})
        if registry == "failed":
            Result.create_failure(job, 3600, exc_string="\n".join(EVILS), worker_name=EVIL)
        elif registry == "finished":
            Result.create(job, Result.Type.SUCCESSFUL, 3600, return_value={EVIL: list(EVILS)}, worker_name=EVIL)
    client.lpush(queue.key, EVIL)  # what no job can be called
    facts = {"hostname": EVIL, "queues": QUEUE, "state": EVILS[0], "current_job": ids[0], "version": EVIL}
    worker = f"rq:worker:{EVIL}"
    client.hset(worker, mapping=facts | {"python_version": EVIL, "ip_address": EVIL, "pid": 1})
    client.sadd("rq:workers", worker)
    client.sadd(f"rq:workers:{source}", worker)
    client.hset(Job.key_for(ids[0]), "dependency_ids", f'["{ids[1]}"]')
    return ids


def fill_table(work: Work, desk: Desk) -> list[str]:
    """Rows whose keys, columns and histories are hostile, one of them running; returns the keys."""
    register(desk)
    keys, now, own = [*EVILS, EVIL.replace("/", "\\")], datetime.now(UTC), desk.ledger
    states = ("Failed", "Failed", "Started", "Done", EVIL, "Failed", "Pending")
    record = {"source": desk.source.name, "attempt": 1, "failures": 1, "tries": 0, "rq_id": "x", "seconds": 1.5}
    record |= {"claimed_at": now, "started_at": now, "claimed_by": EVILS[0][:190], "worker": EVILS[1][:190]}
    record |= dict.fromkeys(("reason", "traceback", "result", "output"), EVIL) | {"ended_by": EVILS[4][:190]}
    lease = {
        "id": "1",
        "worker": EVILS[1][:190],
        "host": EVILS[0][:250],
        "pid": 1,
        "born": 1,
        "seconds": 600.0,
        "beat": 1,
    }
    with desk.engine.begin() as connection:
        for number, (key, state) in enumerate(zip(keys, states, strict=True)):
            connection.execute(desk.rows.table.insert(), {"id": key, "state": state, "note": EVIL})
            its: dict[str, Any] = {"finished_at": now, "outcome": "failed", "error": EVILS[number % 5][:190]}
            if state == "Started":
                its = {"open_key": open_key(desk.rows.name, (key,)), "lease": "1"}
            connection.execute(
                own.attempts.insert(), record | its | {"row_key": encode_key((key,)), "late": EVILS[2][:16]}
            )
        connection.execute(own.leases.insert(), lease | {"lease_until": now + timedelta(hours=1)})
        leader = json.dumps([EVILS[0][:100], EVILS[1][:100], 1, 1])
        pause = {"paused_at": now, "paused_by": EVILS[1][:190], "pause_reason": EVIL}
        connection.execute(own.sources.update().values(leader=leader, leader_until=now + timedelta(hours=1), **pause))
    return keys


class Attacked:
    """Both, and the app that shows them."""

    def __init__(self, work: Work, redis_url: str, client: redis.Redis) -> None:
        work.sql("DROP TABLE work")
        work.sql("CREATE TABLE work (id TEXT PRIMARY KEY, state TEXT, note TEXT)")
        settings = load({}, work.env)
        self.desk = open_desk(settings)
        self.keys, self.jobs = fill_table(work, self.desk), fill_redis(client, self.desk.source.name)

        def make(token: Any, who: Any, its: redis.Redis) -> flask.Blueprint:
            place = pages.Place(self.desk, settings, lambda: redis_url, lambda: its, False, token, who)
            return pages.make_blueprint(place)

        self.app = web.make_app(redis_url, web.Access(PASSWORD), serializer=JSONSerializer, pages=make)

    def addresses(self) -> list[str]:
        """Every page that looks, from the URL map, with every hostile text in its place."""
        samples: dict[str, Iterable[str]] = {
            "instance_number": ["0"],
            "queue_name": [QUEUE],
            "registry_name": ["queued", *REGISTRIES],
            "per_page": ["20"],
            "order": ["asc"],
            "page": ["1"],
            "job_id": [*self.jobs, EVILS[3].replace("/", "")],
            "filename": ["js/main.js", "pages.js"],
            "key": [*self.keys[2:], EVIL],
        }
        found = ["/nope/" + quote(EVIL, safe=""), "/rq/nope/" + quote(EVIL, safe="")]
        for rule in self.app.url_map.iter_rules():
            if "GET" not in (rule.methods or ()):
                continue
            names = sorted(rule.arguments)
            for values in itertools.product(*(samples[name] for name in names)):
                path = rule.rule
                for name, value in zip(names, values, strict=True):
                    path = re.sub(f"<(?:\\w+:)?{name}>", lambda _, value=value: quote(value, safe=""), path)
                found.append(path)
        found += [f"/row?key={quote(key)}" for key in (*self.keys, EVIL)]
        for name in ("state", "text", "error", "since", "after", "order"):
            found.append(f"/rows?{name}={quote(EVIL)}")
        found += [
            f"{path}?done={quote(EVIL)}&error={quote(EVIL)}&count={quote(EVIL)}"
            for path in ("/failures", "/rows/x", "/")
        ]
        return found


class Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture
def attacked(lite: Work, redis_url: str, redis_client: redis.Redis) -> Iterator[Attacked]:
    made = Attacked(lite, redis_url, redis_client)
    yield made
    made.desk.close()


@pytest.fixture
def served(attacked: Attacked) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, attacked.app, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_hostile_executes_anywhere(attacked: Attacked, served: str, browser: Any) -> None:
    login = {"Authorization": "Basic " + base64.b64encode(f"ada:{PASSWORD}".encode()).decode()}
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": login})
    client, visited = attacked.app.test_client(), dict[str, str]()
    for path in attacked.addresses():
        answer = client.get(path, headers=login)
        assert answer.status_code < 500, (path, answer.text)
        if answer.mimetype != "text/html":
            assert answer.mimetype in ("application/json", "text/plain", "text/css", *SCRIPTS), path
            assert answer.headers["X-Content-Type-Options"] == "nosniff", path
            continue
        visited[path] = look(browser, served + path, path)
    shows_it = [path for path, text in visited.items() if SEEN in text]
    assert len(visited) > 45
    assert len(shows_it) > 35, sorted(set(visited) - set(shows_it))
    for page in ("/", "/rows", "/failures", "/rq/0/view/workers", "/rq/0/view/queues"):
        assert page in shows_it
    for key in attacked.keys:
        assert f"/row?key={quote(key)}" in shows_it
    for registry in ("queued", *REGISTRIES):
        assert f"/rq/0/view/jobs/{quote(QUEUE, safe='')}/{registry}/20/asc/1" in shows_it
    for job in attacked.jobs:
        assert f"/rq/0/view/job/{job}" in shows_it


def look(browser: Any, url: str, path: str) -> str:
    """Load a page, wait until what it shows of Redis has come, and see that nothing of it ran; returns its text."""
    browser.get(url)
    until = time.monotonic() + 5
    while True:
        seen = browser.execute_script(LOOK)
        if not path.startswith("/rq/0/view") or seen["data"] or seen["status"] >= 400 or time.monotonic() > until:
            break
        time.sleep(0.02)
    if seen["data"]:
        time.sleep(0.05)  # what has come is drawn
        seen = browser.execute_script(LOOK)
    assert seen["hacked"] == "", path
    for name in ("broken", "handlers", "schemes", "foreign", "failed"):
        assert seen[name] == [], (path, name, seen[name])
    assert seen["status"] < 500, path
    assert COMPUTED not in seen["text"], path
    text: str = seen["text"]
    return text
