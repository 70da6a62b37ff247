"""Deciding what is dead or carried by nobody, from what is seen and when: no clock is read here, nothing is written.

What stands still for as long as its lease is dead. That is told from our own boot clock and from the counter that each
renewal moves, never from two clocks compared: machines may disagree by minutes, and the database's clock may jump.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Standstill(Generic[K]):
    """Since when each thing that was seen again and again has stood as it stands."""

    def __init__(self) -> None:
        self._seen: dict[K, tuple[object, float]] = {}
        self._looked: float | None = None

    def see(self, now: float, things: Mapping[K, object], longest_gap: float) -> dict[K, float]:
        """Take note of what stands where; return for how long each thing has stood there, in seconds.

        Args:
            now: by the boot clock.
            things: each thing, and where it stands.
            longest_gap: seconds between two looks after which we start anew: while we were cut off or frozen, so may
                the database have been, and who can't reach it can't renew.
        """
        if self._looked is None or now - self._looked > longest_gap:
            self._seen.clear()
        self._looked = now
        seen: dict[K, tuple[object, float]] = {}
        for thing, place in things.items():
            before = self._seen.get(thing)
            seen[thing] = before if before is not None and before[0] == place else (place, now)
        self._seen = seen
        return {thing: now - since for thing, (_, since) in self._seen.items()}

    def cut_off(self) -> None:
        """Start anew: we couldn't look."""
        self._looked = None
