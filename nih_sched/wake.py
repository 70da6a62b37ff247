"""The producer's wait: a stop, the database, the doorbell in Redis or the time ends it, whichever comes first."""

from __future__ import annotations

import contextlib
import math
import os
import select
from enum import Enum, auto
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from nih_sched import clock
from nih_sched.dialects.watch import Watch
from nih_sched.redis_client import channel

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds until a lost doorbell is hung again


class Sign(Enum):
    """What ended a wait."""

    TIME = auto()
    CHANGE = auto()  # something was committed: perhaps a ready row
    RING = auto()  # somebody says that there is a ready row, or what would have said so was lost


class Doorbell:
    """A connection that hears a channel. It never raises: without it we poll, and the next tick says what is wrong."""

    def __init__(self, connection: Redis, source: str) -> None:
        self._redis = connection
        self._channel = channel(source)
        self._heard: Any = None  # redis-py's PubSub
        self._next = 0.0
        self._wait = FIRST_WAIT

    def fileno(self) -> int | None:
        """The connection's socket."""
        line = self._heard.connection._sock if self._heard is not None and self._heard.connection else None
        return None if line is None else int(line.fileno())

    def tend(self) -> None:
        """Subscribe, also again after a loss; see from time to time whether the server still answers."""
        now = clock.monotonic()
        try:
            if self._heard is not None:
                self._heard.check_health()
            elif now >= self._next:
                self._heard = self._redis.pubsub()  # type: ignore[no-untyped-call]
                self._heard.subscribe(self._channel)
        except RedisError:
            self._lose()

    def rung(self) -> bool:
        """Whether anybody has rung, or somebody may have: while we were not there."""
        if self._heard is None:
            return False
        heard, line = False, self.fileno()
        try:
            while self._heard.connection.can_read(timeout=0):
                # The answer to a subscription counts: redis-py gets a lost connection back by itself, and subscribes.
                heard = self._heard.get_message() is not None or heard
        except RedisError:
            self._lose()
            return True
        self._wait = FIRST_WAIT
        return heard or self.fileno() != line

    def close(self) -> None:
        """Hang up."""
        heard, self._heard = self._heard, None
        if heard is not None:
            with contextlib.suppress(RedisError, OSError):
                heard.close()

    def _lose(self) -> None:
        self.close()
        self._next = clock.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)


class Wake:
    """One producer's; it waits in poll(), without threads."""

    def __init__(self, stop: clock.Bell, watch: Watch, doorbell: Doorbell) -> None:
        self._stop = stop
        self._watch = watch
        self._doorbell = doorbell
        self._stops, line = os.pipe()
        self._line = line
        os.set_blocking(line, False)
        stop.write_to(line)

    @property
    def stopped(self) -> bool:
        """Whether it is time to stop."""
        return self._stop.rung

    @property
    def live(self) -> bool:
        """Whether the database is known to tell of each new row by itself."""
        return self._watch.live

    @property
    def hears_database(self) -> bool:
        """Whether the database tells of new rows by itself, or its changes are looked at often anyway."""
        return self._watch.live or self._watch.every is not None

    @property
    def hears_redis(self) -> bool:
        """Whether the doorbell's connection stands: its loss would have been told."""
        return self._doorbell.fileno() is not None

    def tend(self) -> None:
        """Begin to hear what can be heard, also again after a loss."""
        self._watch.tend()
        self._doorbell.tend()

    def cut_off(self) -> None:
        """The database was away: a connection to it may be sick in a way that only it knows."""
        self._watch.close()

    def rest(self, seconds: float) -> None:
        """Wait for so long, or for the stop."""
        self._stop.wait(seconds)

    def wait(self, seconds: float, quiet: float = 0.0, *, brisk: bool = False) -> Sign:
        """Wait up to `seconds`, or until there is a sign, or for the stop.

        Args:
            seconds: how long.
            quiet: for the first so many of them no sign ends the wait, none is lost: so that many make one tick.
            brisk: whether new rows are likely.
        """
        self._watch.brisk = brisk
        deadline = clock.monotonic() + seconds
        if quiet > 0:
            self._stop.wait(min(quiet, seconds))
        while not self._stop.rung:
            every = self._watch.every
            if every is not None and self._watch.rung():
                return self._watch_sign()
            left = max(0.0, deadline - clock.monotonic())  # also after a wait that was quiet to its end, signs are seen
            told = self._select(left if every is None else min(left, every))
            if self._doorbell in told and self._doorbell.rung():
                return Sign.RING
            if self._watch in told and self._watch.rung():
                return self._watch_sign()
            if left <= 0:
                break
        return Sign.TIME

    def close(self) -> None:
        """Close all connections."""
        self._watch.close()
        self._doorbell.close()
        self._stop.write_to(None)
        os.close(self._line)
        os.close(self._stops)

    def _select(self, seconds: float) -> list[object]:
        """What has something to tell within so many seconds. Asked anew each time: connections come and go."""
        lines: dict[int, object] = {self._stops: self._stop}
        for one in (self._watch, self._doorbell):
            line = one.fileno()
            if line is not None:
                lines[line] = one
        poll = select.poll()  # select() itself ends at 1024 open files
        for line in lines:
            poll.register(line, select.POLLIN)
        return [lines[line] for line, _ in poll.poll(math.ceil(seconds * 1000))]

    def _watch_sign(self) -> Sign:
        return Sign.RING if self._watch.sure else Sign.CHANGE
