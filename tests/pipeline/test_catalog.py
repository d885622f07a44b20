import logging

import msgspec
import pytest

from ckptd.errors import (
    CheckpointNotFoundError,
    CorruptError,
    StoreUnavailableError,
    UnsupportedFormatError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.pipeline import catalog
from ckptd.store.memory import MemoryStore
from ckptd.store.root import create_root
from tests.fakes.checkpoints import PLAIN, flip_byte, rewrite_record, write_checkpoint
from tests.fakes.stores import FlakyStore

FIRST, SECOND, LEFT, BACK, NEXT = (
    StepId(1, 1000),
    StepId(1, 2000),
    StepId(1, 3000),
    StepId(2, 2500),
    StepId(2, 2600),
)


@pytest.fixture
def store():
    """A job that left 3000 behind and went on from 2000 in its second attempt."""
    store = MemoryStore()
    write_checkpoint(store, FIRST, PLAIN)
    write_checkpoint(store, SECOND, PLAIN, previous=FIRST)
    write_checkpoint(store, LEFT, PLAIN, previous=SECOND)
    write_checkpoint(store, BACK, PLAIN, previous=SECOND)
    write_checkpoint(store, NEXT, PLAIN, previous=BACK, world_size=2)
    return store


def ids(manifests):
    return [manifest.id for manifest in manifests]


def test_commits_are_listed_newest_first_and_without_tombstones(store):
    store.put(keys.checkpoint(BACK), b"")
    assert ids(catalog.list_commits(store)) == [NEXT, LEFT, SECOND, FIRST]


def test_r1_newest_is_the_highest_step_of_the_highest_attempt(store):
    assert catalog.find(store).id == NEXT


def test_r1_a_step_that_was_left_behind_is_found_only_by_its_attempt(store):
    with pytest.raises(CheckpointNotFoundError, match=r"not on the line.*3000-0001"):
        catalog.find(store, 3000)
    assert catalog.find(store, 3000, 1).id == LEFT


def test_a_step_of_the_line_is_found_in_an_earlier_attempt(store):
    assert catalog.find(store, 1000).id == FIRST


def test_an_attempt_alone_names_its_newest(store):
    assert catalog.find(store, attempt=1).id == LEFT


def test_what_is_not_there_is_not_found(store):
    with pytest.raises(CheckpointNotFoundError):
        catalog.find(store, 1234)
    with pytest.raises(CheckpointNotFoundError):
        catalog.find(store, 1000, 2)
    empty = MemoryStore()
    create_root(empty)
    with pytest.raises(CheckpointNotFoundError):
        catalog.find(empty)


def test_the_line_goes_back_through_previous(store):
    assert ids(catalog.line(store)) == [NEXT, BACK, SECOND, FIRST]


def test_r1_damage_on_the_line_is_loud_and_passed_over(store, caplog):
    flip_byte(store, keys.checkpoint(NEXT), 5)
    with caplog.at_level(logging.WARNING):
        assert ids(catalog.line(store)) == [BACK, SECOND, FIRST]
    assert "2600-0002 is DAMAGED" in caplog.text


def test_r1_a_damaged_link_between_attempts_leads_to_lower_steps_first(store, caplog):
    flip_byte(store, keys.checkpoint(BACK), 5)
    assert ids(catalog.line(store)) == [NEXT, SECOND, FIRST]
    assert "DAMAGED" in caplog.text


def test_a_damaged_checkpoint_that_is_asked_for_is_found_and_then_damaged(store):
    flip_byte(store, keys.checkpoint(BACK), 5)
    assert catalog.find(store, 2500).id == BACK
    with pytest.raises(CorruptError, match="checkpoints/000000002500-0002"):
        catalog.read_manifest(store, BACK)


def test_a_tombstone_is_not_a_checkpoint(store):
    store.put(keys.checkpoint(NEXT), b"")
    with pytest.raises(CheckpointNotFoundError, match="pruned"):
        catalog.read_manifest(store, NEXT)


def test_j6_a_manifest_under_another_key_is_damage(store):
    data = store.get(keys.checkpoint(NEXT), max_bytes=1 << 20)
    store.put(keys.checkpoint(BACK), data)
    with pytest.raises(CorruptError, match="2600-0002"):
        catalog.read_manifest(store, BACK)


def test_j6_swapped_rank_manifests_are_damage(store):
    one, two = (store.get(keys.rank(NEXT, rank), max_bytes=1 << 20) for rank in (0, 1))
    store.put(keys.rank(NEXT, 0), two)
    store.put(keys.rank(NEXT, 1), one)
    manifest = catalog.read_manifest(store, NEXT)
    for rank in (0, 1):
        with pytest.raises(CorruptError) as caught:
            catalog.read_rank(store, manifest, rank)
        assert caught.value.key == keys.rank(NEXT, rank)


def test_d9_rank_manifests_of_another_save_are_damage_even_if_the_hash_is_right(store):
    manifest = catalog.read_manifest(store, NEXT)
    swapped = tuple(
        msgspec.structs.replace(entry, rank=1 - entry.rank) for entry in reversed(manifest.ranks)
    )
    one, two = (store.get(keys.rank(NEXT, rank), max_bytes=1 << 20) for rank in (0, 1))
    store.put(keys.rank(NEXT, 0), two)
    store.put(keys.rank(NEXT, 1), one)
    rewrite_record(store, keys.checkpoint(NEXT), manifest, ranks=swapped)
    with pytest.raises(CorruptError, match="rank 1 of 2"):
        catalog.read_rank(store, catalog.read_manifest(store, NEXT), 0)
    other_save = msgspec.structs.replace(manifest, sequence=9)
    store.put(keys.rank(NEXT, 0), one)
    with pytest.raises(CorruptError, match="save 1"):
        catalog.read_rank(store, other_save, 0)


def test_a_missing_rank_manifest_is_damage(store):
    store.delete(keys.rank(NEXT, 1))
    with pytest.raises(CorruptError, match=r"missing.*00001"):
        catalog.read_ranks(store, catalog.read_manifest(store, NEXT))


def test_rank_manifests_come_in_the_order_asked_for(store):
    manifest = catalog.read_manifest(store, NEXT)
    assert [r.rank for r in catalog.read_ranks(store, manifest)] == [0, 1]
    assert [r.rank for r in catalog.read_ranks(store, manifest, [1, 0])] == [1, 0]


@pytest.mark.parametrize("operation", ["list", "get"])
def test_r1_unavailable_is_not_absent(store, operation):
    flaky = FlakyStore(store, {operation: 1.0}, seed=1)
    with pytest.raises(StoreUnavailableError):
        list(catalog.line(flaky))
    with pytest.raises(StoreUnavailableError):
        catalog.survey(flaky)
    with pytest.raises(StoreUnavailableError):
        catalog.find(flaky, 1000)


def test_a_newer_format_is_refused_and_not_passed_over(store):
    data = store.get(keys.checkpoint(NEXT), max_bytes=1 << 20)
    store.put(keys.checkpoint(NEXT), data.replace(b'"format":1', b'"format":2'))
    with pytest.raises(UnsupportedFormatError):
        list(catalog.line(store))


def test_n10_a_record_that_flips_on_the_way_is_read_again(store):
    class Flips(MemoryStore):
        def get(self, key, *, max_bytes):
            data = store.get(key, max_bytes=max_bytes)
            if key in seen:
                return data
            seen.add(key)
            return data[:-1] + b"?"

    seen = set()
    manifest = catalog.read_manifest(Flips(), NEXT)
    assert catalog.read_rank(Flips(), manifest, 1).rank == 1


def test_a_survey_tells_what_is_whole_and_what_is_on_the_line(store):
    flip_byte(store, keys.checkpoint(SECOND), 5)
    rows = {row.commit.id: row for row in catalog.survey(store)}
    assert list(rows) == [NEXT, BACK, LEFT, SECOND, FIRST]
    assert [id_ for id_, row in rows.items() if not row.is_on_line] == [LEFT]
    assert isinstance(rows[SECOND].damage, CorruptError)
    assert rows[SECOND].manifest is None
    assert rows[FIRST].manifest.id == FIRST
