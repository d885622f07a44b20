"""A place for processes, and ranks that are forked from one that has imported torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.jobs import Place, Ranks, new_place


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def place(ranks: Ranks) -> Iterator[Place]:
    """A private runtime directory without a root; no process or socket may be left there."""
    with new_place() as fresh:
        yield fresh
