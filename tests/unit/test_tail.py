"""What a row's handler writes: the end of it is kept, bounded and marked, and all of it goes where it went."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nih_sched.model import Claim, Ended, Outcome, Trail
from nih_sched.runner.meter import LONG, Meter
from nih_sched.runner.streams import Tee, keep_streams
from nih_sched.runner.tail import LINES, Tail


def test_nothing_written_is_nothing_kept() -> None:
    assert Tail().text() is None


@given(st.lists(st.binary(max_size=3 * Tail.SIZE), max_size=8))
def test_the_ring_keeps_the_end_whatever_is_written_how(chunks: list[bytes]) -> None:
    tail, written = Tail(), b"".join(chunks)
    for chunk in chunks:
        tail.write(chunk)
    text = tail.text()
    if not written:
        assert text is None
        return
    assert text is not None
    mark, kept = text.split("]\n", 1) if text.startswith("[… ") else ("", text)
    last = written[-len(kept.encode()) :].decode(errors="replace") if kept.isascii() else None
    assert last is None or last == kept
    assert bool(mark) == (len(written) > Tail.SIZE or len(written.splitlines()) > LINES)


def test_the_last_lines_are_kept_and_the_cut_is_marked() -> None:
    tail = Tail()
    for number in range(1000):
        tail.write(b"%d\n" % number)
    text = tail.text()
    assert text is not None
    first, *lines = text.splitlines()
    assert lines == [str(number) for number in range(800, 1000)]
    assert first == f"[… {sum(len(str(n)) + 1 for n in range(800))} bytes cut …]"
    tail.write(b"x" * 50_000)
    text = tail.text()
    assert text is not None
    assert len(text.encode()) <= Tail.SIZE + 40
    tail.clear()
    assert tail.text() is None


Streams = tuple[Tail, io.StringIO, io.StringIO]


@contextmanager
def kept_streams() -> Iterator[Streams]:
    """Python's streams, kept; not a fixture, because pytest puts its own there when the test begins."""
    out, err, tail = io.StringIO(), io.StringIO(), Tail()
    before = logging.getLogRecordFactory()
    with redirect_stdout(out), redirect_stderr(err):
        keep_streams(tail)
        keep_streams(tail)  # once is enough
        yield tail, out, err
    logging.setLogRecordFactory(before)


def test_both_streams_are_kept_and_still_go_where_they_went() -> None:
    with kept_streams() as (tail, out, err):
        print("to out \udcff")
        print("to err", file=sys.stderr)
        sys.stdout.writelines(["one\n", "two\n"])
    assert out.getvalue().encode(errors="backslashreplace") == b"to out \\udcff\none\ntwo\n"
    assert err.getvalue() == "to err\n"
    assert tail.text() == "to out \\udcff\nto err\none\ntwo\n"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of its own, which pytest doesn't hear."""
    found = logging.getLogger("a test's")
    found.propagate = False
    found.setLevel(logging.INFO)
    yield found
    found.handlers.clear()


def test_what_is_logged_is_kept_once_wherever_it_goes(logger: logging.Logger) -> None:
    logger.handlers.clear()  # pytest's
    elsewhere = io.StringIO()
    with kept_streams() as (tail, _, _):
        logger.debug("too small")
        logger.info("no handler for %s", "it")
        logger.warning("logging's last resort")
        logger.addHandler(logging.StreamHandler(elsewhere))
        logger.info("to a file, say")
        logger.info("wrong %d", "number")
        logger.addHandler(logging.StreamHandler())
        logger.info("to stderr")
        logger.handlers.pop()
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("with its traceback")
        assert isinstance(sys.stderr, Tee)
    text = tail.text()
    assert text is not None
    assert [line for line in text.splitlines() if not line.startswith((" ", "-", "Traceback", "Call", "Message"))] == [
        "INFO a test's: no handler for it",
        "logging's last resort",
        "INFO a test's: to a file, say",
        "INFO a test's: 'wrong %d'",
        "TypeError: %d format: a real number is required, not str",
        "Arguments: ('number',)",
        "to stderr",
        "ERROR a test's: with its traceback",
        "ValueError: why",
    ]
    assert "to a file, say" in elsewhere.getvalue()


def test_short_silent_rows_are_told_of_as_before_and_long_ones_are_measured() -> None:
    tail = Tail()
    meter = Meter(tail)
    short = Ended(Claim(1, (1,), "rq"), Outcome.DONE, seconds=LONG / 2, at=1.0)
    meter.begin()
    assert meter.note(short) is short
    tail.write(b"so\n")
    assert meter.note(short).trail == Trail("so\n")
    meter.begin()
    assert meter.note(short) is short
    meter.begin()
    large = bytearray(b"x") * (60 << 20)
    del large
    trail = meter.note(short._replace(seconds=LONG)).trail
    assert trail is not None
    assert trail.cpu_seconds is not None
    assert 0 < trail.cpu_seconds < 5
    assert trail.peak_memory is not None
    assert trail.peak_memory > 60 << 20
    if sys.platform == "linux":
        meter.begin()
        after = meter.note(short._replace(seconds=LONG)).trail
        assert after is not None
        assert after.peak_memory is not None
        assert after.peak_memory < trail.peak_memory - (50 << 20)


@given(st.none() | st.text(), st.none() | st.floats(0, 1e9), st.none() | st.integers(0, 2**60))
def test_a_trail_is_told_to_the_worker(output: str | None, cpu: float | None, memory: int | None) -> None:
    ended = Ended(Claim(7, (1,), "rq"), Outcome.DONE, at=1.0, trail=Trail(output, cpu, memory))
    assert Ended.from_told(ended.told(), ended.claim) == ended
