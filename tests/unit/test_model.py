"""The pure rules: keys, waits, what follows from an outcome, and texts that every database takes."""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nih_sched.errors import UsageError
from nih_sched.model import (
    FAILURES,
    TEXT_LIMIT,
    Backoff,
    Claim,
    Ended,
    Fate,
    Outcome,
    Source,
    State,
    clean_text,
    decide,
    decode_key,
    encode_key,
    open_key,
    show_key,
)

settings.register_profile("patient", deadline=None)  # a noisy machine is no failure
settings.load_profile("patient")

WORDS: dict[State, str | int] = {state: state.value for state in State}
SOURCE = Source("name", "jobs", "state", ("id",), WORDS, Backoff(), 3600.0, lease=60.0, max_interruptions=7)

# Keys

zones = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30)), timezone(-timedelta(hours=11))])
parts = st.one_of(
    st.integers(),
    st.text(),  # hypothesis' text has NUL and everything else but surrogates
    st.booleans(),
    st.none(),
    st.uuids(),
    st.binary(),
    st.decimals(allow_nan=False),
    st.datetimes(timezones=zones),
    st.dates(),
    st.floats(allow_nan=False),
)
keys = st.lists(parts, min_size=1, max_size=4).map(tuple)


@given(keys)
def test_a_key_comes_back_as_it_was(key: tuple[object, ...]) -> None:
    text = encode_key(key)
    assert text.isascii()
    assert "\0" not in text
    back = decode_key(text)
    assert back == key
    assert [type(part) for part in back] == [type(part) for part in key]
    assert encode_key(back) == text


@given(keys, keys)
def test_different_keys_have_different_texts(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    same = list(map(repr, one)) == list(map(repr, other))
    assert (encode_key(one) == encode_key(other)) is same
    assert (open_key("t", one) == open_key("t", other)) is same


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (7, "[7]"),
        ("a\0b", '["a\\u0000b"]'),
        ("ü🎈", '["\\u00fc\\ud83c\\udf88"]'),
        (uuid.UUID(int=1), '[{"uuid":"00000000-0000-0000-0000-000000000001"}]'),
        (b"\0\xff", '[{"bytes":"AP8="}]'),
        (bytearray(b"\0\xff"), '[{"bytes":"AP8="}]'),
        (memoryview(b"\0\xff"), '[{"bytes":"AP8="}]'),
        (Decimal("1.10"), '[{"decimal":"1.10"}]'),
        (datetime(2024, 2, 29, 1, 2, 3, 4, UTC), '[{"datetime":"2024-02-29T01:02:03.000004+00:00"}]'),
        (date(2024, 2, 29), '[{"date":"2024-02-29"}]'),
    ],
)
def test_a_keys_text_never_changes(part: object, text: str) -> None:
    # Ledgers that are out there hold these texts, and open_key is made from them.
    assert encode_key((part,)) == text


def test_open_key_tells_tables_apart_and_fits_its_column() -> None:
    assert open_key("public.a", (1,)) != open_key("public.b", (1,))
    assert open_key("public.a", (1,)) != open_key("public.a", ("1",))
    assert open_key("public.a", (1,)) == "47fdea60ba3922822dd6e724754a9b98bc28e0a3"
    assert len(open_key("x" * 500, ("y" * 5000,))) == 40


def test_a_key_of_another_type_is_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="A key of type timedelta can't be used; name other columns"):
        encode_key((timedelta(1),))


def test_a_key_is_shown_as_a_person_would_type_it() -> None:
    assert show_key((7, "a b", b"\x0f\xff", Decimal("1.10"))) == "7,a b,0fff,1.10"
    assert show_key((uuid.UUID(int=1),)) == "00000000-0000-0000-0000-000000000001"


