"""The keeper: a small process that renews its horses' leases, and stops a horse that it can't vouch for.

It runs no user code and waits on nothing but the database, so that neither a handler in C code nor a lost Redis keeps
it from its work. Time is measured on the boot clock: it goes on while a machine sleeps, and no change of the date moves
it. A lease is renewed for `lease` seconds from before the statement was sent, so that our end of it never comes later
than the database's.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from nih_sched import clock, host, ledger
from nih_sched.dialects import connect
from nih_sched.errors import NihError
from nih_sched.keeper.slots import Slot, Slots
from nih_sched.settings import Settings
from nih_sched.store.leases import Leases

__all__ = ["Slot", "Slots", "keep", "new_lease", "start", "vouched_until"]

TICK = 0.1  # seconds between looks at the slots
CALM = 0.5  # the same, while no horse runs a row
PATROL = 5.0  # seconds between looks for deaths on this host that nobody of ours has seen
AWAY = 1.0  # seconds between tries while the database is away
DEATH = "its worker died"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def new_lease() -> str:
    """A lease's id."""
    return secrets.token_hex(16)


def vouched_until(sent: float, lease: float) -> float:
    """Until when a horse may run whose lease of so many seconds was renewed by a statement sent at `sent`.

    A little less than its length, for stopping a horse takes a moment, and it must be over when the lease is.
    """
    return sent + lease - min(max(1.0, lease * 0.1), lease / 2)


Watch = Callable[[threading.Event], None]  # runs until that is set


def start(slots: Slots, settings: Settings, *, patrol: bool, watch: Watch | None = None) -> int:
    """Fork a keeper; return its pid. The caller has no connection open.

    Args:
        slots: whom it keeps.
        settings: where their database is.
        patrol: whether it also looks for deaths on this host that nobody has seen.
        watch: what else it does meanwhile, in a thread of its own.
    """
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            host.forked()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()  # what ends a horse's group, or the terminal, doesn't end the keeper
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # a container sends it to all; workers need us to their end
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            host.name_process("sched-keeper")
            keep(slots, settings, parent, patrol=patrol, watch=watch)
            code = 0
        except BaseException:  # the child's outermost frame: nothing may unwind into the parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def keep(slots: Slots, settings: Settings, parent: int, *, patrol: bool, watch: Watch | None = None) -> None:
    """Be a keeper until no worker is left, and either the slots are closing or the parent is gone."""
    rounds = Rounds(slots, settings, patrol)
    # In a thread of its own: a database that doesn't answer mustn't keep us from stopping a horse in time.
    threading.Thread(target=rounds.go, daemon=True).start()
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(over,), daemon=True) if watch else None
    if watcher is not None:
        watcher.start()
    while True:
        for slot in slots.slots:
            if slot.worker and not host.lives(slot.worker, slot.born):
                if lease := bury(slot):
                    rounds.say_dead(lease)
            elif slot.lapsed:
                stop_horse(slot)
        ending = slots.closing or os.getppid() != parent
        if ending and not any(slot.worker for slot in slots.slots):
            break
        time.sleep(TICK if any(slot.horse for slot in slots.slots) else CALM)
    over.set()
    if watcher is not None:
        watcher.join(PATROL)  # it may be writing how its row ended
    rounds.finish()


def stop_horse(slot: Slot) -> None:
    """End a horse that nobody vouches for, and everything that its row has started."""
    if horse := slot.horse:
        slot.kill_noted()
        host.end_all([slot.lease], [horse])


def bury(slot: Slot) -> str | None:
    """A worker has died: nothing of it may go on running a row. Return its lease; None while something still does."""
    horse, lease = slot.horse, slot.lease
    if not host.end_all([lease], [horse] if horse else []):
        return None
    slot.leave()
    return lease


class Rounds:
    """What the keeper does in the database: renewing, and writing down deaths."""

    def __init__(self, slots: Slots, settings: Settings, patrol: bool) -> None:
        self._slots = slots
        self._settings = settings
        self._leases: Leases | None = None
        self._every = min(settings.lease / 6, PATROL)
        # A keeper that follows a dead one is late already. That of a stock worker's horse needn't hurry: a lease begins
        # with its whole length, and most jobs end before their keeper needs a connection.
        self._next_renewal = 0.0 if patrol else clock.boot() + self._every
        self._next_patrol = 0.0 if patrol else float("inf")
        self._dead: list[str] = []
        self._hurry = threading.Event()
        self._ending = False
        self._over = threading.Event()

    def say_dead(self, lease: str) -> None:
        """Have it written down that the worker with this lease is dead."""
        self._dead.append(lease)
        self._hurry.set()

    def finish(self) -> None:
        """End, once every death that was seen is written down, or a lease has passed without a database."""
        self._ending = True
        self._hurry.set()
        self._over.wait(self._settings.lease)

    def go(self) -> None:
        """Go round until told to finish."""
        while self._dead or not self._ending:
            try:
                self._round()
                pause = min(self._next_renewal, self._next_patrol) - clock.boot()
            except Exception as error:  # the loop's top: while this thread lives, so do the horses
                if not isinstance(error, SQLAlchemyError | NihError):
                    traceback.print_exc()
                if self._leases is not None:
                    self._leases.forget_connections()
                pause = min(self._every, AWAY)
            self._hurry.wait(max(0.0, pause))
            self._hurry.clear()
        self._over.set()

    def _round(self) -> None:
        while self._dead:
            self._open().end(self._dead[0], DEATH)
            self._dead.pop(0)
        if clock.boot() >= self._next_renewal:
            self._renew()
        if clock.boot() >= self._next_patrol:
            self._look_round()

    def _open(self) -> Leases:
        if self._leases is None:
            engine = connect(self._settings.database_url)
            self._leases = Leases(engine, ledger.tables(self._settings.ledger_schema, engine.dialect.name))
        return self._leases

    def _renew(self) -> None:
        sent, seconds = clock.boot(), self._settings.lease
        held = {slot.lease: slot for slot in self._slots.slots if slot.worker}
        if held:
            renewed = self._open().renew(list(held), seconds)
            for lease, slot in held.items():
                if slot.lease != lease:
                    continue  # it has taken another meanwhile
                if lease in renewed:
                    slot.vouch(vouched_until(sent, seconds))
                else:
                    slot.lose()
        self._next_renewal = sent + self._every

    def _look_round(self) -> None:
        leases = self._open()
        for lease in leases.all(host.host_id()):
            if lease.died is not None or host.lives(lease.pid, lease.born):
                continue
            if host.end_all([lease.id], [(lease.horse, lease.horse_born)] if lease.horse else []):
                leases.end(lease.id, DEATH)
        self._next_patrol = clock.boot() + PATROL
