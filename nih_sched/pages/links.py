"""Where the pages lead, and what one says to the next: codes and numbers, never a text that an address could hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flask

from nih_sched.store.unreadable import NAMED, Unreadable

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
    code, count = flask.request.args.get("done", ""), _number("count")
    if code != "group":
        return DONE.get(code, "")
    if count is None:
        return ""
    done, odd = f"Requeued {count:,} rows.", _number("odd") or 0
    if odd:
        rowids = [one for one in flask.request.args.get("rowids", "").split(",") if _is_number(one)]
        shown = ", ".join(rowids[:NAMED]) + (", …" if odd > len(rowids) else "")
        done += f" Left out {odd:,} whose keys can't be read" + (f": rowid {shown}." if rowids else ".")
    if left > odd:
        return f"{done} {'At least ' if more else ''}{left - odd:,} of the group are left: press again."
    return done


def numbers(left_out: Sequence[Unreadable]) -> dict[str, Any]:
    """Rows that a change has left out, for told()."""
    rowids = [str(one.number) for one in left_out if one.number is not None]
    return {"odd": len(left_out), "rowids": ",".join(rowids[:NAMED])} if left_out else {}


def _number(name: str) -> int | None:
    text = flask.request.args.get(name, "")
    return int(text) if _is_number(text) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < len(str(MOST))


def _fits_a_path(key: str) -> bool:
    # Browsers, proxies and routers have ways of their own with dots, double slashes and line ends.
    return key.isprintable() and all(part not in ("", ".", "..") for part in key.split("/"))
