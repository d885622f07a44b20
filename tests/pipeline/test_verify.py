import msgspec
import numpy as np
import pytest
import xxhash

from ckptd.errors import CheckpointNotFoundError, CkptdError, StoreUnavailableError
from ckptd.model import keys
from ckptd.model.box import Box
from ckptd.model.keys import CHUNKS, StepId
from ckptd.pipeline.catalog import read_manifest, read_rank, read_ranks
from ckptd.pipeline.read import read_chunks
from ckptd.pipeline.verify import MAX_NAMES, verify, verify_all
from ckptd.plan.reading import Wanted, plan_reads
from ckptd.store.memory import MemoryStore
from tests.fakes.checkpoints import PLAIN, flip_byte, rewrite_record, write_checkpoint
from tests.fakes.stores import FlakyStore, RecordingStore

STEP, LATER = StepId(1, 1000), StepId(1, 2000)
TENSORS = PLAIN | {"model.big": np.random.default_rng(5).standard_normal((400, 1024)).astype("f4")}
VALUES = [{"epoch": 3, "rng": 1}, {"epoch": 3, "rng": 2}]


@pytest.fixture
def store():
    store = MemoryStore()
    write_checkpoint(
        store,
        STEP,
        TENSORS,
        world_size=2,
        values=VALUES,
        metrics={"loss": 1.25},
        compression="none",
    )
    return store


def copy_of(store):
    other = MemoryStore()
    for entry in store.list(""):
        other.put(entry.key, store.get(entry.key, max_bytes=1 << 30))
    return other


def parts_of(store):
    return [entry for entry in store.list("") if entry.key != keys.ROOT_RECORD]


def read_all(store):
    """Return all tensors as bytes, or raise."""
    manifest = read_manifest(store, STEP)
    wanted = [Wanted(t.fqn, _full(t)) for t in manifest.tensors]
    arrays = {t.fqn: np.zeros(t.shape, t.dtype) for t in manifest.tensors}

    def sink(region, raw):
        array = arrays[wanted[region.wanted].fqn]
        part = np.frombuffer(raw, array.dtype).reshape(region.box.shape)
        array[region.box.slices((0,) * array.ndim)] = part

    read_chunks(store, plan_reads(wanted, read_ranks(store, manifest)), sink)
    return arrays


def _full(tensor):
    return Box.full(tensor.shape)


@pytest.mark.parametrize("is_data", [False, True])
def test_a_whole_checkpoint_is_whole(store, is_data):
    report = verify(store, STEP, is_data=is_data)
    assert report.is_whole
    assert (report.ranks, report.is_data) == (2, is_data)
    assert report.raw_bytes == sum(array.nbytes for array in TENSORS.values())
    assert report.chunks == len(list(store.list(CHUNKS)))


