"""Below which id nothing can have happened since an instant, so that a look at what was lately needn't read it all.

The ledger has no index on the times of an attempt: one more would cost every row something. Instead it is noted once a
minute, while rows move and until all that moved is covered, which claims had ended by then.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError

from nih_sched import clock
from nih_sched.dialects import Between, Now
from nih_sched.store.desk import Desk
from nih_sched.store.history import minute_now
from nih_sched.store.looks import Looks

NOTE = "all_ended_below"  # in nih_sched_counts, by the minute: claims with smaller ids had ended by then
EVERY = 60.0  # seconds between two notes; no transaction that opens claims takes longer
OLD = 2 * EVERY  # seconds after its instant, as reckoned at its transaction's begin, no smaller id can be unseen
NEAR = 1000  # records of the ledger's end among which the newest claim is looked for
PATIENCE = 0.5  # seconds for which the database may be busy


class Horizon:
    """Writes notes of one source, which are true of all claims in its ledger, and reads them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._seen: tuple[float, int] | None = None  # when the newest id was looked at last, and which it was
        self._is_behind = True

    def moved(self) -> None:
        """Rows have moved, of which no note of ours tells."""
        self._is_behind = True

    def note(self) -> None:
        """Note what has ended, if it is time, and if not all has been noted.

        Others of this source may do so too: each minute's first note stands.
        """
        now = clock.monotonic()
        if not self._is_behind:
            return
        if self._seen is not None and now - self._seen[0] < EVERY:
            return
        before = self._seen[1] if self._seen is not None else self._long_ago()
        first, more, last = Looks(self._desk).open_ends()
        self._seen = now, last or 0
        if last is None:
            self._is_behind = False
        # A claim whose transaction hasn't ended yet isn't seen, and may have a smaller id than those that are.
        if before is None or more:
            return
        below = before + 1 if first is None else min(before + 1, first)
        its = {"source": self._desk.source.name, "minute": self._desk.read(minute_now), "name": NOTE, "value": below}
        statement = insert(self._desk.ledger.counts).values(its)
        try:
            self._desk.transact(lambda x: x.execute(statement), patience=PATIENCE)
        except IntegrityError:
            return
        self._is_behind = last is not None and below <= last

    def _long_ago(self) -> int | None:
        """The newest claim's id, if none that isn't seen can have a smaller one, because it is old."""
        c = self._desk.ledger.attempts.c
        newest = select(func.max(c.id)).scalar_subquery()
        # Copies of earlier attempts have ids of their own, and times that are older than those.
        claims = select(c.id, Between(c.claimed_at, Now())).where(c.id > newest - NEAR, c.of_claim.is_(None))
        found = self._desk.read(lambda x: x.execute(claims.order_by(c.id.desc()).limit(1)).one_or_none())
        return int(found[0]) if found is not None and found[1] > OLD else None

    def below(self, instant: datetime) -> int | None:
        """The id below which nothing has happened at or after an instant; None where nobody has noted that."""
        c = self._desk.ledger.counts.c
        its = (c.source == self._desk.source.name) & (c.name == NOTE) & (c.minute > 0)
        query = select(c.value).where(its, c.minute < int(instant.timestamp()) // 60)  # that minute was over by then
        found = self._desk.read(lambda x: x.execute(query.order_by(c.minute.desc()).limit(1)).scalar())
        return None if found is None else int(found)