@given(
    st.dictionaries(st.sampled_from(State), st.text() | st.integers()),
    st.text(),
    st.lists(st.text(), min_size=1).map(tuple),
    st.floats(0, 1e6),
    st.integers(1, 10**6),
)
def test_a_source_comes_back_from_our_table_as_it_was(
    states: dict[State, str | int], word: str, columns: tuple[str, ...], seconds: float, times: int
) -> None:
    backoff = Backoff(seconds, 1.5, seconds, 0.5)
    source = Source("name", word, word, columns, states, backoff, seconds, lease=seconds, max_interruptions=times)
    assert Source.from_json("name", source.to_json()) == source


def test_a_source_that_an_older_version_wrote_down_has_the_defaults() -> None:
    written = json.loads(SOURCE.to_json())
    del written["lease"], written["max_interruptions"]
    found = Source.from_json("name", json.dumps(written))
    assert (found.lease, found.max_interruptions) == (120.0, 10)
    assert dataclasses.replace(SOURCE, lease=120.0, max_interruptions=10) == found


@given(
    st.sampled_from(Outcome),
    keys,
    st.integers(1, 2**62),
    st.none() | st.text(),
    st.none() | st.text(),
    st.floats(0, 1e9),
    st.none() | st.floats(0, 1e9),
    st.booleans(),
)
def test_what_a_horse_tells_comes_back_as_it_was(
    outcome: Outcome,
    key: tuple[object, ...],
    number: int,
    reason: str | None,
    result: str | None,
    seconds: float,
    at: float | None,
    final: bool,
) -> None:
    claim = Claim(number, key, "rq", attempt=3, failures=2, tries=5, interruptions=4, first=7, earlier=6)
    ended = Ended(claim, outcome, reason, reason, result, seconds, final=final, postpone=seconds, at=at)
    text = ended.told()
    assert Ended.claim_told(text) == number
    back = Ended.from_told(text, claim)
    kept = {name: clean_text(getattr(ended, name)) for name in ("reason", "traceback", "result")}
    if outcome is Outcome.DONE and result is None and at is not None:  # such a row has nothing else to tell
        assert back == Ended(claim, outcome, seconds=seconds, at=at)
    else:
        assert back == ended._replace(**kept)


# Waits

backoffs = st.builds(
    Backoff, delay=st.floats(0, 1e7), backoff=st.floats(1e-3, 1000), max_delay=st.floats(0, 1e7), jitter=st.just(0.0)
)


@given(backoffs, st.integers(0, 1000), st.integers(0, 1100))
def test_there_is_exactly_one_wait_for_each_try_that_is_left(backoff: Backoff, tries: int, spent: int) -> None:
    waits = backoff.intervals(tries, lambda: 1.0, spent=spent)
    assert len(waits) == max(0, tries - spent)
    assert all(0 <= wait <= backoff.max_delay for wait in waits)
    assert all(map(math.isfinite, waits))
    assert waits == backoff.intervals(tries, lambda: 1.0)[spent:]


@given(backoffs, st.integers(0, 200), st.floats(0, 10), st.floats(0, 1))
def test_jitter_only_ever_lengthens_and_by_its_fraction_at_most(
    backoff: Backoff, n: int, jitter: float, stretch: float
) -> None:
    plain = backoff.interval(n)
    jittered = dataclasses.replace(backoff, jitter=jitter).interval(n, stretch)
    assert plain <= jittered <= plain * (1 + jitter)


def test_waits_grow_as_the_issue_says() -> None:
    assert Backoff(0.5, 2.0).intervals(3, lambda: 0.0) == [0.5, 1.0, 2.0]
    assert Backoff(2.0, 2.0, max_delay=5.0).intervals(4, lambda: 0.0) == [2.0, 4.0, 5.0, 5.0]
    assert Backoff(2.0, 2.0, max_delay=5.0, jitter=0.5).intervals(3, lambda: 1.0) == [3.0, 6.0, 7.5]
    assert Backoff(0.0, 2.0).intervals(2, lambda: 0.0) == [0.0, 0.0]
    assert Backoff().intervals(0, lambda: 0.0) == []
    assert Backoff(8.0, 0.5).intervals(3, lambda: 0.0) == [8.0, 4.0, 2.0]


