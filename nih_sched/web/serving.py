"""The dashboard's server: a port that is open until a signal ends it."""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import waitress.server

from nih_sched.access import Access
from nih_sched.errors import UsageError
from nih_sched.metrics import is_loopback
from nih_sched.web.app import Pages, make_app


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
    made_up = "" if access.is_guarded else _make_up_password(host)
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
