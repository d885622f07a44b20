"""A place for processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptd.store.local import LocalStore
from ckptd.store.root import create_root
from tests.fakes.jobs import Place, new_place


@pytest.fixture
def place() -> Iterator[Place]:
    """A private runtime directory and an empty root; no process or socket may be left there."""
    with new_place() as fresh:
        store = LocalStore(fresh.root)
        create_root(store)
        store.close()
        yield fresh
