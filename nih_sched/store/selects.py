"""The SELECTs of rows that a person asks for."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, and_, literal, literal_column, or_, select, union_all
from sqlalchemy.types import Text

from nih_sched.model import Key
from nih_sched.store.desk import Desk
from nih_sched.store.order import beyond, in_key_order
from nih_sched.store.selection import Selection


class Selects:
    """Those of a source's table."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._rows = desk.rows

    def rows(
        self,
        selection: Selection,
        after: Key | None,
        last: Key | None,
        limit: int,
        *,
        descending: bool,
        bare: bool = False,
        errors: dict[Key, str | None] | None = None,
    ) -> Select[Any]:
        """Rows that fit as far as SQL can tell, in the order of their keys.

        Args:
            selection: what is asked for.
            after: only rows behind this key.
            last: only rows up to this key.
            limit: how many at most.
            descending: whether the greatest keys come first.
            bare: select their keys alone.
            errors: only rows with these keys, and the `error` that their `where` speaks of.
        """
        rows, table = self._rows, self._rows.table
        query = select(*(rows.keys if bare else table.columns))
        if errors is not None and "error" not in rows.columns:
            given = self._given(errors)
            same = [key == given.c[f"nih_sched_{n}"] for n, key in enumerate(rows.keys)]
            query = query.select_from(table.join(given, and_(*same)))
        elif errors is not None:
            query = query.where(rows.keyed(list(errors)))
        if selection.words is not None:
            query = query.where(or_(*(self._desk.dialect.is_word(rows.status, one) for one in selection.words)))
        if selection.where:
            # On a line of its own, so that a comment at its end doesn't swallow our parenthesis.
            query = query.where(literal_column(f"({selection.where}\n)"))
        if after is not None:
            query = query.where(beyond(rows.keys, after, descending))
        if last is not None:
            query = query.where(or_(beyond(rows.keys, last, not descending), rows.keyed([last])))
        return query.order_by(*in_key_order(rows.keys, descending)).limit(limit)

    def sorted_later(self, query: Select[Any], limit: int, descending: bool) -> Select[Any]:
        """The same rows, found in whatever order the database likes, and sorted then: OFFSET keeps it from asking."""
        found = query.order_by(None).limit(None).offset(literal_column("0")).subquery("nih_sched_found")
        columns = [found.c[key.name] for key in self._rows.keys]
        return select(*found.c).order_by(*in_key_order(columns, descending)).limit(limit)

    def _given(self, errors: dict[Key, str | None]) -> Any:
        """A table of keys and the errors that the ledger has for them."""
        selects = [
            select(
                *(
                    literal(part, column.type).label(f"nih_sched_{n}")
                    for n, (part, column) in enumerate(zip(key, self._rows.keys, strict=True))
                ),
                literal(error, Text()).label("error"),
            )
            for key, error in errors.items()
        ]
        return union_all(*selects).subquery("nih_sched_given") if len(selects) > 1 else selects[0].subquery("given")
