import threading

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.codec.blocks import BLOCK_BYTES
from ckptd.errors import CorruptError, StoreUnavailableError
from ckptd.model.box import Box
from ckptd.model.keys import CHUNKS, StepId
from ckptd.pipeline.catalog import read_manifest, read_ranks
from ckptd.pipeline.read import Loader, needed_blocks, read_chunks, region_bytes
from ckptd.plan.reading import Region, Wanted, plan_reads
from ckptd.store.memory import MemoryStore
from tests.fakes.checkpoints import PLAIN, flip_byte, write_checkpoint
from tests.fakes.stores import FlakyStore

STEP = StepId(1, 1000)
# Five blocks of noise, and one of zeros, which shrinks to next to nothing.
BIG = np.random.default_rng(5).standard_normal((1500, 1024)).astype(np.float32)
BIG[-256:] = 0
TENSORS = PLAIN | {"model.big": BIG}


def written(tensors=TENSORS, **kwargs):
    store = MemoryStore()
    write_checkpoint(store, STEP, tensors, **kwargs)
    return store


def planned(store, wanted):
    return plan_reads(wanted, read_ranks(store, read_manifest(store, STEP)))


def fetch(store, wanted, *, in_parts=False, **kwargs):
    """Read boxes into arrays of zeros, as a whole or, where they are whole pieces, in parts."""
    arrays = [np.zeros(w.box.shape, TENSORS[w.fqn].dtype) for w in wanted]

    def place(region):
        want = wanted[region.wanted].box
        if not in_parts or region.box.shape[1:] != want.shape[1:]:
            return None
        rows = region.box.start[0] - want.start[0] if region.box.start else 0
        flat = arrays[region.wanted].reshape(-1).view(np.uint8)
        begin = rows * flat.nbytes // want.shape[0] if want.shape else 0

        def put(at, raw):
            flat[begin + at : begin + at + len(raw)] = raw

        return put

    def sink(region, raw):
        want = wanted[region.wanted]
        part = np.frombuffer(raw, arrays[region.wanted].dtype).reshape(region.box.shape)
        arrays[region.wanted][region.box.slices(want.box.start)] = part

    read_chunks(store, planned(store, wanted), sink, place=place, **kwargs)
    return arrays


def whole(tensors=TENSORS):
    return [Wanted(fqn, Box.full(array.shape)) for fqn, array in tensors.items()]


