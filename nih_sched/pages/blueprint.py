"""The pages' routes. GET only looks; each POST is a change, which the app that mounts us has checked by then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flask
from redis import Redis
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError
from werkzeug.wrappers import Response

from nih_sched import reports, steer
from nih_sched.dialects.base import reason
from nih_sched.errors import NihError, NoSuchRow, UsageError
from nih_sched.metrics.endpoint import missing
from nih_sched.metrics.exposition import CONTENT_TYPE, exposition
from nih_sched.model import State, show_key
from nih_sched.pages import chart, links
from nih_sched.reports import words
from nih_sched.reports.shown import plain
from nih_sched.settings import Settings
from nih_sched.store import Desk
from nih_sched.store.history import NOT_BY_US, History
from nih_sched.store.listing import LONGEST
from nih_sched.store.rows import parse_key
from nih_sched.store.unreadable import Unreadable

PAGES = "pages"
ROWS = 50  # on one page
QUICK = 0.25  # seconds for which failures are looked for, until somebody asks for more
GROUP_SECONDS = 5.0  # for which a press requeues rows of a group; a chunk that has begun is ended
STATES = tuple(state.value for state in State)
SPANS = {"15m": 900.0, "1h": 3600.0, "1d": 86400.0, "7d": 604800.0}
ENDED = tuple(state.value for state in steer.ENDED)


@dataclass(frozen=True)
class Place:
    """What the pages show.

    Args:
        desk: the source's.
        settings: where Redis is, what --where says.
        redis_url: finds the Redis of this moment; None while there is none.
        redis: an open client, for what is told there; None while there is none.
        read_only: no buttons: the app refuses each change anyway.
        token: what each form carries, so that the app knows it for its own.
        who: asks for a change, in words.
    """

    desk: Desk
    settings: Settings
    redis_url: Callable[[], str | None]
    redis: Callable[[], Redis | None]
    read_only: bool
    token: Callable[[], str]
    who: Callable[[], str]


def make_blueprint(place: Place) -> flask.Blueprint:
    """The pages of one source, to be mounted at the root."""
    pages = flask.Blueprint(
        PAGES, __name__, template_folder="templates", static_folder="static", static_url_path="/own"
    )
    looks: dict[str, Callable[..., Any]] = {
        "/": overview,
        "/rows": rows,
        "/rows/<path:key>": row,
        "/row": row_of,
        "/failures": failures,
        "/metrics": scrape,
        "/readyz": ready,
    }
    changes: dict[str, Callable[..., Any]] = {
        "/pause": pause,
        "/resume": resume,
        "/requeue": requeue,
        "/cancel": cancel,
        "/requeue-group": requeue_group,
    }
    for methods, views in ((["GET"], looks), (["POST"], changes)):
        for rule, view in views.items():
            pages.add_url_rule(rule, view.__name__, partial(view, place), methods=methods)
    pages.register_error_handler(NihError, partial(_mistaken, place))
    pages.register_error_handler(SQLAlchemyError, partial(_unreachable, place))
    return pages


def overview(place: Place) -> str:
    """How the source does."""
    status = reports.status(place.desk, place.redis_url(), created=place.settings.created_column)
    drawn = chart.draw(reports.hour(place.desk))
    return _render(place, "overview", status=status, chart=drawn)


def rows(place: Place) -> str:
    """Rows by state, text and time."""
    asked = flask.request.args
    state, text, since = asked.get("state", ""), asked.get("text", ""), asked.get("since", "")
    error, after = asked.get("error", ""), asked.get("after", "")
    newest = asked.get("order", "newest") == "newest"
    selection = reports.select(
        place.desk, state=state or None, text=text or None, error=error or None, since=_span(since)
    )
    key = parse_key(place.desk, after) if after else None
    found = reports.rows(place.desk, selection, ROWS, after=key, descending=newest)
    beyond = found.next or found.stopped
    kept = {"state": state, "text": text, "since": since, "error": error, "order": "newest" if newest else "oldest"}
    return _render(
        place,
        "rows",
        found=found,
        asked=kept,
        states=STATES,
        spans=SPANS,
        longest=f"{LONGEST:g}",
        further=None if beyond is None else links.rows(kept | {"after": show_key(beyond)}),
        first=links.rows(kept) if after else None,
    )


def row(place: Place, key: str) -> str:
    """One row: why it isn't running, and each attempt."""
    its = parse_key(place.desk, key)
    why = reports.why(place.desk, its, place.redis_url(), where=place.settings.where)
    shown = reports.show(place.desk, its)
    may = {"requeue": shown.state in ENDED, "cancel": shown.state not in ENDED}
    runs = any(one.record.is_running for one in shown.attempts)
    return _render(place, "row", why=why, shown=shown, may=may, runs=runs, done=links.told())


