"""The dashboard: our pages, and rq-dashboard at /rq, in an app of ours that lets in whom it should and no script.

rq-dashboard 0.9.0 has no login, prints what a job says as HTML, reads with pickle in places, changes state by GET, and
its buttons change Redis behind the table's back. Each is mended once, at a point that all its pages pass.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import flask
import redis
import rq_dashboard.web as rq_pages
import waitress.server
from flask.templating import DispatchingJinjaLoader
from jinja2 import Environment
from markupsafe import escape
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import HTTPException

from nih_sched.errors import UnreachableRedis, UsageError
from nih_sched.metrics import is_loopback
from nih_sched.pages import PAGES

RQ = "rq_dashboard"
ALL_WORKERS = rq_pages.Worker.all  # taken before make_app puts something in its place
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


class _App(flask.Flask):
    redis_conn: redis.Redis  # rq-dashboard looks for it under this name


@dataclass(frozen=True)
class Access:
    """Who may do what.

    Args:
        password: for Basic auth, with any user name; None: nobody gets in that way.
        token: for programs, as a bearer token; None likewise.
        read_only: nobody may change anything.
    """

    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    read_only: bool = False

    def admits(self, login: Authorization | None) -> bool:
        """Whether a request with this Authorization header may come in; compared in constant time."""
        ways = {"basic": (self.password, login and login.password), "bearer": (self.token, login and login.token)}
        secret, given = ways.get(login.type if login else "", (None, None))
        return bool(secret) and hmac.compare_digest((given or "").encode(), (secret or "").encode())


# What our pages need of the app: the token of its forms, who asks, a client of Redis. Gives their blueprint.
Pages = Callable[[Callable[[], str], Callable[[], str], redis.Redis], flask.Blueprint]


def make_app(
    connection_url: str, access: Access, *, serializer: object, pages: Pages | None = None, tls_verify: bool = True
) -> flask.Flask:
    """The dashboard as a WSGI app. One for a process: rq-dashboard keeps its settings in its module.

    Args:
        connection_url: of the Redis server: redis://, rediss:// or unix://.
        access: asked on every page but /healthz.
        serializer: the one that our RQ jobs are written with, `broker.SERIALIZER`.
        pages: ours; without them the root leads to rq-dashboard.
        tls_verify: whether a rediss:// server's certificate must be a trusted one.
    """
    if not (access.password or access.token):
        raise UsageError(reason="The dashboard's password is empty. Set NIH_SCHED_DASHBOARD_PASSWORD.")
    app = _App(__name__, static_folder=None)
    app.debug = False  # Flask would take it from the environment
    # Werkzeug redirects to absolute addresses, which are wrong behind a proxy that ends TLS.
    app.url_map.redirect_defaults = app.url_map.strict_slashes = False
    app.redis_conn = _connect(connection_url, tls_verify)
    address = _address(app.redis_conn)
    app.config.update(RQ_DASHBOARD_DISABLE_DELETE=True, RQ_DASHBOARD_REDIS_URL=(address,))  # the latter is only shown
    app.jinja_env.loader = _MendedTemplates(app)
    app.jinja_env.globals["csp_nonce"] = lambda: flask.g.csp_nonce

    rq_pages.config.serializer = serializer
    rq_pages.Job = _Job
    rq_pages.Worker = SimpleNamespace(all=partial(ALL_WORKERS, job_class=_Job, serializer=serializer))
    app.register_blueprint(rq_pages.blueprint, url_prefix="/rq")
    # It would make a new client from the URL for each request, with no way to say tls_verify.
    app.before_request_funcs[RQ].remove(rq_pages.push_rq_connection)

    form_token = secrets.token_urlsafe(32)  # what no other site can know: the forms of this process carry it
    app.before_request(partial(_guard, app, access, form_token))
    app.after_request(_add_headers)
    if pages is not None:
        app.register_blueprint(pages(lambda: form_token, _who, app.redis_conn))
    else:
        app.add_url_rule("/", "home", lambda: flask.redirect("/rq/"))
    app.add_url_rule("/healthz", "healthz", lambda: flask.Response("ok", mimetype="text/plain"))

    # Only the error's name: a server that doesn't know AUTH quotes the password in its text.
    unreachable = partial(UnreachableRedis, address=address)
    app.register_error_handler(redis.RedisError, lambda e: _say(503, str(unreachable(reason=type(e).__name__))))
    app.register_error_handler(rq_pages.NoSuchJobError, lambda _: _say(404, "Redis holds no such job (any more)."))
    app.register_error_handler(ValueError, lambda _: _say(502, UNREADABLE))
    app.register_error_handler(HTTPException, lambda e: _say(e.code or 500, e.description or e.name))
    return app


def _connect(url: str, tls_verify: bool) -> redis.Redis:
    unverified: dict[str, Any] = {} if tls_verify or not url.startswith("rediss:") else {"ssl_cert_reqs": "none"}
    try:
        return redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, **unverified)
    except ValueError:  # its text may hold a piece of the password
        raise UsageError(reason="Redis needs an address redis://…, rediss://… or unix://… that is whole.") from None


def _address(client: redis.Redis) -> str:
    # Made from what redis-py understood, so that no odd way of writing a password into a URL gets through.
    found = client.connection_pool.connection_kwargs
    place = found.get("path") or f"{found.get('host', 'localhost')}:{found.get('port', 6379)}"
    return f"{'unix' if 'path' in found else 'redis'}://{place} (database {found.get('db') or 0})"


def _who() -> str:
    login = flask.request.authorization
    name = login.username if login is not None and login.type == "basic" else "a program"
    return f"{(name or 'somebody')[:100]} from {flask.request.remote_addr} by the dashboard"


def _is_ours(form_token: str) -> bool:
    """Whether a form came from a page of ours: a browser says where it was sent from, and it carries our token."""
    request = flask.request
    sender = urlsplit(request.headers.get("Origin") or request.headers.get("Referer") or "").netloc
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    given = request.form.get("token", "")
    # Without the scheme: behind a proxy that ends TLS ours is another one than the browser's.
    return sender == request.host and site == "same-origin" and hmac.compare_digest(given.encode(), form_token.encode())


def _guard(app: _App, access: Access, form_token: str) -> flask.Response | None:
    """Runs before every request, those that lead nowhere included."""
    request = flask.request
    flask.g.csp_nonce = secrets.token_urlsafe(16)
    if request.endpoint == "healthz":
        return None
    if not access.admits(request.authorization):
        answer = _say(401, "Please log in, as admin with the dashboard's password.")
        answer.headers["WWW-Authenticate"] = 'Basic realm="nih-sched", charset="UTF-8"'
        return answer
    of_rq, view = request.blueprint == RQ, (request.endpoint or "").rpartition(".")[2]
    if request.method == "POST" and request.blueprint == PAGES:
        if access.read_only:
            return _say(403, "This dashboard is read-only.")
        return None if _is_ours(form_token) else _say(403, "This form isn't ours, or it is from before a restart.")
    if request.method not in {"GET", "HEAD", "OPTIONS"} or (of_rq and not READING.fullmatch(view)):
        return _say(403, "rq-dashboard's buttons go round the table and so are off. Change the row in its table.")
    for name, value in (request.view_args or {}).items():
        if of_rq and not re.fullmatch(ADDRESS_PARTS.get(name, "(?s).*"), str(value)):
            return _say(404, "There is no such page.")
    if of_rq and view not in {"static", "favicon"}:
        app.redis_conn.ping()  # its first page answers 200 when Redis is away
    return None


def _say(status: int, sentence: str) -> flask.Response:
    if flask.request.path.endswith(".json"):
        answer = flask.jsonify(error=sentence)
    else:
        answer = flask.Response(f"<!doctype html><title>Dashboard</title><p>{escape(sentence)}<p><a href=/>Back</a>")
    answer.status_code = status
    return answer


def _add_headers(answer: flask.Response) -> flask.Response:
    # Underscore compiles its templates with Function(): only rq-dashboard's pages are let.
    compiling = " 'unsafe-eval'" if flask.request.blueprint == RQ else ""
    answer.headers["Content-Security-Policy"] = (
        f"default-src 'none'; script-src 'self' 'nonce-{flask.g.csp_nonce}'{compiling}; style-src 'self'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    answer.headers.update({"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"})
    answer.headers.update({"Referrer-Policy": "same-origin", "Cache-Control": "no-store"})
    return answer


class _Stop(SystemExit):
    """Ends waitress's loop, which takes SystemExit for the wish to stop and then waits for its threads."""


