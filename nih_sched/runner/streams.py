"""What functions write to stdout, stderr and logging goes where it went, and into the row's tail."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from nih_sched.runner.tail import Tail


class Tee:
    """A text stream that stands before another."""

    def __init__(self, stream: Any, tail: Tail) -> None:
        self.stream = stream
        self._tail = tail

    def write(self, text: str) -> Any:
        """Write it on, and keep it."""
        written = self.stream.write(text)
        self._tail.write(text.encode("utf-8", "backslashreplace"))
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        """As of a stream."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_streams(tail: Tail) -> None:
    """In a horse, once: have what user code writes from now on kept. What goes round Python's streams isn't."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Tee):
            setattr(sys, name, Tee(stream, tail))
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Records):
        # Not a handler: user code's basicConfig() does nothing once there is one.
        logging.setLogRecordFactory(_Records(make, tail))


class _Records:
    """A factory of log records that keeps those which no handler writes to a stream of ours."""

    def __init__(self, make: Callable[..., logging.LogRecord], tail: Tail) -> None:
        self._make = make
        self._tail = tail

    def __call__(self, *args: Any, **facts: Any) -> logging.LogRecord:
        record = self._make(*args, **facts)
        if not _is_kept(record):
            self._tail.write(_as_text(record).encode("utf-8", "backslashreplace"))
        return record


def _is_kept(record: logging.LogRecord) -> bool:
    logger: logging.Logger | None = logging.getLogger(record.name)
    any_handler = False
    while logger is not None:
        for handler in logger.handlers:
            any_handler = True
            if record.levelno >= handler.level and isinstance(getattr(handler, "stream", None), Tee):
                return True
        logger = logger.parent if logger.propagate else None
    return not any_handler and record.levelno >= logging.WARNING  # then logging itself writes it to stderr


def _as_text(record: logging.LogRecord) -> str:
    try:
        text = f"{record.levelname} {record.name}: {record.getMessage()}\n"
        return text + "".join(traceback.format_exception(*record.exc_info) if record.exc_info else ())
    except Exception:  # user code: a record whose arguments don't fit; logging will say so
        return f"{record.levelname} {record.name}: {record.msg!r:.1000}\n"
