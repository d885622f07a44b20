"""Starting an attempt: threads stand for ranks."""

from __future__ import annotations

import threading

import pytest

from ckptd.codec.records import decode_record
from ckptd.errors import (
    CkptdError,
    ConfigError,
    MeetingError,
    StoreAccessDeniedError,
    StoreUnavailableError,
    UnsupportedFormatError,
)
from ckptd.model import keys
from ckptd.model.manifest import AttemptRecord
from ckptd.store.base import Store
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.trainer.attempts import Attempt, start_attempt
from ckptd.trainer.boards import LocalBoard
from ckptd.trainer.meeting import Meeting
from tests.fakes.stores import FailingStore, Op, RecordingStore

WAIT_S = 20.0


def start(*stores: Store, timeout_s: float = WAIT_S) -> list[Attempt | Exception]:
    """Start one attempt, each store being what one rank sees."""
    board = LocalBoard()
    found: list[Attempt | Exception] = [RuntimeError("nothing came")] * len(stores)

    def work(rank: int) -> None:
        try:
            found[rank] = start_attempt(
                stores[rank], Meeting(board, rank, len(stores)), timeout_s
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the test judges it
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return found


def record(store: Store, ordinal: int) -> AttemptRecord:
    key = keys.attempt(ordinal)
    return decode_record(store.get(key, max_bytes=1 << 16), AttemptRecord, key=key)


def test_the_first_attempt_makes_the_root_and_is_number_1() -> None:
    store = MemoryStore()
    (attempt,) = start(store)
    assert attempt.ordinal == 1
    found = record(store, 1)
    assert (found.token, found.world_size) == (attempt.token, 1)
    assert found.host
    assert found.user
    assert found.pid


def test_all_ranks_are_of_one_attempt() -> None:
    store = MemoryStore()
    found = start(store, store, store)
    assert len(set(found)) == 1
    assert record(store, 1).world_size == 3


def test_each_start_is_the_next_attempt_with_a_token_of_its_own() -> None:
    store = MemoryStore()
    found = [start(store)[0] for _ in range(3)]
    assert [attempt.ordinal for attempt in found] == [1, 2, 3]
    assert len({attempt.token for attempt in found}) == 3


def test_a_gap_is_not_filled() -> None:
    store = MemoryStore()
    start(store)
    store.put(keys.attempt(7), b"whatever")
    assert start(store)[0].ordinal == 8


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_n15_jobs_that_start_at_once_get_attempts_of_their_own(kind: str, tmp_path) -> None:
    store = MemoryStore() if kind == "memory" else LocalStore(str(tmp_path / "root"))
    barrier = threading.Barrier(8)
    found: list[Attempt] = []

    def work() -> None:
        barrier.wait(WAIT_S)
        found.append(start_attempt(store, Meeting(LocalBoard(), 0, 1), WAIT_S))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(attempt.ordinal for attempt in found) == list(range(1, 9))
    for attempt in found:
        assert record(store, attempt.ordinal).token == attempt.token


def test_a_rank_that_sees_another_root_is_found_at_once() -> None:
    here, there = MemoryStore(), MemoryStore("memory://elsewhere")
    zero, one = start(here, there)
    assert zero.ordinal == 1
    assert isinstance(one, ConfigError)
    assert "rank 1" in str(one)
    assert "is not there" in str(one)
    assert "memory://elsewhere" in str(one)


def test_a_rank_that_sees_another_jobs_record_is_found_at_once() -> None:
    here, there = MemoryStore(), MemoryStore()
    start(there)
    one = start(here, there)[1]
    assert isinstance(one, ConfigError)
    assert "another job's" in str(one)


@pytest.mark.parametrize("kind", [StoreUnavailableError, StoreAccessDeniedError])
def test_a_store_that_rank_0_cannot_use_is_the_same_error_on_all_ranks(kind) -> None:
    failing = FailingStore(MemoryStore(), frozenset({"put_new"}), kind("attempts/", "no"))
    for error in start(failing, MemoryStore(), MemoryStore()):
        assert isinstance(error, kind)
    assert "rank 0" in str(error)


def test_a_folder_that_is_no_root_is_the_same_error_on_all_ranks(tmp_path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    for error in start(LocalStore(str(tmp_path)), MemoryStore()):
        assert isinstance(error, ConfigError)
        assert "precious.txt" in str(error)


def test_r5_a_root_of_a_newer_format_is_refused_on_all_ranks() -> None:
    store = MemoryStore()
    store.put("ckptd.json", b'{"format":2}')
    zero, one = start(store, store)
    assert isinstance(zero, UnsupportedFormatError)
    assert isinstance(one, CkptdError)
    assert "format 2" in str(one)


def test_a_rank_0_that_never_comes_is_named() -> None:
    with pytest.raises(MeetingError, match="rank 0"):
        start_attempt(MemoryStore(), Meeting(LocalBoard(), 1, 2), 0.01)


def test_the_last_attempt_there_can_be_is_the_last() -> None:
    store = MemoryStore()
    start(store)
    store.put(keys.attempt(keys.MAX_ATTEMPT), b"x")
    (error,) = start(store)
    assert isinstance(error, ConfigError)
    assert "new root" in str(error)


def test_an_answer_that_was_lost_does_not_make_two_ranks_disagree() -> None:
    """The record stands although rank 0 heard of no success: it says so, and nobody uses it."""

    class Lost(RecordingStore):
        def _after(self, op: Op) -> None:
            if op.name == "put_new" and op.key.startswith("attempts/"):
                raise StoreUnavailableError(op.key, "no answer")

    store = MemoryStore()
    for error in start(Lost(store), store):
        assert isinstance(error, StoreUnavailableError)
    assert start(store)[0].ordinal == 2
