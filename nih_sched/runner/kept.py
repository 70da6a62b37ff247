"""A horse under a lease: its worker's, or one of its own where the worker is RQ's and has none."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

from nih_sched import host, keeper
from nih_sched.runner.cancelling import keepers_watch
from nih_sched.runner.perform import is_interruptible
from nih_sched.runner.site import Site
from nih_sched.store import Hold


def hold_of(site: Site) -> Hold | None:
    """This horse's hold on the lease under which it runs; None in a process that isn't ours to end."""
    if site.slot is None:
        return None
    return Hold(site.slot.lease, site.settings.lease, os.getpid(), _born(os.getpid()))


@functools.lru_cache(maxsize=1)
def _born(pid: int) -> int | None:
    return host.born(pid)


@contextlib.contextmanager
def kept(site: Site, source: str) -> Iterator[None]:
    """Have a keeper for what runs within, rows of `source`: our worker's, or one made for this horse alone."""
    if not site.owns_process:  # a caller's own process: nobody may end it
        yield
        return
    if site.slot is not None:
        yield
        return
    slots = keeper.Slots(1)
    site.slot = slots.slots[0]  # the watch finds it there
    watch = keepers_watch(site, source, os.getpid()) if is_interruptible() else None
    site.close()  # no fork may carry a connection
    # It has no connection of its own until a renewal is due: most rows end before.
    keeper.start(slots, site.settings, patrol=False, watch=watch)
    site.take_lease(slots.slots[0], os.getpid())
    try:
        yield
    finally:
        site.leave_lease()
        site.slot = None
        slots.close()
