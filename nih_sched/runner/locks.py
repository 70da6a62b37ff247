"""Locks that a worker shares with its horse."""

from __future__ import annotations

import os
from typing import Any

PATIENCE = 60.0  # seconds for which a horse waits for its worker, which may be waiting for the database
UNHEARD = 79  # a horse's exit code


def acquire_or_die(lock: Any) -> None:
    """In the horse: have the lock, or end.

    A worker that keeps one for so long is frozen; when it thaws it goes on from where it was. What it was told it will
    write then, having seen our end.
    """
    if not lock.acquire(timeout=PATIENCE):
        os._exit(UNHEARD)
