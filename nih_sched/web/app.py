"""The app: what every request passes, to our pages and to rq-dashboard's, which has no login of its own."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import flask
import redis
from markupsafe import escape
from werkzeug.exceptions import HTTPException

from nih_sched.access import Access, sender_of, user_of
from nih_sched.errors import UnreachableRedis, UsageError
from nih_sched.pages import PAGES
from nih_sched.web.looking import Looking
from nih_sched.web.mount import ADDRESS_PARTS, READING, RQ, UNREADABLE, NoSuchJob, mount

Client = TypeVar("Client", bound=redis.Redis)

# A sentence where there is no page: as our pages look, where they are mounted.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Dashboard</title><link rel="stylesheet" href="/own/pages.css">
<main><p class="alert">{sentence}</p><p><a href="/">Back</a></p></main>
"""


class _App(flask.Flask):
    redis_conn: Looking  # rq-dashboard looks for it under this name


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
    if not access.is_guarded:
        raise UsageError(reason="The dashboard's password is empty. Set NIH_SCHED_DASHBOARD_PASSWORD.")
    app = _App(__name__, static_folder=None)
    app.debug = False  # Flask would take it from the environment
    # Werkzeug redirects to absolute addresses, which are wrong behind a proxy that ends TLS.
    app.url_map.redirect_defaults = app.url_map.strict_slashes = False
    app.redis_conn = _connect(Looking, connection_url, tls_verify)
    address = _address(app.redis_conn)
    app.config.update(RQ_DASHBOARD_REDIS_URL=(address,))  # only shown
    mount(app, serializer)

    form_token = access.form_token()
    app.before_request(partial(_guard, app, access, form_token))
    app.after_request(_add_headers)
    if pages is not None:
        app.register_blueprint(pages(lambda: form_token, _who, _connect(redis.Redis, connection_url, tls_verify)))
    else:
        app.add_url_rule("/", "home", lambda: flask.redirect("/rq/"))
    app.add_url_rule("/healthz", "healthz", lambda: flask.Response("ok", mimetype="text/plain"))

    # Only the error's name: a server that doesn't know AUTH quotes the password in its text.
    unreachable = partial(UnreachableRedis, address=address)
    app.register_error_handler(redis.RedisError, lambda e: _say(503, str(unreachable(reason=type(e).__name__))))
    app.register_error_handler(NoSuchJob, lambda _: _say(404, "Redis holds no such job (any more)."))
    app.register_error_handler(ValueError, lambda _: _say(502, UNREADABLE))
    app.register_error_handler(HTTPException, lambda e: _say(e.code or 500, e.description or e.name))
    return app


def _connect(kind: type[Client], url: str, tls_verify: bool) -> Client:
    unverified: dict[str, Any] = {} if tls_verify or not url.startswith("rediss:") else {"ssl_cert_reqs": "none"}
    try:
        pool = redis.ConnectionPool.from_url(url, socket_timeout=2, socket_connect_timeout=2, **unverified)
    except ValueError:  # its text may hold a piece of the password
        raise UsageError(reason="Redis needs an address redis://…, rediss://… or unix://… that is whole.") from None
    return kind(connection_pool=pool)


def _address(client: redis.Redis) -> str:
    # Made from what redis-py understood, so that no odd way of writing a password into a URL gets through.
    found = client.connection_pool.connection_kwargs
    place = found.get("path") or f"{found.get('host', 'localhost')}:{found.get('port', 6379)}"
    return f"{'unix' if 'path' in found else 'redis'}://{place} (database {found.get('db') or 0})"


def _who() -> str:
    user = user_of(flask.request.headers.get("Authorization"))
    name = "a program" if user is None else user[:100] or "somebody"
    return f"{name} from {flask.request.remote_addr} by the dashboard"


def _is_ours(form_token: str) -> bool:
    """Whether a form came from a page of ours: a browser says where it was sent from, and it carries our token."""
    request = flask.request
    sender = sender_of(request.headers.get("Origin"), request.headers.get("Referer"))
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    given = request.form.get("token", "")
    # Without the scheme: behind a proxy that ends TLS ours is another one than the browser's.
    ours = sender == request.host.lower() and site == "same-origin"
    return ours and hmac.compare_digest(given.encode(), form_token.encode())


def _guard(app: _App, access: Access, form_token: str) -> flask.Response | None:
    """Runs before every request, those that lead nowhere included."""
    request = flask.request
    flask.g.csp_nonce = secrets.token_urlsafe(16)
    if request.endpoint == "healthz":
        return None
    if not access.admits(request.headers.get("Authorization")):
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
        answer = flask.Response(PAGE.format(sentence=escape(sentence)))
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
