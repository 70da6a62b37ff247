"""/metrics and /readyz on the dashboard."""

from __future__ import annotations

import flask
from redis import Redis

from nih_sched.metrics.endpoint import missing
from nih_sched.metrics.exposition import CONTENT_TYPE, exposition
from nih_sched.store import Desk


def add_routes(pages: flask.Blueprint, desk: Desk, connection: Redis, created: str | None) -> None:
    """Have these pages answer what a monitor asks; who may ask is theirs to say.

    Args:
        pages: the dashboard's.
        desk: the source's.
        connection: to Redis.
        created: the column that says when a row was added.
    """

    def metrics() -> flask.Response:
        return flask.Response(exposition(desk, created), content_type=CONTENT_TYPE)

    def ready() -> flask.Response:
        lacks = missing(desk, connection)
        return flask.Response(lacks or "ready", 503 if lacks else 200, mimetype="text/plain")

    pages.add_url_rule("/metrics", "metrics", metrics)
    pages.add_url_rule("/readyz", "readyz", ready)