def test_a_wait_beyond_all_numbers_is_the_longest_one() -> None:
    assert Backoff(2.0, 1000.0, max_delay=60.0).interval(999) == 60.0  # 1000**999 is no float
    assert Backoff(1e300, 1000.0, max_delay=60.0).interval(50) == 60.0  # a product that is infinite
    assert Backoff(0.0, 1000.0, max_delay=60.0).interval(999) <= 60.0
    assert Backoff(5.0, 1e-3, max_delay=60.0).interval(999) == 0.0


# What follows from an outcome


def ended(
    outcome: Outcome,
    failures: int,
    tries: int,
    *,
    final: bool = False,
    postpone: float = 0.0,
    interruptions: int = 0,
) -> Ended:
    claim = Claim(1, (1,), "rq", attempt=1, failures=failures, tries=tries, interruptions=interruptions)
    return Ended(claim, outcome, final=final, postpone=postpone)


ONE = dataclasses.replace(SOURCE, backoff=Backoff(1.0, 2.0), max_interruptions=10)
INTERRUPTIONS = frozenset({Outcome.INTERRUPTED, Outcome.LOST})


@given(st.sampled_from(Outcome), st.integers(0, 12), st.integers(0, 12), st.booleans(), st.integers(0, 12))
def test_every_outcome_leads_somewhere(outcome: Outcome, failures: int, tries: int, final: bool, times: int) -> None:
    fate = decide(ended(outcome, failures, tries, final=final, postpone=7.0, interruptions=times), ONE)
    assert fate.state not in (State.QUEUED, State.STARTED)
    # A claim goes on exactly when its row waits for another attempt.
    assert fate.claim_goes_on == (fate.state is State.RETRYING)
    assert fate.failures - failures == (1 if outcome in FAILURES else 0)
    if outcome in FAILURES:
        assert fate.state is (State.FAILED if final or failures >= tries else State.RETRYING)
        if fate.state is State.RETRYING:
            assert fate.delay == ONE.backoff.interval(failures)
    assert fate.interruptions == (times + 1 if outcome in INTERRUPTIONS else 0)
    if fate.state is State.FAILED:
        assert outcome in FAILURES or fate.interruptions >= ONE.max_interruptions
    if outcome in INTERRUPTIONS and fate.interruptions >= ONE.max_interruptions:
        assert fate.state is State.FAILED


@given(st.lists(st.sampled_from(Outcome)), st.integers(0, 8))
def test_no_row_fails_more_often_than_once_and_its_tries(story: list[Outcome], tries: int) -> None:
    failures = interruptions = 0
    for outcome in [*story, *[Outcome.FAILED] * (tries + 1)]:
        fate = decide(ended(outcome, failures, tries, postpone=1.0, interruptions=interruptions), ONE)
        failures, interruptions = fate.failures, fate.interruptions
        assert failures <= 1 + tries
        assert interruptions <= ONE.max_interruptions
        if not fate.claim_goes_on:
            break
    else:
        pytest.fail("the row never came to an end")


@pytest.mark.parametrize("outcome", sorted(INTERRUPTIONS))
def test_an_interruption_spends_nothing(outcome: Outcome) -> None:
    assert decide(ended(outcome, 0, 3), ONE) == Fate(State.READY, 0, interruptions=1)
    # A new claim would forget the tries that are spent: the old one goes on, at once.
    assert decide(ended(outcome, 2, 3), ONE) == Fate(State.RETRYING, 2, 0.0, interruptions=1)
    assert decide(ended(outcome, 3, 3), ONE) == Fate(State.RETRYING, 3, 0.0, interruptions=1)


