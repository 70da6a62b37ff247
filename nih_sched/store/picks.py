"""Rows picked by state, by the user's own SQL and by age: their keys, page by page, in the order of the key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, literal_column, or_, select
from sqlalchemy.exc import DBAPIError

from nih_sched.dialects import After
from nih_sched.dialects.base import reason
from nih_sched.errors import UsageError
from nih_sched.ledger import of_rows
from nih_sched.model import Key, State, encode_key
from nih_sched.store.claims import CHUNK
from nih_sched.store.desk import Desk


@dataclass(frozen=True)
class Pick:
    """Which rows."""

    states: tuple[State, ...]
    where: str | None = None  # SQL over the table's columns
    since: float | None = None  # seconds within which a claim on the row was opened or has ended
    limit: int | None = None


def pages(desk: Desk, pick: Pick) -> Iterator[list[Key]]:
    """Their keys, some at a time, read anew for each page; some pages may be empty.

    Raises:
        UsageError: the user's SQL can't be used here; it changes nothing whatever it says.
    """
    after: Key | None = None
    left = pick.limit
    while left is None or left > 0:
        found = _page(desk, pick, after)
        fit = found if pick.since is None else _recent(desk, found, pick.since)
        if left is not None:
            fit = fit[:left]
            left -= len(fit)
        yield fit
        if len(found) < CHUNK:
            return
        after = found[-1]


def _page(desk: Desk, pick: Pick, after: Key | None) -> list[Key]:
    rows = desk.rows
    words = dict.fromkeys(rows.words[state] for state in pick.states)
    query = select(*rows.keys).where(or_(*(desk.dialect.is_word(rows.status, word) for word in words)))
    if pick.where is not None:
        query = query.where(literal_column(f"({pick.where}\n)"))
    if after is not None:
        query = query.where(_beyond(desk, after))
    query = query.order_by(*rows.keys).limit(CHUNK)
    try:
        with desk.dialect.reading_only(desk.engine) as connection:
            return [tuple(row) for row in connection.execute(query)]
    except DBAPIError as error:
        if pick.where is None or desk.dialect.is_transient(error):
            raise
        raise UsageError(reason=f"--where {pick.where!r} can't be used: {reason(error)}") from error


def _beyond(desk: Desk, key: Key) -> ColumnElement[bool]:
    # Said column by column: not every database finds its way along an index by comparing tuples.
    columns = desk.rows.keys
    return or_(
        *(
            and_(*(columns[before] == key[before] for before in range(number)), column > key[number])
            for number, column in enumerate(columns)
        )
    )


def _recent(desk: Desk, keys: Sequence[Key], seconds: float) -> list[Key]:
    c = desk.ledger.attempts.c
    by_text = {encode_key(key): key for key in keys}
    lately = func.coalesce(c.finished_at, c.claimed_at) >= After(-seconds)
    query = select(c.row_key).where(of_rows(desk.ledger.attempts, list(by_text)), c.of_claim.is_(None), lately)
    found = set(desk.read(lambda x: x.execute(query).scalars().all())) if keys else set()
    return [key for text, key in by_text.items() if text in found]
