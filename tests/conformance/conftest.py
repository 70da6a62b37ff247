"""The fixtures of the conformance tests; what they call by name is in places.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Database

from conformance.places import Events, Place
from nih_sched import telemetry


@pytest.fixture
def place(database: Database) -> Iterator[Place]:
    """The test's database, its owner's hand on it."""
    place = Place(database)
    yield place
    place.close()


@pytest.fixture
def events() -> Iterator[Events]:
    """What is emitted meanwhile."""
    heard: Events = []
    telemetry.unsubscribe_all()
    telemetry.subscribe(lambda event, facts: heard.append((event, facts)))
    yield heard
    telemetry.unsubscribe_all()
