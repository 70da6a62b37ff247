"""scheduler dashboard."""

from __future__ import annotations

from collections.abc import Callable

import click
import flask
from redis import Redis

from nih_sched import broker, web
from nih_sched.access import Access
from nih_sched.cli import listen
from nih_sched.cli.options import DASHBOARD, LOOK, settings_options
from nih_sched.errors import BadLedger, DatabaseRefused, NoSuchTable, UnreachableDatabase
from nih_sched.pages import Place, make_blueprint
from nih_sched.settings import Settings
from nih_sched.store import Desk, open_desk
from nih_sched.supervisor import redis_for


@click.command()
@settings_options(dict.fromkeys((*DASHBOARD, *LOOK, "log_format", "quiet", "config")))
def dashboard(settings: Settings) -> None:
    """Serve pages on your table, and rq-dashboard at /rq, behind a password.

    Overview, rows, failures; requeue, cancel and pause. Only this machine can reach it unless --dashboard-host says
    otherwise. Without the table, rq-dashboard alone is served.
    """
    listen(settings)
    access = Access(settings.dashboard_password, settings.dashboard_token, settings.dashboard_read_only)
    with redis_for(settings) as redis_url:
        broker.connect(redis_url).close()
        desk, why = _desk(settings)
        web.serve(
            redis_url,
            host=settings.dashboard_host,
            port=settings.dashboard_port,
            access=access,
            pages=None if desk is None else _pages(settings, desk, redis_url),
            serializer=broker.SERIALIZER,
            ready=lambda text: click.echo(f"{text}{why}", err=True),
        )


def _desk(settings: Settings) -> tuple[Desk | None, str]:
    try:
        return open_desk(settings), ""
    except (NoSuchTable, UnreachableDatabase, DatabaseRefused, BadLedger) as error:
        return None, f"\nOnly /rq is served: {error}"


def _pages(settings: Settings, desk: Desk, redis_url: str) -> web.Pages:
    def make(token: Callable[[], str], who: Callable[[], str], client: Redis) -> flask.Blueprint:
        place = Place(
            desk=desk,
            settings=settings,
            redis_url=lambda: redis_url,
            redis=lambda: client,
            read_only=settings.dashboard_read_only,
            token=token,
            who=who,
        )
        return make_blueprint(place)

    return make
