"""Checks of the user's rows, and of what we keep of them."""

from __future__ import annotations

from nih_sched.doctor.finding import Finding, Visit
from nih_sched.model import State, show_key
from nih_sched.store import Desk, Orphan, Orphans
from nih_sched.store.listing import LONGEST
from nih_sched.store.orphans import Search

MOST = 10_000  # rows that one finding looks for
SHOWN = 10
LARGE = 10_000  # rows from which on a table wants an index
HEAVY = 20_000_000  # records from which on a ledger is worth a word


def orphans(visit: Visit) -> list[Finding]:
    """Rows in a state of ours that nobody will move."""
    return orphans_of(visit.desk)


def orphans_of(desk: Desk, seconds: float = LONGEST) -> list[Finding]:
    """As orphans(); looks for `seconds` at most, and says so where that wasn't enough."""
    orphans = Orphans(desk)
    search = orphans.find(MOST, seconds)
    told = [_orphans(orphans, search.orphans)] if search.orphans else []
    return told + ([_unsearched(desk, search, seconds)] if search.was_cut else [])


def _orphans(orphans: Orphans, found: list[Orphan]) -> Finding:
    words = sorted({str(orphan.word) for orphan in found})
    keys = ", ".join(show_key(orphan.key) for orphan in found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
    ended = sum(orphan.state is not State.READY for orphan in found)
    many = f"{len(found)} or more" if len(found) == MOST else str(len(found))
    return Finding(
        "orphans",
        f"{many} rows are {' or '.join(words)} with no open claim behind them: {keys}",
        "Nobody runs them, and nobody will: a backup was restored, our tables were emptied, or the database "
        "refused the row its last state.",
        "scheduler doctor --fix sets them back to ready"
        + (f", {ended} of them to the state in which they ended." if ended else "."),
        fix=lambda: f"Set {orphans.put_right(found)} rows to where they belong.",
    )


def _unsearched(desk: Desk, search: Search, seconds: float) -> Finding:
    rows = desk.rows
    looked = "None" if search.behind is None else f"Only those from the greatest key down to {show_key(search.behind)}"
    return Finding(
        "orphans-unsearched",
        f"{looked} of the rows of {rows.name} were looked at, for such with no open claim: {seconds:g} s were over",
        "Beyond, rows may be queued or started that nobody runs.",
        f"An index that begins with {rows.status.name} has them found at once.",
        is_problem=False,
    )


def words(visit: Visit) -> list[Finding]:
    """Words in the status column that aren't ours: perhaps a misspelt ready word."""
    rows = visit.desk.rows
    counts = visit.checkup.newest_words(MOST)
    ours = set(rows.words.values())
    strange = {word: count for word, count in counts.items() if word not in ours}
    if not strange:
        return []
    shown = [f"{word!r} ({count})" for word, count in sorted(strange.items(), key=lambda item: -item[1])[:SHOWN]]
    alike = [str(word) for word in strange if _plain(word) in {_plain(one) for one in ours}]
    hint = f" {', '.join(alike)} differs from a word of ours in case or blanks alone." if alike else ""
    return [
        Finding(
            "unknown-words",
            f"{rows.status.name} has words that are no state of ours, among the newest {MOST:,} rows: "
            + ", ".join(shown),
            f"Such rows are left alone.{hint}",
            "If they should run, name their word: --ready-val. If they end states of yours, all is well.",
            is_problem=False,
        )
    ]


def _plain(word: object) -> str:
    return str(word).strip().lower()


def index(visit: Visit) -> list[Finding]:
    """A large table without an index by which a claim finds its rows."""
    desk = visit.desk
    if visit.checkup.is_indexed() or not visit.checkup.has_more_rows_than(LARGE):
        return []
    rows = desk.rows
    ddl = desk.dialect.index_ddl(rows.table, rows.status, rows.words[State.READY], rows.keys)
    return [
        Finding(
            "no-index",
            f"{rows.name} has more than {LARGE:,} rows, and no index that begins with {rows.status.name} or is of "
            "ready rows alone",
            "Each claim reads the whole table.",
            f"{ddl};  (or: scheduler init --create-index)",
            is_problem=False,
        )
    ]


def ledger(visit: Visit) -> list[Finding]:
    """A ledger that nobody prunes."""
    records = visit.checkup.ledger_span()
    if records < HEAVY:
        return []
    return [
        Finding(
            "large-ledger",
            f"The ledger may hold up to {records:,} records",
            "They cost disk and backups, not speed.",
            "scheduler prune-history --older-than 30d",
            is_problem=False,
        )
    ]