def row_of(place: Place) -> str:
    """One row, where its key can't stand in a path."""
    if (key := flask.request.args.get("key")) is None:
        raise UsageError(reason="No row was named.")
    return row(place, key)


def failures(place: Place) -> str:
    """Failed rows by the kind and place of their errors."""
    error = flask.request.args.get("error", "")  # of which group rows were requeued just now
    further = bool(error) or "further" in flask.request.args
    found = reports.groups(place.desk, LONGEST if further else QUICK)
    left = next((one.count for one in found.groups if one.error == error), 0)
    done = links.told(left=left, more=found.was_cut)
    return _render(place, "failures", found=found, done=done, may_look_further=found.was_cut and not further)


def scrape(place: Place) -> flask.Response:
    """For Prometheus."""
    text = exposition(place.desk, place.redis_url, place.settings.created_column)
    return flask.Response(text, content_type=CONTENT_TYPE)


def ready(place: Place) -> flask.Response:
    """Whether database and Redis answer."""
    client = place.redis()
    lacks = missing(place.desk, client) if client is not None else ""
    return flask.Response(lacks or "ready", 503 if lacks else 200, mimetype="text/plain")


def pause(place: Place) -> Response:
    """Let no row start."""
    why = flask.request.form.get("reason", "").strip()[:1000]
    steer.pause(place.desk, place.who(), why or None, connection=place.redis())
    return _back(flask.url_for(".overview"))


def resume(place: Place) -> Response:
    """End the pause."""
    steer.resume(place.desk, place.who(), connection=place.redis())
    return _back(flask.url_for(".overview"))


def requeue(place: Place) -> Response:
    """A row back to ready."""
    key = parse_key(place.desk, _named())
    result = steer.requeue(place.desk, [key], place.who(), connection=place.redis())
    return _back(links.row(show_key(key), done="requeued" if result.changed else "unchanged"))


def cancel(place: Place) -> Response:
    """A row never starts, or is stopped; one that runs only if that is what was asked for."""
    key = parse_key(place.desk, _named())
    if "running" not in flask.request.form and any(one.is_running for one in History(place.desk).of(key)):
        return _back(links.row(show_key(key), done="runs"))
    result = steer.cancel(place.desk, [key], place.who(), connection=place.redis())
    done = "stopping" if result.running else "cancelled" if result.changed else "unchanged"
    return _back(links.row(show_key(key), done=done))


def requeue_group(place: Place) -> Response:
    """The failed rows of one kind and place back to ready, as many as there is time for."""
    error = flask.request.form.get("error", "")
    if not error:
        raise UsageError(reason="No group was named.")
    selection = reports.select(place.desk, state=State.FAILED.value, error=error)
    left_out: list[Unreadable] = []
    keys = reports.keys(place.desk, selection, seconds=GROUP_SECONDS, left_out=left_out)
    result = steer.requeue(place.desk, keys, place.who(), connection=place.redis())
    # The ledger knows nothing of a row that can't be named, so it is of no other group.
    odd = links.numbers(left_out) if error == NOT_BY_US else {}
    return _back(flask.url_for(".failures", done="group", count=result.changed, error=error, **odd))


def _named() -> str:
    # From the address: a form would change line ends in a key.
    return flask.request.values.get("key", "")


def _back(url: str) -> Response:
    return flask.redirect(url, code=303)


def _span(text: str) -> float | None:
    if not text:
        return None
    if text not in SPANS:
        raise UsageError(reason=f"There is no such time as {text!r}: expected {', '.join(SPANS)}.")
    return SPANS[text]


def _mistaken(place: Place, error: NihError) -> tuple[str, int]:
    status = 404 if isinstance(error, NoSuchRow) else 400 if isinstance(error, UsageError) else 503
    return _render(place, "mistake", sentence=str(error)), status


def _unreachable(place: Place, error: SQLAlchemyError) -> tuple[str, int]:
    # A value that can't be had, in a row or in the address, is nobody's outage.
    odd = isinstance(error, DBAPIError) and (isinstance(error, DataError) or place.desk.dialect.is_about_a_value(error))
    return _render(place, "mistake", sentence=f"The database answered: {reason(error)}"), 400 if odd else 503


def _render(place: Place, name: str, **facts: Any) -> str:
    desk = place.desk
    return flask.render_template(
        f"pages/{name}.html",
        table=desk.rows.name,
        source=desk.source.name,
        read_only=place.read_only,
        token=place.token(),
        row_url=links.row,
        words=words,
        plain=plain,
        show_key=show_key,
        **facts,
    )
