"""rq-dashboard 0.9.0, mended: it prints what a job says as HTML, reads with pickle in places, and changes state by GET.

Each fault is mended once, at a point that all its pages pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import flask
import rq_dashboard.web as rq_pages
from flask.templating import DispatchingJinjaLoader
from jinja2 import Environment

RQ = "rq_dashboard"
NoSuchJob: type[Exception] = rq_pages.NoSuchJobError
UNREADABLE = "rq-dashboard can't read this. Did another program than nih-sched write it, not as JSON?"
# What rq-dashboard may serve. A list of what reads, not of what writes: a route that it adds one day is off.
READING = re.compile(r"(static|favicon|(queues|workers|jobs)_overview|list_(queues|workers|jobs)|job_(view|info))")
# It fails on other values of these parts of its addresses; "instance" 0 is the one Redis that we have.
ADDRESS_PARTS = {
    "instance_number": "0",
    "registry_name": "queued|scheduled|deferred|started|finished|failed|canceled",
    "per_page": "[1-9][0-9]{0,3}",
    "page": "[1-9][0-9]{0,5}",
}
# Applied to its templates in this order. Underscore prints `<%= x %>` as it is and `<%- x %>` escaped.
TEMPLATE_MENDS = (
    (r"<%=\s*\$\('<div/>'\)\.text\(((?:(?!%>).)*?)\)\.html\(\)\s*%>", r"<%- \1 %>"),  # else it's escaped twice
    (r"<%=", "<%-"),
    # Buttons that would change state. `[^>]*` may end inside a title that holds a tag: what follows goes as well.
    (r"""(?s)<(a|button)\b[^>]*(?:id|data-role)="[\w-]*(?:requeue|compact|delete|empty)[\w-]*".*?</\1>""", ""),
    (r">Actions</th>", "></th>"),
    (r'\sstyle="[^"]*"', ""),  # the policy forbids them
    (r'class="fixed intro"', 'class="intro"'),  # its height is fixed, and on a phone its text runs into the table
    (r'<a class="navbar-brand">', '<a class="navbar-brand" href="/">← Overview</a> <a class="navbar-brand">'),
    (r"url_for\('static'", f"url_for('{RQ}.static'"),
    (r"<script\b", '<script nonce="{{ csp_nonce() }}"'),
)
# Jinja doesn't escape in .js files, and one of them puts the queue's name, from the address, between quotes.
SCRIPT_MENDS = ((r"""(['"]?)\{\{\s*([\w.]+)\s*\}\}\1""", r"{{ \2|tojson }}"),)


class _MendedTemplates(DispatchingJinjaLoader):
    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Callable[[], bool] | None]:
        source, path, fresh = super().get_source(environment, template)
        if template.startswith(f"{RQ}/"):
            for pattern, replacement in TEMPLATE_MENDS + (SCRIPT_MENDS if template.endswith(".js") else ()):
                source = re.sub(pattern, replacement, source)
        return source, path, fresh


class _Job(rq_pages.Job):  # type: ignore[misc]
    """A job as rq-dashboard can read it; it forgets the serializer in places, and RQ's default is pickle."""

    def __init__(self, job_id: str, connection: Any, serializer: Any = None) -> None:
        try:
            super().__init__(job_id, connection=connection, serializer=serializer or rq_pages.config.serializer)
        except ValueError:  # an id that no job can have
            raise rq_pages.NoSuchJobError from None

    @property
    def dependency_ids(self) -> list[bytes]:
        # rq 3 gives str, rq-dashboard 0.9.0 decodes bytes.
        return [each.encode() for each in super().dependency_ids]

    def get_call_string(self) -> str:
        # RQ would load the arguments, with whatever serializer the job's worker had.
        return str(self.description or self.id)


class _Queue(rq_pages.Queue):  # type: ignore[misc]
    job_class = _Job  # else one entry that no job can be called hides all others


class _Worker(rq_pages.Worker):  # type: ignore[misc]
    def _set_connection(self, connection: Any) -> Any:
        return connection  # a worker that works would have all of us wait for Redis for minutes


def mount(app: flask.Flask, serializer: object) -> None:
    """rq-dashboard at /rq. Its settings stand in its module: one app for a process.

    Args:
        app: has a client of Redis as its redis_conn.
        serializer: the one that jobs are written with.
    """
    app.config.update(RQ_DASHBOARD_DISABLE_DELETE=True)
    app.jinja_env.loader = _MendedTemplates(app)
    app.jinja_env.globals["csp_nonce"] = lambda: flask.g.csp_nonce
    rq_pages.config.serializer = serializer
    rq_pages.Job, rq_pages.Queue = _Job, _Queue
    rq_pages.Worker = SimpleNamespace(all=partial(_Worker.all, job_class=_Job, serializer=serializer))
    app.register_blueprint(rq_pages.blueprint, url_prefix="/rq")
    # It would make a new client from the URL for each request, with no way to say tls_verify.
    app.before_request_funcs[RQ].remove(rq_pages.push_rq_connection)
