"""The live view of a run on a terminal: counts, rate and time left, straight from the table."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from nih_sched import telemetry
from nih_sched.model import State
from nih_sched.store import Desk, Looks

EVERY = 0.5  # seconds between looks, at least
SHARE = 20  # a look may take one part in so many of our time: a large table is counted less often
READS = 16  # at one look, of what processes print
WINDOW = 30.0  # seconds over which the rate is measured


class LiveView:
    """Counts below, and above them whatever the processes of the tree print."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._looks = Looks(desk)
        self._console = Console(stderr=True, highlight=False)
        # No thread of rich's own: the process that draws is the one that forks.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._source, self.sink = os.pipe()
        os.set_blocking(self._source, False)
        self._rest = b""
        self._owner = os.getpid()
        telemetry.unsubscribe_all()
        telemetry.subscribe(telemetry.LogLines("text", telemetry.VIEW_SHOWS, self))  # a stream: write and flush
        self._next = 0.0
        self._seen: deque[tuple[float, int]] = deque()
        self._started = False

    def look(self) -> None:
        """Pass on what was printed; look at the table and redraw, if it is time."""
        self._pass_on()
        began = time.monotonic()
        if began < self._next:
            return
        try:
            counts = self._looks.by_word()
        except SQLAlchemyError:
            self._next = began + 1.0  # the producer says what is wrong; the view waits
            return
        finally:
            self._desk.close()  # children are forked from this process: it keeps no connection
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(self._table(counts, began), refresh=True)
        self._next = time.monotonic() + max(EVERY, (time.monotonic() - began) * SHARE)

    def close(self) -> None:
        """Draw the last counts and leave the terminal in order."""
        self._next = 0.0
        self.look()
        self._live.stop()
        os.close(self.sink)
        os.close(self._source)

    def write(self, text: str) -> None:
        """Print an event: above the view here, by way of standard error in a child."""
        if os.getpid() == self._owner:
            self._console.print(text.rstrip("\n"), markup=False, soft_wrap=True)
        else:
            sys.stderr.write(text)

    def flush(self) -> None:
        """As streams do."""
        sys.stderr.flush()

    def _pass_on(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(READS):  # no more: whoever prints without end must not keep us from stopping it
                chunk = os.read(self._source, 65536)
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                for line in lines:
                    self._console.print(line.decode(errors="replace"), markup=False, soft_wrap=True)

    def _table(self, counts: dict[object, int], now: float) -> Table:
        words = self._desk.rows.words
        by_state = {state: counts.get(words[state], 0) for state in State}
        final = by_state[State.DONE] + by_state[State.FAILED]
        self._seen.append((now, final))
        while self._seen[0][0] < now - WINDOW:
            self._seen.popleft()
        span = now - self._seen[0][0]
        rate = (final - self._seen[0][1]) / span if span > 0 else 0.0
        left = by_state[State.READY] + by_state[State.QUEUED] + by_state[State.STARTED]
        table = Table(*(state.value for state in State if state is not State.RETRYING), "rows/s", "time left")
        table.add_row(
            *(str(by_state[state]) for state in State if state is not State.RETRYING),
            f"{rate:.1f}",
            _duration(left / rate) if rate > 0 else "-",
        )
        return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
