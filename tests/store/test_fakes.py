from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest

from ckptd.errors import CkptdError, ObjectNotFoundError, StoreUnavailableError
from ckptd.store.memory import MemoryStore
from tests.contracts.store_contract import CHUNK, COMMIT, RANK, StoreContract
from tests.fakes.stores import Crashed, CrashingStore, FlakyStore, Op, RecordingStore


class TestRecordingStore(StoreContract):
    @pytest.fixture
    def store(self) -> RecordingStore:
        return RecordingStore(MemoryStore())


@pytest.mark.parametrize("crash", ["before", "after"])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_crash_comes_after_so_many_writes_and_is_for_good(
    crash: Literal["before", "after"], writes: int
) -> None:
    inner = MemoryStore()
    store = CrashingStore(inner, writes, crash=crash)
    for key in (CHUNK, RANK, COMMIT)[:writes]:
        list(store.list(""))
        store.put_new(key, b"x")
    assert not store.is_dead
    with pytest.raises(Crashed):
        store.put_new((CHUNK, RANK, COMMIT)[writes], b"x")
    acted = writes + (crash == "after")
    assert {e.key for e in inner.list("")} == set([CHUNK, RANK, COMMIT][:acted])
    assert store.is_dead
    for call in (lambda: store.get(CHUNK, max_bytes=1), lambda: store.put(RANK, b"y"), store.sync):
        with pytest.raises(Crashed):
            call()


def test_a_store_that_outlives_its_caller_is_not_dead() -> None:
    store = CrashingStore(MemoryStore(), 3)
    store.put(RANK, b"x")
    store.sync()
    store.delete(RANK)
    assert not store.is_dead


def test_flaky_calls_follow_the_seed() -> None:
    outcomes = []
    for _ in range(2):
        store = FlakyStore(MemoryStore(), {"put": 0.3}, seed=7)
        outcomes.append([_fails(store, n) for n in range(200)])
        assert store.failures == sum(outcomes[-1])
    assert outcomes[0] == outcomes[1]
    assert 30 < sum(outcomes[0]) < 90


@pytest.mark.parametrize("acted", [0.0, 1.0])
def test_a_lost_answer_is_a_failure_that_acted(acted: float) -> None:
    inner = MemoryStore()
    store = FlakyStore(inner, {"put_new": 1.0}, seed=1, acted=acted)
    with pytest.raises(StoreUnavailableError):
        store.put_new(RANK, b"x")
    assert len(list(inner.list(""))) == acted


def test_the_log_has_what_returned_and_what_was_tried() -> None:
    store = RecordingStore(MemoryStore())
    store.put_new(CHUNK, b"x", is_deferred=True)
    store.sync()
    store.put_new(RANK, b"x")
    with pytest.raises(ObjectNotFoundError):
        store.get(COMMIT, max_bytes=1)
    assert store.writes == [Op("put_deferred", CHUNK), Op("sync", ""), Op("put_new", RANK)]
    assert Counter(op.name for op in store.attempted)["get"] == 1
    assert "get" not in {op.name for op in store.ops}


def _fails(store: FlakyStore, number: int) -> bool:
    try:
        store.put(f"attempts/{number}", b"")
    except CkptdError:
        return True
    return False