class Counting(MemoryStore):
    """Counts the bytes that leave an inner store."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.bytes = inner, 0

    def get(self, key, *, max_bytes):
        data = self.inner.get(key, max_bytes=max_bytes)
        self.bytes += len(data)
        return data

    def read_into(self, key, offset, out):
        self.bytes += len(out)
        return self.inner.read_into(key, offset, out)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("compression", ["auto", "none"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_d2_what_comes_back_is_what_was_written(world_size, compression, in_parts):
    store = written(world_size=world_size, compression=compression)
    for got, want in zip(fetch(store, whole(), in_parts=in_parts), TENSORS.values(), strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_box_comes_back(data):
    box = data.draw(boxes((1500, 1024)))
    (got,) = fetch(STORE, [Wanted("model.big", box)], in_parts=data.draw(st.booleans()))
    np.testing.assert_array_equal(got, BIG[box.slices((0, 0))])


@st.composite
def boxes(draw, shape):
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    return Box(start, stop)


STORE = written()


def test_a_few_rows_cost_their_blocks_and_not_the_chunk():
    counting = Counting(STORE)
    wanted = [Wanted("model.big", Box((600, 0), (610, 1024)))]
    (read,) = planned(STORE, wanted)
    assert needed_blocks(read) == [2]
    seen = []
    read_chunks(counting, [read], lambda _, raw: seen.append(bytes(raw)))
    assert seen == [BIG[600:610].tobytes()]
    assert counting.bytes < BLOCK_BYTES + 1024


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_columns_of_a_piece_are_copied_out_row_by_row(itemsize):
    raw = np.arange(6 * 5 * itemsize, dtype=np.uint8)
    region = Region(0, Box((11, 20, 1), (13, 21, 3)), Box((10, 20, 0), (13, 21, 5)), 0, itemsize)
    expected = raw[: 15 * itemsize].reshape(3, 1, 5, itemsize)[1:3, :, 1:3]
    assert bytes(region_bytes(raw, region)) == expected.tobytes()


def test_whole_pieces_and_runs_of_rows_are_not_copied():
    raw = np.zeros(64, dtype=np.uint8)
    for box in (Box((0, 0), (4, 4)), Box((1, 0), (3, 4))):
        view = region_bytes(raw, Region(0, box, Box((0, 0), (4, 4)), 0, 4))
        assert np.shares_memory(np.asarray(view), raw)


def test_more_dimensions_than_numpy_has_are_no_obstacle():
    ones = (0,) * 62
    region = Region(
        0, Box((1, 1, *ones), (2, 3, *(1,) * 62)), Box((0, 0, *ones), (2, 4, *(1,) * 62)), 0, 1
    )
    assert bytes(region_bytes(np.arange(8, dtype=np.uint8), region)) == bytes([5, 6])


def test_r4_no_byte_of_a_damaged_chunk_reaches_the_sink():
    tried = 0
    for entry in list(STORE.list(CHUNKS)):
        for at in {0, 30, entry.bytes // 3, entry.bytes // 2, entry.bytes - 1}:
            if not 0 <= at < entry.bytes:
                continue
            store = MemoryStore()
            store._objects = dict(STORE._objects)
            flip_byte(store, entry.key, at)
            seen = []
            with pytest.raises(CorruptError) as caught:
                read_chunks(
                    store,
                    [r for r in planned(store, whole()) if r.chunk.id.key == entry.key],
                    lambda region, raw, seen=seen: seen.append(region),
                )
            assert caught.value.key == entry.key
            assert seen == []
            tried += 1
    assert tried >= 9


def test_r4_no_byte_of_a_damaged_block_is_put_anywhere():
    store = written()
    wanted = [Wanted("model.big", Box.full(BIG.shape))]
    (read,) = planned(store, wanted)
    flip_byte(store, read.chunk.id.key, read.chunk.stored_bytes // 2)
    put = {}

    def place(region):
        return lambda at, raw: put.update({at: bytes(raw)})

    with pytest.raises(CorruptError):
        read_chunks(store, [read], pytest.fail, place=place, threads=1)
    assert 1 <= len(put) <= 3, "the blocks before the damaged one"
    for at, raw in put.items():
        assert raw == BIG.tobytes()[at : at + len(raw)]


def test_progress_tells_of_every_byte_that_was_read():
    told = []
    reads = planned(STORE, whole())
    read_chunks(STORE, reads, lambda *_: None, progress=lambda *both: told.append(both))
    total_bytes = sum(chunk.raw_bytes for chunk in {read.chunk for read in reads})
    assert told == sorted(told)
    assert told[-1] == (total_bytes, total_bytes)


def test_a_window_that_holds_few_blocks_is_filled_again_and_again():
    (read,) = planned(STORE, [Wanted("model.big", Box.full(BIG.shape))])
    counting = Counting(STORE)
    loader = Loader(counting, window_bytes=1)
    raw = b"".join(bytes(block.raw) for block in loader.blocks(read.chunk))
    assert raw == BIG.tobytes()
    assert counting.bytes < read.chunk.stored_bytes + 2 * BLOCK_BYTES
    wanted = [1, 2, 4]
    found = {block.start: bytes(block.raw) for block in loader.blocks(read.chunk, wanted)}
    assert found == {i * BLOCK_BYTES: raw[i * BLOCK_BYTES :][:BLOCK_BYTES] for i in wanted}


def test_a_flip_outside_of_the_needed_blocks_does_not_matter():
    store = written()
    wanted = [Wanted("model.big", Box((0, 0), (2, 1024)))]
    (read,) = planned(store, wanted)
    flip_byte(store, read.chunk.id.key, read.chunk.stored_bytes - 1)
    np.testing.assert_array_equal(fetch(store, wanted)[0], BIG[:2])


@pytest.mark.parametrize("is_partial", [True, False])
def test_truncated_longer_and_missing_chunks_are_damage(is_partial):
    box = Box((1499, 0), (1500, 1024)) if is_partial else Box.full(BIG.shape)
    wanted = [Wanted("model.big", box)]
    store = written()
    (read,) = planned(store, wanted)
    key = read.chunk.id.key
    data = store.get(key, max_bytes=1 << 30)
    cases = [data[:-1], data[:20], b"", data + b"x"]
    for case in cases:
        store.put(key, case)
        with pytest.raises(CorruptError) as caught:
            read_chunks(store, [read], pytest.fail)
        assert caught.value.key == key
    store.delete(key)
    with pytest.raises(CorruptError, match="missing"):
        read_chunks(store, [read], pytest.fail)


def test_r1_an_unavailable_store_is_not_damage():
    reads = planned(STORE, whole())
    flaky = FlakyStore(STORE, {"read_into": 1.0}, seed=1)
    with pytest.raises(StoreUnavailableError):
        read_chunks(flaky, reads, pytest.fail)


def test_n10_a_bit_that_flips_on_the_way_is_read_again():
    class Flips(Counting):
        seen = frozenset()

        def read_into(self, key, offset, out):
            size = super().read_into(key, offset, out)
            if key not in self.seen:
                self.seen |= {key}
                out[self.place] ^= 1
            return size

    flips = Flips(STORE)
    for flips.place in (40, -1):  # in the header, in the last block
        flips.seen = frozenset()
        for got, want in zip(fetch(flips, whole(), threads=1), TENSORS.values(), strict=True):
            np.testing.assert_array_equal(got, want)
        assert flips.seen


def test_a_hostile_stored_length_is_damage_before_memory_is_asked_for():
    (read, *_) = planned(STORE, whole())
    chunk = msgspec.structs.replace(read.chunk, stored_bytes=1 << 60)
    with pytest.raises(CorruptError, match="longer than any coding"):
        read_chunks(STORE, [read._replace(chunk=chunk)], pytest.fail)


def test_the_first_failure_stops_the_rest_and_no_thread_is_left():
    many = {f"model.w{i:03}": np.full(1 << 18, i, np.float32) for i in range(20)}
    store = written(many)
    reads = plan_reads(whole(many), read_ranks(store, read_manifest(store, STEP)))
    assert len(reads) == 20
    seen = []

    def sink(region, raw):
        seen.append(region)
        raise RuntimeError("the sink is full")

    with pytest.raises(RuntimeError, match="the sink is full"):
        read_chunks(store, reads, sink, threads=2)
    assert len(seen) <= 2
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptd-read")]


def test_a_small_budget_reads_one_chunk_at_a_time():
    names = set()
    reads = planned(STORE, whole())
    read_chunks(
        STORE, reads, lambda *_: names.add(threading.current_thread().name), threads=8,
        budget_bytes=1,
    )  # fmt: skip
    assert len(names) == 1


def test_a_chunk_of_another_length_than_the_manifest_says_is_damage():
    tensors = {"model.w": np.zeros(1000, np.float32)}
    store = written(tensors)
    (read,) = plan_reads(whole(tensors), read_ranks(store, read_manifest(store, STEP)))
    longer = msgspec.structs.replace(read.chunk, stored_bytes=read.chunk.stored_bytes + 1)
    with pytest.raises(CorruptError, match="another length"):
        read_chunks(store, [read._replace(chunk=longer)], pytest.fail)