def test_n10_a_flip_in_any_object_is_named_and_never_read_as_something_else(store):
    for entry in parts_of(store):
        for at in range(0, entry.bytes, max(1, entry.bytes // 40)):
            damaged = copy_of(store)
            flip_byte(damaged, entry.key, at)
            report = verify(damaged, STEP, is_data=True)
            # A flip in the manifest's hash of a rank manifest leaves open which one is damaged.
            named = " ".join(f"{d.key} {d.what}" for d in report.damage)
            assert entry.key in named, (entry.key, at)
            assert_never_wrong(damaged)


def test_n8_truncated_objects_are_named_and_never_read_as_something_else(store):
    for entry in parts_of(store):
        for size in {1, entry.bytes // 2, entry.bytes - 1}:
            damaged = copy_of(store)
            damaged.put(entry.key, store.get(entry.key, max_bytes=1 << 30)[:size])
            assert entry.key in {d.key for d in verify(damaged, STEP).damage}
            assert_never_wrong(damaged)


def test_missing_objects_are_named(store):
    for entry in parts_of(store):
        if entry.key != keys.checkpoint(STEP):
            damaged = copy_of(store)
            damaged.delete(entry.key)
            (damage,) = (d for d in verify(damaged, STEP).damage if d.key == entry.key)
            assert "missing" in damage.what


def assert_never_wrong(store):
    try:
        arrays = read_all(store)
    except CkptdError:
        return
    for fqn, array in arrays.items():
        np.testing.assert_array_equal(array, TENSORS[fqn])


def test_without_data_a_flip_in_a_chunk_is_not_looked_for(store):
    (entry, *_) = store.list(CHUNKS)
    flip_byte(store, entry.key, entry.bytes - 1)
    assert verify(store, STEP).is_whole
    assert not verify(store, STEP, is_data=True).is_whole


def test_damage_names_the_tensors_that_need_the_chunk():
    store = MemoryStore()
    many = {f"model.w{i}": np.full(3, i, np.float32) for i in range(9)}
    write_checkpoint(store, STEP, many)
    (entry,) = store.list(CHUNKS)
    store.delete(entry.key)
    (damage,) = verify(store, STEP).damage
    assert damage.tensors == tuple(f"model.w{i}" for i in range(MAX_NAMES))
    assert damage.tensor_count == 9


def test_j6_swapped_rank_manifests_are_named(store):
    one, two = (store.get(keys.rank(STEP, rank), max_bytes=1 << 20) for rank in (0, 1))
    store.put(keys.rank(STEP, 0), two)
    store.put(keys.rank(STEP, 1), one)
    assert {d.key for d in verify(store, STEP).damage} == {keys.rank(STEP, 0), keys.rank(STEP, 1)}


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"loss": 9.0}},
        {"differing": ()},
        {"raw_bytes": 1},
        {"previous": "000000000001-0001"},
        {"captured_at": 1.0},
    ],
)
def test_a_manifest_that_says_what_its_ranks_do_not_is_named(store, change):
    rewrite_record(store, keys.checkpoint(STEP), read_manifest(store, STEP), **change)
    (damage,) = verify(store, STEP).damage
    assert damage.key == keys.checkpoint(STEP)
    assert next(iter(change)) in damage.what


def test_rank_manifests_that_leave_a_hole_are_named(store):
    manifest = read_manifest(store, STEP)
    record = read_rank(store, manifest, 1)
    pieces = [p for p in record.unpack() if record.tensors[p.tensor].fqn != "model.big"]
    empty = msgspec.structs.replace(record, pieces=record.pieces.pack(pieces))
    rewrite_record(store, keys.rank(STEP, 1), empty)
    data = store.get(keys.rank(STEP, 1), max_bytes=1 << 20)
    entry = msgspec.structs.replace(
        manifest.ranks[1], bytes=len(data), hash=xxhash.xxh3_128_hexdigest(data)
    )
    rewrite_record(
        store, keys.checkpoint(STEP), manifest, ranks=(manifest.ranks[0], entry)
    )  # fmt: skip
    (damage,) = verify(store, STEP).damage
    assert "do not make a whole checkpoint" in damage.what
    assert "model.big" in damage.what


def test_a_tombstone_is_not_found(store):
    store.put(keys.checkpoint(STEP), b"")
    with pytest.raises(CheckpointNotFoundError):
        verify(store, STEP)


def test_n14_a_prune_meanwhile_is_no_damage(store):
    class Pruned(MemoryStore):
        """Pruned by somebody else as soon as the first rank manifest is read."""

        def get(self, key, *, max_bytes):
            if key.startswith(keys.RANKS):
                store.put(keys.checkpoint(STEP), b"")
                store.delete(key)
            return store.get(key, max_bytes=max_bytes)

        def list(self, prefix):
            return store.list(prefix)

    with pytest.raises(CheckpointNotFoundError, match="pruned"):
        verify(Pruned(), STEP)


@pytest.mark.parametrize("operation", ["list", "get"])
def test_r1_an_unavailable_store_is_not_damage(store, operation):
    flaky = FlakyStore(store, {operation: 1.0}, seed=1)
    with pytest.raises(StoreUnavailableError):
        verify(flaky, STEP, is_data=True)


def test_all_checkpoints_are_checked_with_one_listing_of_chunks(store):
    write_checkpoint(store, LATER, PLAIN, previous=STEP)
    (entry, *_) = [e for e in store.list(CHUNKS) if str(STEP) in e.key]
    store.delete(entry.key)
    log = RecordingStore(store)
    reports = list(verify_all(log))
    assert [(r.id, r.is_whole) for r in reports] == [(LATER, True), (STEP, False)]
    assert sum(op.name == "list" and op.key == CHUNKS for op in log.ops) == 1


def test_progress_ends_at_the_raw_bytes(store):
    seen = []
    verify(store, STEP, is_data=True, progress=lambda *pair: seen.append(pair))
    total = sum(array.nbytes for array in TENSORS.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
