"""Injecting each kind of fault and undoing it, with a line in the journal that says when, and who was hit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from chaos.journal import Hands, Journal
from chaos.outages import Servers
from chaos.owner import Owner
from chaos.plan import Fault, group
from chaos.trees import Member, Tree, send

FIND = 30.0  # seconds to wait for a process of the wanted role: all may be restarting
STOP = 30.0  # seconds from SIGTERM to SIGKILL for everyone, as a platform gives them
FIND_BEST = 8.0  # seconds to wait for one with a row of some length in hand
BUSY = 0.75  # the part of the victims that is looked for among those with a row in hand
BUSY_ROLES = ("horse", "worker", "tree")
LONG = 1.0  # seconds: a row that is in hand for so long isn't one of the many short ones

Facts = dict[str, Any]


@dataclass(frozen=True)
class Hit:
    """Who is hit in a tree, and the horses that this hits."""

    tree: Tree
    victims: list[Member]
    horses: list[Member]


class NoVictim(Exception):
    """No process of the wanted role was there."""


class Injector:
    """Runs each planned fault in a thread of its own."""

    def __init__(self, trees: Sequence[Tree], outages: Servers, owner: Owner, hands: Hands, journal: Journal) -> None:
        self._trees = trees
        self._servers = outages
        self._owner = owner
        self._hands = hands
        self._journal = journal
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._threads: list[threading.Thread] = []
        self.errors: list[str] = []
        self._kinds: dict[str, Callable[[int, Fault], Facts | None]] = {
            "horse": self._kill_one,
            "worker": self._kill_one,
            "keeper": self._kill_one,
            "producer": self._kill_one,
            "tree": self._kill_tree,
            "stop-worker": self._stop_worker,
            "stop-tree": self._stop_tree,
            "redis-flush": lambda number, fault: outages.redis_flush(),
            "redis-restart": lambda number, fault: outages.redis_restart(fault.seconds),
            "redis-freeze": lambda number, fault: outages.redis_freeze(fault.seconds),
            "db-cut": lambda number, fault: outages.cut(),
            "db-restart": lambda number, fault: outages.restart(fault.seconds),
            "db-readonly": lambda number, fault: outages.readonly(fault.seconds),
            "db-lock": lambda number, fault: outages.lock(fault.seconds),
            "sigterm-all": self._sigterm_all,
            "owner": lambda number, fault: {"edits": owner.visit(number, random.Random(fault.draws[0]))},
        }

    def begin(self, number: int, fault: Fault) -> None:
        """Inject it meanwhile."""
        thread = threading.Thread(target=self._inject, args=(number, fault), daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        """Return once every fault is undone; those that are still on end now."""
        self._servers.over.set()
        for thread in self._threads:
            thread.join()

    def _inject(self, number: int, fault: Fault) -> None:
        name = group(fault.kind)
        try:
            with self._locks[name] if name else nullcontext():
                begin = time.monotonic()
                facts = {"begin": begin, **(self._kinds[fault.kind](number, fault) or {})}
                facts.setdefault("end", time.monotonic())
                self._journal.write("fault", n=number, kind=fault.kind, **facts)
        except NoVictim as none:
            self._journal.write("skipped", n=number, kind=fault.kind, why=str(none))
        except Exception:  # of a thread, which nobody else would hear of
            self.errors.append(f"{fault.kind}: {traceback.format_exc()}")

    # Whom to hit

    def _pick(self, fault: Fault, role: str) -> Hit:
        begin = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            late = waited > FIND or self._servers.over.is_set()
            found = self._candidates(role)
            wanted = self._wanted(fault, found, patient=waited < FIND_BEST) if role in BUSY_ROLES else found
            if among := wanted or (found if late else []):
                return among[int(fault.draws[0] * len(among))]
            if late:
                raise NoVictim(f"no {role}")
            time.sleep(0.05)

    def _wanted(self, fault: Fault, found: list[Hit], *, patient: bool) -> list[Hit]:
        """Mostly those with a row in hand, half of them with one that isn't just a moment long."""
        if fault.draws[1] >= BUSY and fault.kind != "stop-tree":
            return found
        age = LONG if patient and (fault.draws[2] < 0.5 or fault.kind == "stop-tree") else 0.0
        return [hit for hit in found if self._hands.of((horse.pid for horse in hit.horses), age)]

    def _candidates(self, role: str) -> list[Hit]:
        found: list[Hit] = []
        for tree in (tree for tree in self._trees if not tree.held):
            if role == "tree":
                if tree.is_up:
                    members = tree.members()
                    found.append(Hit(tree, members, _horses(members)))
                continue
            members = [member for member in tree.members() if member.pid not in tree.frozen]
            for one in (member for member in members if member.role == role):
                found.append(Hit(tree, [one], [m for m in _horses(members) if one.pid in (m.pid, m.parent)]))
        return found

    def _who(self, hit: Hit) -> Facts:
        pids = [horse.pid for horse in hit.horses]
        return {"victims": [victim.pid for victim in hit.victims], "horses": pids, "in_hand": self._hands.of(pids)}

    # Kills

    def _kill_one(self, number: int, fault: Fault) -> Facts:
        while True:
            hit = self._pick(fault, fault.kind)
            begin = time.monotonic()
            try:
                os.kill(hit.victims[0].pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            end = time.monotonic()
            time.sleep(0.02)  # until its last line is in the file
            return {"begin": begin, "end": end, "tree": hit.tree.number, **self._who(hit)}

    def _kill_tree(self, number: int, fault: Fault) -> Facts:
        hit = self._pick(fault, "tree")
        tree, name = hit.tree, hit.tree.name
        tree.held, tree.pause = True, fault.seconds
        tree.expect_end()
        begin = time.monotonic()
        tree.kill(known=hit.victims)
        who = self._who(hit)
        self._until_renewed({tree: name})
        return {"begin": begin, "tree": tree.number, **who}

    def _until_renewed(self, names: dict[Tree, str]) -> None:
        """Each tree has a new life."""
        for tree, name in names.items():
            while tree.name == name:
                time.sleep(0.02)
            tree.held = False

    def _sigterm_all(self, number: int, fault: Fault) -> Facts:
        for tree in self._trees:
            tree.held, tree.pause = True, 1.0 + fault.draws[0]
            tree.expect_end()
        names = {tree: tree.name for tree in self._trees}
        marks = {tree: tree.mark for tree in self._trees}
        everyone = [member for tree in self._trees for member in tree.members()]
        who = self._who(Hit(self._trees[0], everyone, _horses(everyone)))
        begin = time.monotonic()
        send(signal.SIGTERM, everyone)
        while any(tree.members(mark) for tree, mark in marks.items()) and time.monotonic() < begin + STOP:
            time.sleep(0.3)
        left = [member for tree, mark in marks.items() for member in tree.members(mark)]
        for tree, mark in marks.items():
            tree.kill(mark)
        self._until_renewed(names)
        return {"begin": begin, "killed": [f"{member.pid} {member.role}" for member in left], **who}

    # Stops

    def _stop_worker(self, number: int, fault: Fault) -> Facts:
        hit = self._pick(fault, "worker")
        (victim,) = hit.victims
        hit.tree.frozen.add(victim.pid)
        try:
            begin, again = self._freeze(lambda: send(signal.SIGSTOP, [victim]), lambda: send(signal.SIGCONT, [victim]))
            who = self._who(hit)
            self._servers.over.wait(fault.seconds)
        finally:
            end = time.monotonic()
            send(signal.SIGCONT, [victim])
            hit.tree.frozen.discard(victim.pid)
        return {"begin": begin, "end": end, "frozen_again": again, "tree": hit.tree.number, **who}

    def _stop_tree(self, number: int, fault: Fault) -> Facts:
        hit = self._pick(fault, "tree")
        hit.tree.held = True

        def stop() -> None:
            hit.victims[:] = hit.tree.freeze(hit.victims)
            hit.horses[:] = _horses(hit.victims)

        try:
            begin, again = self._freeze(stop, lambda: send(signal.SIGCONT, hit.victims))
            who = self._who(hit)
            self._servers.over.wait(fault.seconds)
        finally:
            end = time.monotonic()
            send(signal.SIGCONT, hit.victims)
            hit.tree.held = False
        return {"begin": begin, "end": end, "frozen_again": again, "tree": hit.tree.number, **who}

    def _freeze(self, stop: Callable[[], None], let: Callable[[], None]) -> tuple[float, int]:
        """Freeze; on SQLite not one that holds its one lock, which would freeze everyone for longer than a lease."""
        sqlite = self._servers.is_sqlite
        for again in range(50):
            with self._locks["db"] if sqlite else nullcontext():
                begin = time.monotonic()
                stop()
                if not sqlite or self._servers.can_write():
                    return begin, again
                let()
            time.sleep(0.03)
        raise NoVictim("each time one that held SQLite's lock")


def _horses(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if member.role == "horse"]