@pytest.mark.parametrize("outcome", sorted(INTERRUPTIONS))
def test_the_last_of_too_many_interruptions_in_a_row_is_a_failure(outcome: Outcome) -> None:
    source = dataclasses.replace(ONE, max_interruptions=3)
    assert decide(ended(outcome, 0, 3, interruptions=1), source) == Fate(State.READY, 0, interruptions=2)
    assert decide(ended(outcome, 0, 3, interruptions=2), source) == Fate(State.FAILED, 0, interruptions=3)
    assert decide(ended(outcome, 2, 3, interruptions=2), source) == Fate(State.FAILED, 2, interruptions=3)
    assert decide(ended(outcome, 0, 3, interruptions=9), source).state is State.FAILED  # it was set lower since
    assert decide(ended(outcome, 0, 3), dataclasses.replace(ONE, max_interruptions=1)).state is State.FAILED


def test_whatever_else_ends_an_attempt_begins_the_count_anew() -> None:
    for outcome in set(Outcome) - INTERRUPTIONS:
        assert decide(ended(outcome, 0, 3, interruptions=9), ONE).interruptions == 0


def test_fates_by_example() -> None:
    assert decide(ended(Outcome.DONE, 2, 3), ONE) == Fate(State.DONE, 2)
    assert decide(ended(Outcome.CANCELLED, 0, 3), ONE) == Fate(State.CANCELLED, 0)
    assert decide(ended(Outcome.POSTPONED, 3, 3, postpone=0.25), ONE) == Fate(State.RETRYING, 3, 0.25)
    assert decide(ended(Outcome.FAILED, 0, 0), ONE) == Fate(State.FAILED, 1)
    assert decide(ended(Outcome.FAILED, 1, 3), ONE) == Fate(State.RETRYING, 2, 2.0)
    assert decide(ended(Outcome.FAILED, 0, 3, final=True), ONE) == Fate(State.FAILED, 1)
    assert decide(ended(Outcome.TIMED_OUT, 3, 3), ONE) == Fate(State.FAILED, 4)
    jittered = dataclasses.replace(ONE, backoff=Backoff(1.0, jitter=1.0))
    assert decide(ended(Outcome.CRASHED, 0, 1), jittered, stretch=0.5) == Fate(State.RETRYING, 1, 1.5)
    assert decide(ended(Outcome.POSTPONED, 0, 3, postpone=0.0), ONE).claim_goes_on


# Texts

any_text = st.text(st.characters(codec=None, exclude_categories=[]) | st.sampled_from("\0\ud800\udfffä€🎈"))


@given(any_text)
def test_cleaned_text_is_taken_by_every_database(text: str) -> None:
    clean = clean_text(text)
    assert clean is not None
    assert "\0" not in clean
    assert clean.encode().decode() == clean
    if text.isprintable():
        assert clean == text


@given(any_text.filter(bool), st.integers(64, 300), st.integers(1, 1000))
def test_cleaned_text_is_never_longer_than_its_limit_and_mark(text: str, limit: int, times: int) -> None:
    text = (text * times)[:3000]
    clean = clean_text(text, limit)
    assert clean is not None
    assert len(clean.encode()) <= limit + 64
    assert "\0" not in clean


def test_long_text_keeps_its_beginning_and_more_of_its_end() -> None:
    text = "begin " + "ä🎈" * 100_000 + " end"
    clean = clean_text(text)
    assert clean is not None
    assert len(clean.encode()) <= 64 * 1024
    assert clean.startswith("begin ä")
    assert clean.endswith("🎈 end")
    head, mark, tail = clean.partition("\n[… ")
    cut = int(tail.partition(" bytes cut …]\n")[0])
    assert mark
    assert abs(len(text.encode()) - cut - TEXT_LIMIT) <= 8
    assert len(tail) > 2 * len(head)


def test_text_at_the_limit_is_whole() -> None:
    assert clean_text("x" * TEXT_LIMIT) == "x" * TEXT_LIMIT
    assert clean_text("x" * (TEXT_LIMIT + 1)) != "x" * (TEXT_LIMIT + 1)
    assert clean_text("") == ""
    assert clean_text(None) is None


def test_nul_and_surrogates_stay_readable() -> None:
    assert clean_text("a\0b\ud800c") == "a\\x00b\\ud800c"
