"""What rows a person asks for; and which of some fit, as far as the ledger alone can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nih_sched.errors import UsageError
from nih_sched.model import Key, State, Word
from nih_sched.store.desk import Desk
from nih_sched.store.history import History, group_name, group_of
from nih_sched.table import fit

LEDGERS = re.compile(r"\berror\b", re.IGNORECASE)  # what --where may say of a row beyond its columns


@dataclass(frozen=True)
class Selection:
    """What rows are asked for; what isn't said doesn't matter.

    Args:
        words: the status column holds one of these.
        where: SQL over the row's columns, and `error`: the reason of the row's last failed attempt.
        since: something happened to the row, as the ledger has it, at or after this instant.
        text: its key, its texts or its last error contain this.
        error: its last failure is of this group, by kind and place.
        waiting: it waits for its next attempt (True), or doesn't (False).
    """

    words: tuple[Word, ...] | None = None
    where: str | None = None
    since: datetime | None = None
    text: str | None = None
    error: str | None = None
    waiting: bool | None = None

    @property
    def where_asks(self) -> bool:
        """Whether `where` asks for the row's last error."""
        return bool(self.where and LEDGERS.search(self.where))

    @property
    def asks_the_ledger(self) -> bool:
        """Whether the table alone can't tell."""
        return self.where_asks or any(one is not None for one in (self.since, self.text, self.error, self.waiting))

    @property
    def of_table(self) -> Selection:
        """As far as the table can tell."""
        return Selection(self.words, None if self.where_asks else self.where)


def fitting(history: History, selection: Selection, rows: Mapping[Key, Mapping[str, Any]]) -> set[Key]:
    """Which of these rows fit, but for their words and `where`; their values are needed where a text is asked for."""
    keys = set(rows)
    if selection.since is not None:
        keys &= history.since(list(keys), selection.since)
    if selection.error is not None or selection.waiting is not None:
        briefs = history.briefs(list(keys))
        group = None if selection.error is None else group_name(selection.error)
        if group is not None:
            keys = {key for key in keys if group_of(briefs.get(key, [])) == group}
        if selection.waiting is not None:
            waits = {key for key in keys if any(one.is_waiting for one in briefs.get(key, []))}
            keys = waits if selection.waiting else keys - waits
    if selection.text is not None:
        wanted = selection.text.casefold()
        here = {key for key in keys if any(wanted in str(value).casefold() for value in rows[key].values())}
        errors = history.last_errors(list(keys - here))
        keys = here | {key for key, error in errors.items() if wanted in error.casefold()}
    return keys


def words_of(desk: Desk, state: str) -> tuple[tuple[Word, ...], bool | None]:
    """The words that a person means by a state's name or a word, and whether such rows wait for a retry.

    Raises:
        UsageError: neither.
    """
    words = desk.rows.words
    if state in State.__members__.values():
        wanted = State(state)
        shared = words[State.RETRYING] == words[State.QUEUED] and wanted in (State.RETRYING, State.QUEUED)
        return (words[wanted],), (wanted is State.RETRYING) if shared else None
    for word in words.values():
        if str(word) == state:
            return (word,), None
    try:
        return (fit(desk.rows.status, state),), None
    except ValueError as error:
        names = ", ".join(one.value for one in State)
        raise UsageError(reason=f"{state!r} is no state: expected {names}, or a word ({error}).") from error
