"""Metrics from real schedulers: what they count, who may read it."""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import Work
from servers import Redis, eventually, free_port, scheduler, spawn_scheduler

from nih_sched.metrics.exposition import exposition
from nih_sched.settings import Settings
from nih_sched.store import open_desk

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECRET = "the tokén"


def ask(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def total(text: str, name: str) -> float:
    found = re.search(rf"^{name}(?:_total)?{{[^}}]*}} (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else -1


def counted(work: Work) -> dict[str, float]:
    return dict(map(tuple, work.sql("SELECT name, sum(value) FROM nih_sched_counts GROUP BY name")))


def test_a_scheduler_counts_what_it_does_and_tells_it_on_its_port(lite: Work) -> None:
    lite.insert(*range(1, 31))
    port = free_port()
    line = ("--job", "handlers:first_fails", "--tries", "1", "--delay", "0.1", "--metrics-port", str(port))
    with spawn_scheduler(*line, env=lite.env, cwd=lite.folder):
        eventually(lambda: lite.states() == {"Done": 30}, timeout=40)
        assert ask(port, "/healthz") == (200, "ok")
        assert ask(port, "/readyz") == (200, "ready")
        assert ask(port, "/nope")[0] == 404
        text = eventually(lambda: found if total(found := ask(port, "/metrics")[1], "nih_sched_done") == 30 else "")
        assert total(text, "nih_sched_retried") == 30
        assert total(text, "nih_sched_run_seconds_count") == 60
        assert total(text, "nih_sched_ready_rows") == 0


def test_the_last_rows_before_the_end_are_counted(lite: Work) -> None:
    lite.insert(*range(1, 201))
    for option in ("--burst", "--burst"):
        lite.sql("UPDATE work SET state = 'Pending'")
        run = scheduler(option, "--job", "handlers:count", env=lite.env, cwd=lite.folder)
        assert run.returncode == 0, run.stderr
    found = counted(lite)
    assert (found["claimed"], found["done"]) == (400, 400)


def test_producer_and_worker_alone_count_for_themselves(lite: Work) -> None:
    lite.insert(1, 2, 3)
    with (
        spawn_scheduler("producer", "--job", "handlers:count", env=lite.env, cwd=lite.folder),
        spawn_scheduler("worker", "--job", "handlers:count", env=lite.env, cwd=lite.folder),
    ):
        eventually(lambda: lite.states() == {"Done": 3}, timeout=40)
    found = counted(lite)
    assert (found["claimed"], found["done"]) == (3, 3)


@pytest.mark.parametrize("name", ["NIH_SCHED_DASHBOARD_PASSWORD", "NIH_SCHED_DASHBOARD_TOKEN"])
def test_password_or_token_guard_the_port(lite: Work, name: str) -> None:
    port = free_port()
    line = ("producer", "--job", "handlers:count", "--metrics-port", str(port), "--metrics-host", "0.0.0.0")
    refused = scheduler(*line, env=lite.env, cwd=lite.folder)
    assert (refused.returncode, "metrics need a password" in refused.stderr) == (2, True)
    basic = base64.b64encode(f"me:{SECRET}".encode()).decode()
    with spawn_scheduler(*line, env={**lite.env, name: SECRET}, cwd=lite.folder):
        eventually(lambda: ask(port, "/healthz")[0] == 200, timeout=30)
        for path in ("/metrics", "/readyz", "/nope"):
            assert ask(port, path)[0] == 401
            for header in ("Basic x", "Bearer x", f"Basic {base64.b64encode(b'me:').decode()}", "Bearer ", SECRET):
                assert ask(port, path, Authorization=header.encode().decode("latin-1"))[0] == 401, header
        bearer = f"Bearer {SECRET}".encode().decode("latin-1")
        opens, other = (f"Basic {basic}", bearer) if name.endswith("PASSWORD") else (bearer, f"Basic {basic}")
        assert ask(port, "/metrics", Authorization=opens)[0] == 200
        assert ask(port, "/metrics", Authorization=other)[0] == 401


def test_the_port_says_when_redis_is_away(lite: Work) -> None:
    assert lite  # its table and its Redis
    own = Redis().start()
    try:
        port = free_port()
        env = {**lite.env, "REDIS_URL": own.url}
        line = ("producer", "--job", "handlers:count", "--metrics-port", str(port))
        with spawn_scheduler(*line, env=env, cwd=lite.folder):
            eventually(lambda: ask(port, "/readyz")[0] == 200, timeout=30)
            own.kill()
            assert ask(port, "/readyz") == (503, "Redis doesn't answer.")
            assert ask(port, "/healthz")[0] == 200
            assert ask(port, "/metrics")[0] == 200
    finally:
        own.kill()


def names_in(value: Any) -> set[str]:
    return set(re.findall(r"\bnih_sched_[a-z_]+", json.dumps(value) if not isinstance(value, str) else value))


def test_dashboard_and_alerts_name_metrics_that_there_are(lite: Work) -> None:
    desk = open_desk(Settings(database_url=lite.database.url, table="work"))
    text = exposition(desk, lambda: None, None).decode()
    desk.close()
    known = set(re.findall(r"^(nih_sched_\w+)[ {]", text, re.MULTILINE)) | {"nih_sched_oldest_ready_seconds"}
    board = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    alerts = (DOCS / "alerts.yml").read_text("utf-8")
    assert len(names_in(board)) >= 10
    assert len(names_in(alerts)) >= 4
    assert names_in(board) | names_in(alerts) <= known
    page = (DOCS / "metrics.md").read_text("utf-8")
    base = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in known}
    assert not [name for name in base if f"`{name}" not in page]


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    """Against what Grafana's own schema of dashboards asks for, and what it would show nothing or too much for."""
    board = json.loads((DOCS / "grafana.json").read_text("utf-8"))
    assert board["schemaVersion"] >= 36
    variables = {one["name"]: one["type"] for one in board["templating"]["list"]}
    assert variables == {"datasource": "datasource", "source": "query"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        taken = {(x, y) for x in across for y in down}
        assert taken, panel["title"]
        assert max(across) < 24
        assert not taken & cells
        cells |= taken
        assert panel["type"] == "timeseries"
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["overrides"] == []
        assert len({one["refId"] for one in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            expression = target["expr"]
            assert target["datasource"] == source
            assert expression.count("(") == expression.count(")")
            assert set(re.findall(r"\$(\w+)", expression)) <= {"source", "__rate_interval"}
            # Each instance that is scraped tells of all: their largest is true, their sum isn't.
            assert re.search(r"max by \(source(, le)?\) \((rate\(|increase\()?nih_sched_", expression), expression
            if "histogram_quantile" in expression:
                assert "_bucket" in expression
                assert "sum by (le) (max by (source, le) (rate(" in expression
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
