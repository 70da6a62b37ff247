"""What a worker process has ready before it runs anything: settings, database, and its configured handler."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import clock, host, sample, settings, telemetry
from nih_sched.counts import Memory
from nih_sched.keeper import Slot, new_lease, vouched_until
from nih_sched.runner.hand import new_hand
from nih_sched.runner.handler import Handler, import_module, load, resolve
from nih_sched.runner.portion import Portion
from nih_sched.runner.traces import Traces
from nih_sched.settings import Settings
from nih_sched.store import Desk, Leases, open_desk, source_desk, source_facts
from nih_sched.store.desk import FOREVER

_here: Site | None = None


@dataclass
class Site:
    """One process's means. Which code runs comes from here alone, never from Redis or from a row."""

    settings: Settings
    desk: Desk
    handler: Handler
    worker: str = ""
    owns_process: bool = True
    counts: Memory | None = None  # what a stock worker's horse has counted: it shares no pipe with anybody
    slot: Slot | None = None  # where our keeper finds us; a stock worker's horse makes its own
    horse_started: bool = False
    traces: Traces = field(default_factory=Traces)  # this process as it was before its first row
    pid: int = field(default_factory=os.getpid)
    tired: bool = False  # rows have left something behind: the next ones are for a new horse
    _portions: dict[str, Portion] = field(default_factory=dict)
    _known: dict[str, tuple[str, Desk]] = field(default_factory=dict)

    def serves(self, source: str) -> bool:
        """Whether this worker was configured for the source."""
        return source == self.desk.source.name

    def look_before_rows(self) -> None:
        """Before a job's first row. A process that nobody replaces goes on with what rows have left there."""
        if self.tired or self.traces.pid != os.getpid():
            self.traces, self.tired = Traces(), False
        else:
            self.traces.again()

    @property
    def is_watched(self) -> bool:
        """In a horse: whether a worker of ours has forked it, which is told of its outcomes."""
        return self.slot is not None and self.slot.worker != os.getpid()

    def portion(self, desk: Desk) -> Portion:
        """How many rows of this source to read at once, as was learned so far."""
        if desk.source.name not in self._portions:
            wanted = [desk.rows.table.columns[name] for name in self.handler.columns]
            self._portions[desk.source.name] = Portion(wanted)
        return self._portions[desk.source.name]

    def flush(self) -> None:
        """Let out what the handler printed: RQ ends a horse without that. Nobody may be reading it any more."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()

    def desk_for(self, source: str, patience: float = FOREVER) -> Desk | None:
        """The desk of a source as its producer wrote it down; None when there is no such source.

        Args:
            source: its name.
            patience: seconds for which a database that is away is tried.
        """
        own = self.desk
        facts = own.insist(lambda: source_facts(own.engine, own.ledger, source), patience=patience)
        if facts is None:
            return None
        known = self._known.get(source)
        if known is None or known[0] != facts:
            # Reflecting is dear: only when it is new, or its producer came back with other words.
            known = facts, own.insist(partial(source_desk, own.engine, own.ledger, source, facts), patience=patience)
            self._known[source] = known
        return known[1]

    def known_desk(self, source: str) -> Desk | None:
        """The desk of a source as this process knows it; its producer may have written it down anew since."""
        known = self._known.get(source)
        return known[1] if known else None

    def learn(self, source: str) -> None:
        """In the worker, before it forks: know the source's table, so that no horse has to reflect it."""
        if source not in self._known:
            self.desk_for(source)
            self.close()

    def forked(self) -> None:
        """In a new child: its parent's database connections are not its own. They are dropped, not closed."""
        if self.pid != os.getpid():
            self.desk.engine.dispose(close=False)
            self.pid = os.getpid()

    def close(self) -> None:
        """Close the connections, as before a fork."""
        if self.owns_process:
            self.desk.close()

    def take_lease(self, slot: Slot, pid: int) -> None:
        """Have a process's life presumed by a lease of its own, and the slot's keeper renew it."""
        self.slot = slot
        lease, seconds = new_lease(), self.settings.lease
        when = host.born(pid) or 0
        sent = clock.boot()
        leases = Leases(self.desk.engine, self.desk.ledger)
        self.desk.insist(
            lambda: leases.take(lease, worker=self.worker, host=host.host_id(), pid=pid, born=when, seconds=seconds)
        )
        slot.occupy(pid, when, lease, vouched_until(sent, seconds))

    def leave_lease(self) -> None:
        """At this process's end: nothing of it runs any more. Without a database the lease runs out by itself."""
        if self.slot is not None and self.slot.worker == os.getpid():
            with contextlib.suppress(SQLAlchemyError):
                Leases(self.desk.engine, self.desk.ledger).release(self.slot.lease)
                self.slot.leave()


def prepare(
    configured: Settings, desk: Desk | None = None, handler: Handler | None = None, *, owns_process: bool = True
) -> Site:
    """Make this process's site: preload, import the handler, reach the database.

    Args:
        configured: which source, with which handler.
        desk: the source's desk where it is open already.
        handler: the handler where the caller has it as a function.
        owns_process: False in a caller's own process, whose connections and signals must be left alone.

    Raises:
        NihError: whatever is wrong, before any row is touched.
    """
    global _here  # noqa: PLW0603 - RQ calls our function by name: a process has one site
    if configured.preload:
        preload(configured.preload)
    desk = desk or open_desk(configured)
    handler = handler or handler_for(configured, desk)
    if configured.on_horse_start:
        load(configured.on_horse_start)
    if not owns_process:
        new_hand()  # this process's may be closed, and no worker opens it again: rows would come back for ever
    _here = Site(configured, desk, handler, owns_process=owns_process)
    return _here


def made() -> Site | None:
    """This process's site if it has one, from its parent too; then without that one's connections."""
    if _here is not None:
        _here.forked()
    return _here


def handler_for(configured: Settings, desk: Desk) -> Handler:
    """The configured handler, or the stand-in on our own sample table."""
    columns = desk.rows.columns
    stand_in = sample.STAND_IN if sample.is_sample(desk.engine, desk.ledger, desk.rows.name, columns) else None
    return resolve(configured, str(configured.table), columns, stand_in)


def preload(path: str) -> None:
    """Import a module, or call module:function, as --preload says."""
    if ":" in path:
        load(path)()
    else:
        import_module(path, path)


def here() -> Site:
    """This process's site. Under a stock RQ worker nobody has made it: it is made from environment and config file."""
    if _here is None:
        made_here = prepare(settings.load({}, os.environ, folder=Path()))
        made_here.counts = Memory()
        telemetry.subscribe(made_here.counts)
        return made_here
    return _here


def clear() -> None:
    """Forget the site, as a test or a drain does at its end."""
    global _here  # noqa: PLW0603
    _here = None
