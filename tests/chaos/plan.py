"""What a run will do, from its seed alone: which fault at which second, and the stream of rows. Pure."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

DATABASES = ("postgresql", "mariadb", "sqlite")
KINDS = (
    "horse",
    "worker",
    "keeper",
    "producer",
    "tree",
    "stop-worker",
    "stop-tree",
    "redis-flush",
    "redis-restart",
    "redis-freeze",
    "sigterm-all",
    "owner",
)
SERVER_KINDS = ("db-cut", "db-restart", "db-readonly")
SQLITE_KINDS = ("db-lock",)
ALL_KINDS = KINDS + SERVER_KINDS + SQLITE_KINDS

# Seconds that a fault lasts, from and to; all others are over at once. A stop lasts longer than a lease.
LASTS = {
    "tree": (1.0, 2.0),
    "redis-restart": (0.5, 2.0),
    "redis-freeze": (3.0, 8.0),
    "db-restart": (2.0, 4.0),
    "db-readonly": (3.0, 6.0),
    "db-lock": (3.0, 8.0),
    "sigterm-all": (10.0, 10.0),  # as planned; until the last tree has ended
}
BEYOND_LEASE = 4.0
FIRST = 3.0  # the second of the first fault
SPACING = (2.6, 4.4)  # five of each of fifteen kinds fit into 300 s
DEALS = 20  # tries, of which the one with most of its rarest kind is taken
GAP = 0.5  # between two faults of which only one may be on at a time

STREAM = 0.9  # the part of the run in which rows come
BURST, BURSTS = 12, 0.04  # so many rows at once, after so many of the others
SHORT = (0, 0, 0, 1, 1, 1, 30, 150)  # their milliseconds
LOAD = 0.3  # the part of the workers' time that the rows take; the faults take half of it, and more
OVERHEAD = 0.1  # seconds that a run costs beside its length


@dataclass(frozen=True)
class Fault:
    """One planned fault; the draws, from 0 to 1, choose the victim when it is there to be seen."""

    at: float
    kind: str
    seconds: float
    draws: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A row to insert, and what is to become of it."""

    at: float
    key: int
    length_ms: int
    fails: int = 0  # so many attempts raise
    final_fail: bool = False  # it raises Fail: Failed is its rightful end


@dataclass(frozen=True)
class Plan:
    """A run."""

    seed: int
    seconds: float
    faults: tuple[Fault, ...]
    rows: tuple[Row, ...]

    @property
    def digest(self) -> str:
        """Equal for equal plans."""
        return hashlib.sha256(repr((self.faults, self.rows)).encode()).hexdigest()[:12]


def kinds_for(database: str) -> tuple[str, ...]:
    """The kinds of faults that this kind of database can have."""
    return KINDS + (SQLITE_KINDS if database == "sqlite" else SERVER_KINDS)


def make(seed: int, seconds: float, kinds: Sequence[str], *, lease: float, workers: int) -> Plan:
    """The plan of a run.

    Args:
        seed: the same seed and arguments plan the same run.
        seconds: how long faults go on.
        kinds: which faults; each comes about equally often.
        lease: what --lease will be.
        workers: of all schedulers together.
    """
    faults = plan_faults(random.Random(f"faults {seed}"), seconds, kinds, lease)
    rows = plan_rows(random.Random(f"rows {seed}"), seconds * STREAM, workers)
    return Plan(seed, seconds, tuple(faults), tuple(rows))


def group(kind: str) -> str | None:
    """Of the faults in one group only one is on at a time; those of none may coincide with any."""
    if kind.startswith(("db-", "redis-")):
        return kind.partition("-")[0]
    if kind in ("tree", "stop-tree", "sigterm-all"):
        return "trees"  # of which at most one is away, or all
    return kind if kind == "stop-worker" else None


def plan_faults(rng: random.Random, seconds: float, kinds: Sequence[str], lease: float) -> list[Fault]:
    """A balanced deck dealt over the run, from its end backwards: what lasts long must still fit before the end."""
    if not kinds:
        return []
    steps = itertools.accumulate(iter(lambda: rng.uniform(*SPACING), None), initial=FIRST)
    times = list(itertools.takewhile(lambda at: at < seconds - GAP, steps))
    deals = [_deal(rng, times, seconds, kinds, lease) for _ in range(DEALS)]
    return max(deals, key=lambda faults: min(Counter(fault.kind for fault in faults)[kind] for kind in kinds))


def _deal(
    rng: random.Random, times: Sequence[float], seconds: float, kinds: Sequence[str], lease: float
) -> list[Fault]:
    deck: list[str] = []  # dealt from its end
    while len(deck) < len(times):
        deck += rng.sample(list(kinds), len(kinds))
    deck = deck[: len(times)]
    faults: list[Fault] = []
    busy_from: dict[str, float] = {}
    for at in reversed(times):
        drawn = {kind: _lasts(rng, kind, lease) for kind in kinds}
        draws = tuple(round(rng.random(), 6) for _ in range(4))
        for place in reversed(range(len(deck))):
            kind = deck[place]
            end = at + drawn[kind]
            if end <= seconds and end + GAP <= busy_from.get(group(kind) or "", end + GAP):
                del deck[place]
                faults.append(Fault(round(at, 3), kind, round(drawn[kind], 3), draws))
                if name := group(kind):
                    busy_from[name] = at
                break
    return faults[::-1]


def _lasts(rng: random.Random, kind: str, lease: float) -> float:
    if kind.startswith("stop-"):
        return lease + BEYOND_LEASE
    low, high = LASTS.get(kind, (0.0, 0.0))
    return rng.uniform(low, high)


def plan_rows(rng: random.Random, seconds: float, workers: int) -> list[Row]:
    """A stream of rows, mixed anew in each block of 100, at a rate that leaves the workers time for the faults."""
    rows: list[Row] = []
    at = 0.0
    while at < seconds:
        block = _block(rng)
        cost = sum((length / 1000 + OVERHEAD) * (1 + fails) for length, fails, _ in block)
        step = cost / len(block) / (workers * LOAD)
        for length, fails, final in block:
            if at >= seconds:
                break
            rows.append(Row(round(at + rng.uniform(0, step), 3), len(rows) + 1, length, fails, final))
            if rng.random() < BURSTS:  # at once, so that they travel together
                shorts = [rng.choice(SHORT) for _ in range(BURST)]
                rows += [Row(rows[-1].at, len(rows) + n, short, 0, False) for n, short in enumerate(shorts, 1)]
            at += step
    return rows


def _block(rng: random.Random) -> list[tuple[int, int, bool]]:
    block = [(rng.randint(12000, 25000), 0, False)]  # longer than a lease of 10 s
    block += [(rng.randint(2000, 5000), 0, False) for _ in range(3)]
    block += [(rng.randint(20, 300), rng.randint(1, 3), False) for _ in range(5)]
    block += [(rng.randint(20, 200), 0, True) for _ in range(2)]
    block += [(rng.randint(20, 400), 0, False) for _ in range(89)]
    rng.shuffle(block)
    return block
