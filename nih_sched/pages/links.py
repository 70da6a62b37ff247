"""Where the pages lead, and what one says to the next: codes and numbers, never a text that an address could hold."""

from __future__ import annotations

from typing import Any

import flask

DONE = {
    "requeued": "Requeued.",
    "cancelled": "Cancelled.",
    "stopping": "Cancelled: it is stopped within 5 s.",
    "unchanged": "Not changed: it is in another state by now.",
    "runs": "Not cancelled: it runs by now. To stop it, cancel it once more and confirm.",
}
MOST = 10**12  # rows; more is nothing that we have said


def row(key: str, **more: Any) -> str:
    """A row's page, by its key as show_key() shows it."""
    return flask.url_for("pages.row" if _fits_a_path(key) else "pages.row_of", key=key, **more)


def rows(asked: dict[str, str]) -> str:
    """The list of rows, as it was asked for."""
    given: dict[str, Any] = {name: value for name, value in asked.items() if value}
    return flask.url_for("pages.rows", **given)


def told(left: int = 0, *, more: bool = False) -> str:
    """What the page before has to say; "" if nothing.

    Args:
        left: how many rows of the group are still failed.
        more: not all of them were counted.
    """
    code, count = flask.request.args.get("done", ""), flask.request.args.get("count", "")
    if code != "group":
        return DONE.get(code, "")
    if not (count.isdecimal() and len(count) < len(str(MOST))):
        return ""
    done = f"Requeued {int(count):,} rows."
    if left:
        return f"{done} {'At least ' if more else ''}{left:,} of the group are left: press again."
    return done


def _fits_a_path(key: str) -> bool:
    # Browsers, proxies and routers have ways of their own with dots, double slashes and line ends.
    return key.isprintable() and all(part not in ("", ".", "..") for part in key.split("/"))
