"""The fixtures of the conformance tests; what they call by name is in places.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Database

from conformance.places import Events, Place
from nih_sched import telemetry
from nih_sched.runner.hand import Hand, new_hand


@pytest.fixture
def place(database: Database) -> Iterator[Place]:
    """The test's database, its owner's hand on it."""
    place = Place(database)
    yield place
    place.close()


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    """A worker's and its horse's; other tests of this process get theirs back afterwards."""
    monkeypatch.setattr("nih_sched.runner.hand._hand", None)
    return new_hand()


@pytest.fixture
def events() -> Iterator[Events]:
    """What is emitted meanwhile."""
    heard: Events = []
    telemetry.unsubscribe_all()
    telemetry.subscribe(lambda event, facts: heard.append((event, facts)))
    yield heard
    telemetry.unsubscribe_all()
