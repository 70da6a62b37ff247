"""What is wrong with a source, why it matters, and what to type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nih_sched.model import State, show_key
from nih_sched.store import Desk, Orphans

MOST = 10_000  # rows that one finding looks for
SHOWN = 10


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    what: str
    why: str
    remedy: str
    fix: Callable[[], str]  # puts it right, and says what it did


def findings(desk: Desk) -> list[Finding]:
    """Everything that is wrong, the worst first; none means that all is well."""
    return _orphans(desk)


def _orphans(desk: Desk) -> list[Finding]:
    orphans = Orphans(desk)
    found = orphans.find(MOST)
    if not found:
        return []
    words = sorted({str(orphan.word) for orphan in found})
    keys = ", ".join(show_key(orphan.key) for orphan in found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
    ended = sum(orphan.state is not State.READY for orphan in found)
    many = f"{len(found)} or more" if len(found) == MOST else str(len(found))

    def fix() -> str:
        return f"Set {orphans.put_right(found)} rows to where they belong."

    return [
        Finding(
            what=f"{many} rows are {' or '.join(words)} with no open claim behind them: {keys}",
            why="Nobody runs them, and nobody will: a backup was restored, our tables were emptied, or the database "
            "refused the row its last state.",
            remedy="scheduler doctor --fix sets them back to ready"
            + (f", {ended} of them to the state in which they ended." if ended else "."),
            fix=fix,
        )
    ]
