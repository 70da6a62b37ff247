"""Memory that a keeper shares with its workers and their horses: who runs what, and until when it is vouched for.

A horse that is killed, or stuck in C code, can't say anything any more; what stands here speaks for it.
"""

from __future__ import annotations

import mmap
import struct

from nih_sched import clock

# pid and birth of worker and horse; until when the horse is vouched for (boot clock), by its keeper and by its own last
# start; whether its lease is lost, and whether it was killed for that; the lease. Native words are never half written,
# unless by pack_into(), which zeroes them first.
_FORM = struct.Struct("@qqqqdd??32s")
_WORD, _INSTANT, _INSTANTS = struct.Struct("@q"), struct.Struct("@d"), struct.Struct("@dd")
_FIELDS = {"worker": (0, _WORD), "born": (8, _WORD), "horse": (16, _WORD), "horse_born": (24, _WORD)}
_KEPT, _BEGUN = 32, 40
_FIELDS |= {"kept": (_KEPT, _INSTANT), "begun": (_BEGUN, _INSTANT)}
_LOST, _KILLED, _LEASE = 48, 49, 50
_SIZE = 128  # a cache line of its own for each


class Slots:
    """The slots of one keeper, one for each worker; made before any of them is forked."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, _SIZE * (count + 1))
        self.slots = [Slot(self._memory, _SIZE * (n + 1)) for n in range(count)]

    @property
    def closing(self) -> bool:
        """Whether the keeper is to end once no worker is left."""
        return self._memory[0] != 0

    def close(self) -> None:
        """Have the keeper end once no worker is left."""
        self._memory[0] = 1


class Slot:
    """What is known of one worker. Each field has one writer at a time; pids are written last, and cleared first."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self._offset = offset

    def occupy(self, worker: int, born: int, lease: str, until: float) -> None:
        """In the worker: it has taken a lease."""
        self._put("worker", 0)
        all_of_it = _FORM.pack(0, born, 0, 0, until, until, False, False, lease.encode())
        self._memory[self._offset : self._offset + _FORM.size] = all_of_it
        self._put("worker", worker)

    def leave(self) -> None:
        """In the worker, or in its stead: it is gone, and so is its lease."""
        self._put("worker", 0)
        self._put("horse", 0)

    def mount(self, horse: int, born: int, until: float) -> None:
        """In the horse: it begins to run user code, vouched for until then."""
        self._put("begun", max(until, self._get("begun")))
        self._put("horse_born", born)
        self._put("horse", horse)

    def dismount(self) -> None:
        """In the worker, before a fork and when the horse is gone."""
        self._put("horse", 0)
        self._memory[self._offset + _KILLED] = 0

    def vouch(self, until: float) -> None:
        """In the keeper: the lease was renewed."""
        self._put("kept", max(until, self._get("kept")))

    def lose(self) -> None:
        """In the keeper: others take the worker for dead; it must take a new lease."""
        self._memory[self._offset + _LOST] = 1

    def kill_noted(self) -> None:
        """Before the horse is killed because nobody vouches for it: that is no fault of its row."""
        self._memory[self._offset + _KILLED] = 1

    @property
    def worker(self) -> int:
        """The worker's pid; 0 when nobody is here."""
        return int(self._get("worker"))

    @property
    def born(self) -> int:
        """When the worker was started, as host.born() says."""
        return int(self._get("born"))

    @property
    def horse(self) -> tuple[int, int] | None:
        """The horse's pid, and when it was started; None while none runs."""
        pid = int(self._get("horse"))
        return (pid, int(self._get("horse_born"))) if pid else None

    @property
    def until(self) -> float:
        """Until when the horse is vouched for, on the boot clock."""
        return max(float(self._get("kept")), float(self._get("begun")))

    @property
    def lease(self) -> str:
        """The lease's id."""
        text: bytes = struct.unpack_from("32s", self._memory, self._offset + _LEASE)[0]
        return text.rstrip(b"\0").decode("ascii", "replace")

    @property
    def lost(self) -> bool:
        """Whether others take the worker for dead."""
        return self._memory[self._offset + _LOST] != 0

    @property
    def killed(self) -> bool:
        """Whether the horse was killed because nobody vouched for it."""
        return self._memory[self._offset + _KILLED] != 0

    @property
    def lapsed(self) -> bool:
        """Whether a horse runs that nobody vouches for any more."""
        return self.horse is not None and (self.lost or clock.boot() >= self.until)

    @property
    def expired(self) -> bool:
        """In the horse: whether nobody vouches for it any more."""
        # Asked before each row: without the properties' detours.
        lost = self._memory[self._offset + _LOST] != 0
        return bool(lost or clock.boot() >= max(_INSTANTS.unpack_from(self._memory, self._offset + _KEPT)))

    def _put(self, name: str, value: float) -> None:
        offset, form = _FIELDS[name]
        self._memory[self._offset + offset : self._offset + offset + form.size] = form.pack(value)

    def _get(self, name: str) -> float:
        offset, form = _FIELDS[name]
        value: float = form.unpack_from(self._memory, self._offset + offset)[0]
        return value
