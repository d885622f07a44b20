from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import numpy as np
import pytest

from ckptd import failpoints
from ckptd.codec.blocks import PLANES32, RAW
from ckptd.codec.chunk import Decoder, Encoder, block_count, header_bytes, read_header, stored_bound
from ckptd.cores import usable_cores
from ckptd.errors import SlotMovedError, StoreError, StoreFullError, StoreUnavailableError
from ckptd.model.keys import StepId
from ckptd.model.manifest import MAX_CHUNK_BYTES, Chunk
from ckptd.pipeline.pace import Pace
from ckptd.pipeline.write import ChunkWriter, Source, default_workers
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.root import create_root
from tests.fakes.jobs import wait_until
from tests.fakes.stores import FailingStore, Op, RecordingStore

BIRTH = StepId(1, 10)
MIB = 1 << 20
WAIT_S = 20.0


@pytest.fixture
def writer() -> Iterator[ChunkWriter]:
    writer = ChunkWriter(workers=2)
    yield writer
    writer.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def noise(seed: int, count: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def source(array: np.ndarray, check: Callable[[], None] = lambda: None) -> Source:
    return Source(str(array.dtype), memoryview(array.tobytes()), check)


def read_back(store: MemoryStore, chunk: Chunk) -> bytes:
    data = memoryview(store.get(chunk.id.key, max_bytes=1 << 30))
    assert len(data) == chunk.stored_bytes
    header = read_header(
        data[: header_bytes(chunk.raw_bytes)],
        hash=chunk.hash, dtype=chunk.dtype, raw_bytes=chunk.raw_bytes,
    )  # fmt: skip
    out = bytearray(chunk.raw_bytes)
    for i in range(block_count(chunk.raw_bytes)):
        row = header.blocks[i]
        stored = data[row.stored_offset : row.stored_offset + row.stored_bytes]
        Decoder().decode_block(header, i, stored, memoryview(out)[i * MIB : (i + 1) * MIB])
    return bytes(out)


@pytest.mark.parametrize("compression", ["auto", "zstd", "none"])
def test_d2_chunks_come_back_in_order_and_byte_for_byte(
    writer: ChunkWriter, store: MemoryStore, compression
) -> None:
    arrays = [noise(1, 3 * MIB // 4 + 5), np.zeros(MIB, np.float32), noise(2, 7), noise(3)]
    chunks = writer.write(store, BIRTH, [source(a) for a in arrays], compression)
    assert [read_back(store, chunk) for chunk in chunks] == [a.tobytes() for a in arrays]
    assert {chunk.birth for chunk in chunks} == {str(BIRTH)}
    for chunk in chunks:
        chunk.check()


def codecs_of(store: MemoryStore, chunk: Chunk) -> set[int]:
    data = store.get(chunk.id.key, max_bytes=1 << 30)
    header = read_header(data, hash=chunk.hash, dtype=chunk.dtype, raw_bytes=chunk.raw_bytes)
    return {block.codec for block in header.blocks}


def test_auto_leaves_raw_what_coding_would_delay_and_nothing_else_does(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    pace = writer.pace_of(store)
    with pace.coding(1):
        time.sleep(0.001)  # a byte in a millisecond: no store is slower
    with pace.storing(1 << 40):
        pass
    for step, compression, codec in ((1, "auto", RAW), (2, "zstd", PLANES32), (3, "none", RAW)):
        (chunk,) = writer.write(store, StepId(1, step), [source(noise(1, MIB))], compression)
        assert codecs_of(store, chunk) == {codec}
    assert writer.pace_of(RecordingStore(store)) is pace, "by root, not by object"


def test_nothing_to_write_is_fine(writer: ChunkWriter, store: MemoryStore) -> None:
    assert writer.write(store, BIRTH, [], "auto") == []


def test_d3_all_chunks_are_durable_before_write_returns(writer: ChunkWriter) -> None:
    store = RecordingStore(MemoryStore())
    writer.write(store, BIRTH, [source(noise(seed)) for seed in range(5)], "auto")
    assert [op.name for op in store.writes] == ["put_deferred"] * 5 + ["sync"]


def test_d8_what_is_there_already_is_not_written_again(writer: ChunkWriter) -> None:
    store = RecordingStore(MemoryStore())
    sources = [source(noise(seed)) for seed in range(3)]
    first = writer.write(store, BIRTH, sources, "auto")
    assert writer.write(store, BIRTH, sources, "auto") == first
    assert [op.name for op in store.writes] == (["put_deferred"] * 3 + ["sync"]) + ["sync"]


def test_ranks_that_write_the_same_at_once_share_one_chunk(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    array = noise(1)
    chunks = writer.write(store, BIRTH, [source(array)] * 6, "auto")
    assert len(set(chunks)) == 1
    assert read_back(store, chunks[0]) == array.tobytes()


def test_the_length_of_a_chunk_that_was_coded_in_another_way_is_what_is_stored(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    array = np.zeros(3 * MIB // 4, np.float32)
    (raw,) = writer.write(store, BIRTH, [source(array)], "none")
    (again,) = writer.write(store, BIRTH, [source(array)], "zstd")
    assert again == raw
    assert again.stored_bytes == len(store.get(raw.id.key, max_bytes=1 << 30))


def test_a_chunk_of_another_step_is_not_taken_for_ours(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    array = noise(1)
    (first,) = writer.write(store, BIRTH, [source(array)], "auto")
    (second,) = writer.write(store, StepId(1, 20), [source(array)], "auto")
    assert first.hash == second.hash
    assert first.id.key != second.id.key


def test_the_bytes_are_read_once_and_checked_after_each_block(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    checks = []
    array = noise(1, 5 * MIB // 2 // 4)
    writer.write(store, BIRTH, [source(array, lambda: checks.append(1))], "auto")
    assert len(checks) == 3


def test_p4_a_check_that_fails_stores_nothing_of_its_chunk(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    def moved() -> None:
        raise SlotMovedError("moved")

    with pytest.raises(SlotMovedError):
        writer.write(store, BIRTH, [source(noise(1), moved)], "auto")
    assert list(store.list("")) == []


def test_the_first_failure_is_raised_and_all_work_has_ended_by_then(writer: ChunkWriter) -> None:
    """Nobody may read a slot after `write` has returned or raised."""
    busy = threading.Semaphore(0)
    reading = set()

    class Full(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "put_deferred":
                raise StoreFullError(op.key, "no space left")

    def make(number: int) -> Source:
        def check() -> None:
            reading.add(number)
            busy.release()

        return source(noise(number), check)

    with pytest.raises(StoreFullError):
        writer.write(Full(MemoryStore()), BIRTH, [make(n) for n in range(50)], "auto")
    before = set(reading)
    assert len(before) < 50, "the rest was not tried"
    writer.close()
    assert reading == before


def test_a_sync_that_fails_fails_the_write(writer: ChunkWriter, store: MemoryStore) -> None:
    failing = FailingStore(store, frozenset({"sync"}), StoreUnavailableError("", "no answer"))
    sources = [source(noise(1))]
    with pytest.raises(StoreUnavailableError):
        writer.write(failing, BIRTH, sources, "auto")
    failing.is_failing = False
    assert writer.write(failing, BIRTH, sources, "auto")


def test_d10_after_a_failed_sync_a_local_store_takes_the_chunks_anew(
    writer: ChunkWriter, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path / "root"))
    create_root(store)
    sources = [source(noise(seed)) for seed in range(3)]
    fsync, sync = os.fsync, store.sync
    is_syncing = threading.Event()

    def bad_fsync(fd: int) -> None:
        if is_syncing.is_set():
            raise OSError(5, "Input/output error")
        fsync(fd)

    def bad_sync() -> None:
        is_syncing.set()
        sync()

    monkeypatch.setattr(os, "fsync", bad_fsync)
    monkeypatch.setattr(store, "sync", bad_sync)
    with pytest.raises(StoreError, match="Input/output"):
        writer.write(store, BIRTH, sources, "auto")
    monkeypatch.undo()
    assert list(store.list("chunks/")) == [], "nobody knows what is on the disk"
    chunks = writer.write(store, BIRTH, sources, "auto")
    assert {entry.key for entry in store.list("chunks/")} == {c.id.key for c in chunks}


def test_p3_chunks_beyond_the_budget_wait_for_each_other(store: MemoryStore) -> None:
    writer = ChunkWriter(workers=4, budget_bytes=0)  # raised to what one chunk needs
    assert stored_bound(MAX_CHUNK_BYTES) <= writer.buffers.budget_bytes
    assert writer.buffers.budget_bytes < 2 * stored_bound(MAX_CHUNK_BYTES)
    chunks = writer.write(store, BIRTH, [source(noise(seed)) for seed in range(9)], "auto")
    assert len(chunks) == 9
    writer.close()


def test_the_encoder_is_one_per_thread(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """python-zstandard's objects must not be shared by threads."""
    from ckptd.pipeline import write as module

    made: list[threading.Thread] = []

    class Counted(Encoder):
        def __init__(self) -> None:
            made.append(threading.current_thread())
            super().__init__()

    monkeypatch.setattr(module, "Encoder", Counted)
    writer = ChunkWriter(workers=2)
    writer.write(store, BIRTH, [source(noise(seed)) for seed in range(20)], "auto")
    writer.close()
    assert 1 <= len(made) <= 2
    assert len(set(made)) == len(made)


def test_a_failpoint_before_a_chunk_and_before_the_sync(
    writer: ChunkWriter, store: MemoryStore
) -> None:
    failpoints.arm("chunk.put=raise")
    with pytest.raises(OSError, match=r"chunk\.put"):
        writer.write(store, BIRTH, [source(noise(1))], "auto")
    assert list(store.list("")) == []
    failpoints.arm("chunks.sync=raise")
    with pytest.raises(OSError, match=r"chunks\.sync"):
        writer.write(store, BIRTH, [source(noise(1))], "auto")


def test_workers_are_half_the_cores_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
    assert default_workers() == 1
    for cores, workers in ((2, 1), (4, 2), (8, 4), (64, 4)):
        monkeypatch.setattr(os, "cpu_count", lambda count=cores: count)
        assert default_workers() == workers


def test_writing_goes_on_after_the_pool_was_closed(store: MemoryStore) -> None:
    writer = ChunkWriter(workers=1)
    writer.close()
    array = noise(1)
    (chunk,) = writer.write(store, BIRTH, [source(array)], "auto")
    assert read_back(store, chunk) == array.tobytes()


@pytest.mark.parametrize("compression", ["auto", "zstd"])
def test_n16_where_ranks_may_overwrite_each_other_their_chunks_are_the_same_bytes(
    store: MemoryStore, compression
) -> None:
    store.has_conditional_put = False
    writer = ChunkWriter(workers=1)
    (chunk,) = writer.write(store, BIRTH, [source(noise(1, MIB))], compression)
    writer.close()
    assert codecs_of(store, chunk) == {RAW}, "what another node codes may differ"


def test_a_snapshot_may_have_many_thousand_chunks(store: MemoryStore) -> None:
    writer = ChunkWriter(workers=2)
    raw = noise(1, 10_001 * 16).tobytes()
    parts = [memoryview(raw)[at : at + 64] for at in range(0, len(raw), 64)]
    chunks = writer.write(store, BIRTH, [Source("float32", p, lambda: None) for p in parts], "none")
    writer.close()
    assert len({chunk.id.key for chunk in chunks}) == 10_001
    assert len({chunk.id.key.split("/")[1] for chunk in chunks}) == 256, "spread over all prefixes"
    assert read_back(store, chunks[-1]) == bytes(parts[-1])


def test_a_store_has_no_more_in_flight_than_it_is_worth(store: MemoryStore) -> None:
    most = 0
    lock = threading.Lock()

    class Slow(MemoryStore):
        traits = MemoryStore.traits._replace(budget_bytes=3 * MIB)

        def put_new(self, key: str, data: object, *, is_deferred: bool = False) -> None:
            nonlocal most
            with lock:
                most = max(most, writer.buffers._lent_bytes)
            super().put_new(key, data, is_deferred=is_deferred)  # type: ignore[arg-type]

    writer = ChunkWriter(workers=2)
    writer.write(Slow(), BIRTH, [source(noise(n, MIB // 4)) for n in range(12)], "none")
    writer.close()
    assert MIB <= most <= 3 * MIB


# --- what is urgent ------------------------------------------------------------------------------


class Gated(RecordingStore):
    """Takes one chunk after the other, and the first only when it is let in."""

    def __init__(self, *, budget_bytes: int) -> None:
        super().__init__(MemoryStore())
        self.traits = self.traits._replace(budget_bytes=budget_bytes)
        self.is_at_first = threading.Event()
        self.go = threading.Event()

    def _before(self, op: Op) -> None:
        super()._before(op)
        if op.name == "put_deferred":
            self.is_at_first.set()
            assert self.go.wait(WAIT_S)

    def steps(self) -> list[int]:
        """Return of which step each chunk is, in the order in which they were stored."""
        keys = [op.key for op in self.ops if op.name == "put_deferred"]
        return [int(key.split("-")[1]) for key in keys]


def write_behind(writer: ChunkWriter, store: Gated, until: Callable[[], bool]) -> list[int]:
    """Write four chunks of step 10 and, while the store is at the first, two urgent of step 20."""

    def write(step: int, count: int, is_urgent: bool) -> None:
        sources = [source(noise(100 * step + n, MIB // 4)) for n in range(count)]
        written[step] = writer.write(
            store, StepId(1, step), sources, "none", is_urgent=is_urgent
        )  # fmt: skip

    written: dict[int, list[Chunk]] = {}
    threads = [
        threading.Thread(target=write, args=arguments)
        for arguments in ((10, 4, False), (20, 2, True))
    ]
    threads[0].start()
    assert store.is_at_first.wait(WAIT_S)
    threads[1].start()
    wait_until(until, "the urgent chunks wait")
    store.go.set()
    for thread in threads:
        thread.join(WAIT_S)
    writer.close()
    assert {step: len(chunks) for step, chunks in written.items()} == {10: 4, 20: 2}
    return store.steps()


def test_urgent_chunks_are_stored_before_those_that_wait_for_the_store() -> None:
    writer = ChunkWriter(workers=1, puts=1)
    store = Gated(budget_bytes=64 * MIB)
    steps = write_behind(writer, store, lambda: len(writer._putters._waiting) == 5)
    assert steps == [10, 20, 20, 10, 10, 10]


def test_urgent_chunks_are_lent_buffers_before_those_that_wait_for_one() -> None:
    """The only coder waits for a buffer in order to code a chunk of the other snapshot."""
    writer = ChunkWriter(workers=1, puts=4)
    store = Gated(budget_bytes=1)  # one chunk in flight
    steps = write_behind(writer, store, lambda: writer.buffers._urgent == 1)
    assert steps == [10, 20, 20, 10, 10, 10]


@pytest.mark.parametrize("compression", ["auto", "zstd"])
@pytest.mark.parametrize(
    ("coding_s", "storing_s", "codec"),
    [(None, None, RAW), (0.1, 0.001, RAW), (0.001, 0.1, PLANES32)],
    ids=["unknown", "slower", "faster"],
)
def test_under_a_deadline_is_coded_only_what_is_known_to_keep_up_with_the_store(
    store: MemoryStore, compression, coding_s: float | None, storing_s: float | None, codec: int
) -> None:
    writer = ChunkWriter(workers=1)
    pace = writer._paces[store.url] = Pace(1, lambda: clock)
    clock = 0.0
    if coding_s is not None and storing_s is not None:
        with pace.coding(MIB):
            clock += coding_s
        with pace.storing(MIB):
            clock += storing_s
    (chunk,) = writer.write(store, BIRTH, [source(noise(1, MIB))], compression, is_urgent=True)
    writer.close()
    assert codecs_of(store, chunk) == {codec}


def test_n16_an_urgent_snapshot_is_raw_too_where_ranks_may_overwrite_each_other(
    store: MemoryStore,
) -> None:
    store.has_conditional_put = False
    writer = ChunkWriter(workers=1)
    pace = writer._paces[store.url] = Pace(1, lambda: clock)
    clock = 0.0
    with pace.storing(MIB):
        clock += 1.0
    with pace.coding(MIB):
        clock += 0.001
    (chunk,) = writer.write(store, BIRTH, [source(noise(1, MIB))], "zstd", is_urgent=True)
    writer.close()
    assert codecs_of(store, chunk) == {RAW}


def test_closing_lets_go_of_a_snapshot_that_waits_behind_another() -> None:
    writer = ChunkWriter(workers=1, puts=1)
    store = Gated(budget_bytes=64 * MIB)
    raised: list[BaseException] = []

    def write() -> None:
        try:
            writer.write(store, BIRTH, [source(noise(n, MIB // 4)) for n in range(4)], "none")
        except BaseException as error:  # noqa: BLE001 - whatever comes
            raised.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert store.is_at_first.wait(WAIT_S)
    wait_until(lambda: len(writer._putters._waiting) == 3, "three chunks wait")
    writer.close(wait=False)
    store.go.set()
    thread.join(WAIT_S)
    assert [type(error) for error in raised] == [CancelledError]
