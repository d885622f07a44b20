"""What every store must do. Subclasses supply a `store` fixture: an empty store."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from ckptd.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from ckptd.store.base import Store

CHUNK = "chunks/3f/3f0123456789abcdef0123456789abcd-000000001000-0007"
RANK = "ranks/000000001000-0007/00003"
COMMIT = "checkpoints/000000001000-0007"

BAD_KEYS = (
    "", ".", "..", "../x", "attempts/..", "attempts/../x", "attempts/./x", "/attempts/0007",
    "attempts//0007", "//", "/", "attempts/", "attempts/00\x0007", "attempts/0007\n", "\nattempts",
    "attempts\\0007", "attempts/caf\u00e9", "attempts/\uff0e\uff0e", "attempts/\u2024\u2024",
    "attempts/a b", "attempts/A", "a/b/c/d", "attempts/0007\r", "attempts/.hidden", ".tmp", "~",
    "C:\\x", "attempts/\u0660", "a/" + "b" * 200,
)  # fmt: skip


class StoreContract:
    def test_what_was_put_is_what_is_got(self, store: Store) -> None:
        store.put_new(RANK, b"abc")
        store.put(COMMIT, b"def")
        assert store.get(RANK, max_bytes=3) == b"abc"
        assert store.get(COMMIT, max_bytes=100) == b"def"

    def test_the_record_of_the_root_is_a_key(self, store: Store) -> None:
        store.put_new("ckptd.json", b"{}")
        assert store.get("ckptd.json", max_bytes=10) == b"{}"
        assert [e.key for e in store.list("")] == ["ckptd.json"]

    @pytest.mark.parametrize("way", ["put", "put_new"])
    def test_an_empty_object_exists(self, store: Store, way: str) -> None:
        getattr(store, way)(COMMIT, b"")
        assert store.get(COMMIT, max_bytes=0) == b""
        assert [(e.key, e.bytes) for e in store.list("checkpoints/")] == [(COMMIT, 0)]
        with pytest.raises(ObjectExistsError):
            store.put_new(COMMIT, b"x")

    @pytest.mark.parametrize("extra", [-1, 0, 1, 17, 4096])
    def test_large_objects_keep_every_byte(self, store: Store, extra: int) -> None:
        size = (3 << 20) + extra
        data = bytes(range(251)) * (size // 251 + 1)
        view = memoryview(data)[:size]
        store.put_new(CHUNK, view, is_deferred=True)
        store.put(RANK, view)
        store.sync()
        assert store.get(CHUNK, max_bytes=size) == data[:size]
        assert store.get(RANK, max_bytes=size) == data[:size]

    def test_any_buffer_is_taken_at_any_alignment(self, store: Store) -> None:
        data = bytearray(range(256)) * (5 << 12)
        for number, offset in enumerate((0, 1, 64, 4095)):
            view = memoryview(data)[offset:]
            store.put_new(f"attempts/{number:04d}", view)
            assert store.get(f"attempts/{number:04d}", max_bytes=len(data)) == bytes(view)
        store.put_new("attempts/0009", bytearray(b"xyz"))
        store.put("attempts/0010", memoryview(b"abc").cast("B"))
        assert store.get("attempts/0009", max_bytes=3) == b"xyz"

    def test_a_buffer_is_counted_in_bytes_not_in_items(self, store: Store) -> None:
        store.put_new(RANK, memoryview(bytes(16)).cast("I"))
        assert len(store.get(RANK, max_bytes=16)) == 16

    def test_later_changes_of_the_buffer_do_not_reach_the_object(self, store: Store) -> None:
        data = bytearray(b"before")
        store.put_new(RANK, data)
        data[:] = b"after!"
        assert store.get(RANK, max_bytes=6) == b"before"

    @pytest.mark.parametrize("is_deferred", [False, True])
    def test_d8_put_new_leaves_an_object_alone_that_exists(
        self, store: Store, is_deferred: bool
    ) -> None:
        store.put_new(CHUNK, b"first")
        with pytest.raises(ObjectExistsError) as caught:
            store.put_new(CHUNK, b"second", is_deferred=is_deferred)
        assert caught.value.key == CHUNK
        store.sync()
        assert store.get(CHUNK, max_bytes=10) == b"first"

    def test_put_replaces_whole_objects(self, store: Store) -> None:
        store.put(COMMIT, b"a long manifest")
        store.put(COMMIT, b"")
        assert store.get(COMMIT, max_bytes=0) == b""

    def test_d4_of_racing_put_new_exactly_one_wins(self, store: Store) -> None:
        threads = 4
        for number in range(100):
            key = f"checkpoints/{number:012d}-0001"
            assert len(_race(store, key, threads)) == 1

    def test_of_racing_put_new_of_large_objects_the_winner_is_whole(self, store: Store) -> None:
        for number in range(3):
            key = f"chunks/00/{number}"
            (winner,) = _race(store, key, 3, times=(1 << 20) + 5)
            assert store.get(key, max_bytes=2 << 20) == bytes([winner]) * ((1 << 20) + 5)

    def test_any_range_is_read_into_memory_of_the_caller(self, store: Store) -> None:
        store.put_new(CHUNK, bytes(range(100)))
        for offset, length in ((90, 10), (0, 3), (5, 0), (100, 0), (0, 100)):
            room = bytearray(b"x" * (length + 2))
            assert store.read_into(CHUNK, offset, memoryview(room)[1 : length + 1]) == 100
            assert room == b"x" + bytes(range(offset, offset + length)) + b"x"

    def test_a_range_that_leaves_the_object_is_refused(self, store: Store) -> None:
        store.put_new(CHUNK, bytes(100))
        for offset, length in ((99, 2), (100, 1), (101, 0), (-1, 2), (1 << 70, 1)):
            with pytest.raises(StoreError) as caught:
                store.read_into(CHUNK, offset, memoryview(bytearray(length)))
            assert caught.value.key == CHUNK
            assert not isinstance(caught.value, ObjectNotFoundError)

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        store.put_new("ckptd.json", b"{}")
        for key in (CHUNK, RANK, COMMIT, "pins/000000001000-0007"):
            with pytest.raises(ObjectNotFoundError) as caught:
                store.get(key, max_bytes=10)
            assert caught.value.key == key
            with pytest.raises(ObjectNotFoundError):
                store.read_into(key, 0, memoryview(bytearray(0)))

    def test_an_object_larger_than_allowed_is_refused(self, store: Store) -> None:
        store.put_new(RANK, b"12345")
        with pytest.raises(StoreError) as caught:
            store.get(RANK, max_bytes=4)
        assert not isinstance(caught.value, ObjectNotFoundError)
        assert not caught.value.retryable

    def test_a_listing_is_sorted_by_key_and_has_lengths_and_times(self, store: Store) -> None:
        # "-" < "/" < "0": a folder's keys do not stand where the folder's name would.
        keys = ["a/b-c", "a/b/c", "a/c", "ab/1", "ckptd.json", "z"]
        for length, key in reversed(list(enumerate(keys))):
            store.put(key, bytes(length))
        entries = list(store.list(""))
        assert [(e.key, e.bytes) for e in entries] == [(k, n) for n, k in enumerate(keys)]
        assert all(abs(e.modified_s - store.now_s()) < 3600 for e in entries)

    def test_a_listing_holds_its_prefix_and_nothing_else(self, store: Store) -> None:
        store.put_new("ckptd.json", b"{}")
        for key in (CHUNK, RANK, COMMIT, "ranks/000000001000-0007/00001", "rank/0"):
            store.put_new(key, b"x")
        assert [e.key for e in store.list("ranks/000000001000-0007/")] == [
            "ranks/000000001000-0007/00001", RANK,
        ]  # fmt: skip
        assert [e.key for e in store.list("ranks/")] == ["ranks/000000001000-0007/00001", RANK]
        assert list(store.list("pins/")) == []
        assert list(store.list("ranks/000000001001-0007/")) == []

    def test_a_bad_prefix_is_refused_at_the_call(self, store: Store) -> None:
        for prefix in ("ranks", "/", "../", "ranks//", "a/../", "ranks/\n/", "./", "A/"):
            with pytest.raises(ValueError, match="not a prefix"):
                store.list(prefix)

    def test_deleting_is_final_and_may_be_repeated(self, store: Store) -> None:
        store.put_new(RANK, b"x")
        store.delete(RANK)
        store.delete(RANK)
        store.delete(CHUNK)
        assert list(store.list("")) == []
        with pytest.raises(ObjectNotFoundError):
            store.get(RANK, max_bytes=1)
        store.put_new(RANK, b"y")
        assert store.get(RANK, max_bytes=1) == b"y"

    def test_s4_a_bad_key_is_refused_before_anything_happens(self, store: Store) -> None:
        store.put_new("ckptd.json", b"{}")
        calls: tuple[Callable[[str], object], ...] = (
            lambda key: store.put(key, b"x"),
            lambda key: store.put_new(key, b"x"),
            lambda key: store.put_new(key, b"x", is_deferred=True),
            lambda key: store.get(key, max_bytes=9),
            lambda key: store.read_into(key, 0, memoryview(bytearray(1))),
            store.delete,
        )
        for key in BAD_KEYS:
            for call in calls:
                with pytest.raises(ValueError, match="not a key"):
                    call(key)
        assert [e.key for e in store.list("")] == ["ckptd.json"]

    def test_sync_keeps_deferred_objects_and_may_be_repeated(self, store: Store) -> None:
        store.sync()
        for number in range(20):
            store.put_new(f"chunks/{number:02x}/{number}", bytes([number]), is_deferred=True)
        assert len(list(store.list("chunks/"))) == 20
        store.sync()
        store.sync()
        assert [store.get(e.key, max_bytes=1)[0] for e in store.list("chunks/")] == list(range(20))

    def test_g6_the_clock_of_the_store_does_not_go_back(self, store: Store) -> None:
        store.put_new(RANK, b"x")
        (entry,) = store.list("ranks/")
        assert store.now_s() >= math.floor(entry.modified_s)  # HTTP tells the time in seconds

    def test_closing_may_be_repeated(self, store: Store) -> None:
        store.put_new(RANK, b"x")
        store.close()
        store.close()


def _race(store: Store, key: str, threads: int, times: int = 1) -> list[int]:
    """Let threads create one key at once; return those that won."""
    winners: list[int] = []
    gate = threading.Barrier(threads)

    def create(number: int) -> None:
        gate.wait()
        try:
            store.put_new(key, bytes([number]) * times)
        except ObjectExistsError:
            return
        winners.append(number)

    workers = [threading.Thread(target=create, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert store.get(key, max_bytes=times) == bytes([winners[0]]) * times
    return winners
