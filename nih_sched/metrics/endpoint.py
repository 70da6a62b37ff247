"""A port beside a producer that answers /metrics, /healthz and /readyz."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import waitress.server
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import broker
from nih_sched.access import Access
from nih_sched.errors import UsageError
from nih_sched.metrics.exposition import CONTENT_TYPE, exposition
from nih_sched.store import Desk

Start = Callable[[str, list[tuple[str, str]]], Any]


def missing(desk: Desk, connection: Redis) -> str:
    """What isn't ready to run rows, in a sentence; nothing if all is."""
    try:
        desk.read(lambda c: c.execute(text("SELECT 1")).scalar())
    except SQLAlchemyError:
        return "The database doesn't answer."
    try:
        connection.ping()
    except broker.OUTAGES:
        return "Redis doesn't answer."
    return ""


class Endpoint:
    """A WSGI app.

    Args:
        desk: the producer's source.
        connection: to Redis.
        redis_url: its address.
        created: the column that says when a row was added.
        access: who may come in; where there is nothing to know, all.
    """

    def __init__(self, desk: Desk, connection: Redis, redis_url: str, created: str | None, access: Access) -> None:
        self._desk = desk
        self._connection = connection
        self._redis_url = redis_url
        self._created = created
        self._access = access

    def __call__(self, environ: dict[str, Any], start: Start) -> list[bytes]:
        """Answer a request."""
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _say(start, "405 Method Not Allowed", b"Nothing can be changed here.\n")
        if path == "/healthz":
            return _say(start, "200 OK", b"ok")
        if self._access.is_guarded and not self._access.admits(environ.get("HTTP_AUTHORIZATION")):
            return _say(start, "401 Unauthorized", b"Log in.\n", [("WWW-Authenticate", 'Basic realm="nih-sched"')])
        if path == "/readyz":
            lacks = missing(self._desk, self._connection)
            return _say(start, "503 Service Unavailable" if lacks else "200 OK", (lacks or "ready").encode())
        if path != "/metrics":
            return _say(start, "404 Not Found", b"There are /metrics, /healthz and /readyz.\n")
        try:
            return _say(
                start, "200 OK", exposition(self._desk, lambda: self._redis_url, self._created), kind=CONTENT_TYPE
            )
        except SQLAlchemyError:
            return _say(start, "503 Service Unavailable", b"The database doesn't answer.\n")


def _say(
    start: Start, status: str, body: bytes, headers: Iterable[tuple[str, str]] = (), kind: str = "text/plain"
) -> list[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"), *headers])
    return [body]


def serve_beside(app: Endpoint, host: str, port: int) -> Callable[[], None]:
    """Serve an app in a thread of its own; return what ends that.

    Raises:
        UsageError: nobody can listen there.
    """
    try:
        server = waitress.server.create_server(app, host=host, port=port, ident="", threads=2, max_request_body_size=1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(reason=f"Metrics can't be served on {host}, port {port}: {reason}.") from None
    threading.Thread(target=server.run, daemon=True, name="nih-sched-metrics").start()
    return server.close  # type: ignore[no-any-return]