def serve(
    connection_url: str,
    *,
    host: str,
    port: int,
    access: Access,
    ready: Callable[[str], None],
    serializer: object,
    pages: Pages | None = None,
    tls_verify: bool = True,
) -> None:
    """Serve the dashboard until SIGINT or SIGTERM, then return. For the main thread, as signals are.

    `ready` gets one sentence once the port is open. Without a password one is made up, and is in that sentence, if
    only this machine can connect and a person reads it: standard error is a terminal.
    """
    made_up = "" if access.password or access.token else _make_up_password(host)
    access = replace(access, password=made_up) if made_up else access
    app = make_app(connection_url, access, serializer=serializer, pages=pages, tls_verify=tls_verify)
    try:  # waitress reads a body before it asks us, and we take none
        server = waitress.server.create_server(app, host=host, port=port, ident="", max_request_body_size=65536)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(reason=f"The dashboard can't listen on {host}, port {port}: {reason}.") from None
    port = getattr(server, "effective_port", port)  # which one 0 became
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(_Stop):  # one before run(), or a second one while it ends
            ready(f"Dashboard on {url} · user admin · password {made_up or 'as you set it'}")
            server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        server.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop


def _make_up_password(host: str) -> str:
    hint = "Set NIH_SCHED_DASHBOARD_PASSWORD"
    if not is_loopback(host):
        raise UsageError(reason=f"Others can reach {host!r}: the dashboard needs a password. {hint}, or use 127.0.0.1.")
    if not sys.stderr.isatty():  # a secret must not land in a log
        raise UsageError(reason=f"The dashboard needs a password, and no terminal is here to show one on. {hint}.")
    return secrets.token_urlsafe(12)
