"""Leases: taken by workers, renewed by keepers, ended by whoever saw the death. No clock but the database's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, delete, insert, select, update

from nih_sched.dialects import After, dialect_of
from nih_sched.ledger import Ledger

T = TypeVar("T")


@dataclass(frozen=True)
class Lease:
    """Whose life is presumed, as its record says."""

    id: str
    worker: str
    host: str
    pid: int
    born: int
    horse: int | None
    horse_born: int | None
    seconds: float
    beat: int
    died: str | None


@dataclass(frozen=True)
class Hold:
    """A horse's hold on its worker's lease: how it is to be renewed, and how the horse is found on its host."""

    lease: str
    seconds: float
    horse: int
    horse_born: int | None


class Leases:
    """Statements on nih_sched_leases; each is short, and raises what the database raises."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self._engine = engine
        self._leases = ledger.leases
        self._attempts = ledger.attempts

    def take(self, lease: str, *, worker: str, host: str, pid: int, born: int, seconds: float) -> None:
        """Begin a lease. Taking it again changes nothing."""
        c = self._leases.c
        values = {
            "id": lease,
            "worker": worker[:190],
            "host": host,
            "pid": pid,
            "born": born,
            "seconds": seconds,
            "beat": 0,
            "lease_until": After(seconds),
        }

        def write(connection: Connection) -> None:
            if connection.execute(select(c.id).where(c.id == lease)).first() is None:
                connection.execute(insert(self._leases).values(values))

        self._write(write)

    def renew(self, leases: Sequence[str], seconds: float) -> set[str]:
        """Renew these; return those that are still accepted. The others are dead for everyone: stop what they run."""
        c = self._leases.c
        alive = c.id.in_(leases) & c.died.is_(None)
        statement = update(self._leases).where(alive).values(beat=c.beat + 1, lease_until=After(seconds))
        if self._at_once(lambda connection: connection.execute(statement).rowcount) == len(leases):
            return set(leases)
        return set(self._read(lambda connection: connection.execute(select(c.id).where(alive)).scalars().all()))

    def release(self, lease: str) -> None:
        """End the lease of a worker that has nothing in hand any more."""
        self._at_once(lambda connection: connection.execute(delete(self._leases).where(self._leases.c.id == lease)))

    def all(self, host: str | None = None) -> list[Lease]:
        """Every lease there is, or those of one host: about one for each worker process."""
        c = self._leases.c
        query = select(c.id, c.worker, c.host, c.pid, c.born, c.horse, c.horse_born, c.seconds, c.beat, c.died)
        if host is not None:
            query = query.where(c.host == host)
        return [Lease(*row) for row in self._read(lambda connection: connection.execute(query).all())]

    def end(self, lease: str, how: str, beat: int | None = None) -> bool:
        """Declare a lease dead; with `beat`, only if it hasn't been renewed since it had that."""
        c = self._leases.c
        statement = update(self._leases).where(c.id == lease, c.died.is_(None))
        if beat is not None:
            statement = statement.where(c.beat == beat)
        return bool(self._at_once(lambda connection: connection.execute(statement.values(died=how[:400])).rowcount))

    def forget_dead(self) -> None:
        """Drop dead leases under which no attempt is left to be ended."""
        open_ones = select(self._attempts.c.lease).where(
            self._attempts.c.open_key > "", self._attempts.c.lease.is_not(None)
        )
        dead = self._leases.c.died.is_not(None)

        def write(connection: Connection) -> None:
            used = set(connection.execute(open_ones).scalars())
            gone = [i for i in connection.execute(select(self._leases.c.id).where(dead)).scalars() if i not in used]
            if gone:
                connection.execute(delete(self._leases).where(self._leases.c.id.in_(gone), dead))

        self._write(write)

    def forget_connections(self) -> None:
        """Have the next statement run on a new connection."""
        dialect_of(self._engine).forget_connections(self._engine)

    def _write(self, work: Callable[[Connection], T]) -> T:
        with self._engine.begin() as connection:
            dialect_of(self._engine).begin(connection)
            return work(connection)

    def _at_once(self, work: Callable[[Connection], Any]) -> Any:
        # In the middle of a transaction we could freeze, and keep others from declaring us dead.
        return dialect_of(self._engine).write_at_once(self._engine, work)

    def _read(self, work: Callable[[Connection], Any]) -> Any:
        return dialect_of(self._engine).read(self._engine, work)
