from __future__ import annotations

import pytest

from ckptd.store.memory import MemoryStore
from tests.contracts.store_contract import RANK, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


def test_the_clock_is_the_one_that_was_passed_in() -> None:
    now = [10.0]
    store = MemoryStore(clock=lambda: now[0])
    store.put_new(RANK, b"x")
    now[0] = 20.0
    assert [e.modified_s for e in store.list("")] == [10.0]
    assert store.now_s() == 20.0


def test_a_listing_stays_as_it_was_when_it_began() -> None:
    store = MemoryStore()
    store.put_new(RANK, b"x")
    listing = store.list("")
    store.delete(RANK)
    assert [e.key for e in listing] == [RANK]
