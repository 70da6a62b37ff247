"""Which producer rescues a source's rows: a name in the source's record, and until when it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from sqlalchemy import Connection, case, or_, select, update

from nih_sched.dialects import After, Now
from nih_sched.store.desk import PATIENCE, Desk

HOLDS = 10.0  # seconds; with the looks between, another takes over within 15


class Leader:
    """One producer's claim to lead. That two lead at once, as when the database's clock jumps, harms nothing."""

    def __init__(self, desk: Desk, name: str, host: str, pid: int, born: int) -> None:
        self._desk = desk
        self._host = host
        self._me = json.dumps([name[:100], host, pid, born])

    def lead(self, lives: Callable[[int, int], bool]) -> bool:
        """Begin or go on to lead; False while another does.

        Args:
            lives: whether a process of this host is alive, by pid and birth: a dead one needn't be waited for.
        """
        sources = self._desk.ledger.sources
        mine = sources.c.name == self._desk.source.name
        # A clock that was set back leaves an instant far ahead.
        over = or_(sources.c.leader_until < Now(), sources.c.leader_until > After(2 * HOLDS))
        look = select(sources.c.leader, case((over, 1), else_=0)).where(mine)
        found, is_over = self._desk.read(lambda c: c.execute(look).one_or_none()) or (None, 0)
        same = sources.c.leader.is_(None) if found is None else sources.c.leader == found
        if found not in (None, self._me) and not self._is_dead(found, lives):
            if not is_over:
                return False
            same &= over  # it may renew, late, at this very moment
        statement = update(sources).where(mine, same).values(leader=self._me, leader_until=After(HOLDS))
        # One statement, no transaction: frozen in the middle of it, we would keep others from taking over.
        work = partial(self._desk.read, lambda c: c.execute(statement).rowcount)
        return bool(self._desk.insist(work, patience=PATIENCE))

    def resign(self) -> None:
        """Let another lead at once."""
        sources = self._desk.ledger.sources
        held = (sources.c.name == self._desk.source.name) & (sources.c.leader == self._me)

        def write(connection: Connection) -> None:
            connection.execute(update(sources).where(held).values(leader=None, leader_until=None))

        self._desk.transact(write, patience=1.0)

    def _is_dead(self, found: str, lives: Callable[[int, int], bool]) -> bool:
        _, host, pid, born = json.loads(found)
        return bool(host == self._host and not lives(pid, born))
