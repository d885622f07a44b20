"""Steps of dead jobs that lack nothing but their commit."""

from __future__ import annotations

import logging

import pytest

from ckptd.errors import ObjectNotFoundError, StoreUnavailableError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import line
from ckptd.pipeline.commit import TOMBSTONE, new_outcome, put_outcome
from ckptd.pipeline.recover import commit_whole_steps
from ckptd.store.memory import MemoryStore
from tests.fakes.checkpoints import PLAIN, flip_byte, write_checkpoint
from tests.fakes.saves import MAX, Save
from tests.fakes.stores import FailingStore, Op, RecordingStore

OLD = StepId(1, 10)


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    write_checkpoint(store, OLD, PLAIN)
    return store


def terminal(store: MemoryStore, id_: StepId) -> bytes:
    return store.get(keys.checkpoint(id_), max_bytes=MAX)


def test_a_whole_step_is_committed_and_logged(store: MemoryStore, caplog) -> None:
    Save(StepId(1, 20), previous=OLD).deliver_all(store)
    with caplog.at_level(logging.WARNING, "ckptd"):
        assert commit_whole_steps(store) == [StepId(1, 20)]
    assert "20-0001" in caplog.text
    assert [m.id for m in line(store)] == [StepId(1, 20), OLD]
    assert commit_whole_steps(store) == []


def test_several_are_committed_oldest_first(store: MemoryStore) -> None:
    ids = [StepId(1, 20), StepId(1, 30), StepId(2, 5)]
    for id_ in reversed(ids):
        Save(id_).deliver_all(store)
    assert commit_whole_steps(store) == ids


def test_a_step_that_lacks_a_rank_is_left_as_it_is(store: MemoryStore) -> None:
    """Its job may still be alive, and deliver."""
    save = Save(StepId(1, 20), 3)
    save.deliver(store, 0)
    save.deliver(store, 2)
    before = list(store.list(""))
    assert commit_whole_steps(store) == []
    assert list(store.list("")) == before


def test_records_of_ranks_beyond_the_world_do_not_make_a_step_whole(store: MemoryStore) -> None:
    save = Save(StepId(1, 20), 2)
    save.deliver(store, 0)
    store.put_new(keys.rank(StepId(1, 20), 7), b"whatever")
    assert commit_whole_steps(store) == []
    with pytest.raises(ObjectNotFoundError):
        terminal(store, StepId(1, 20))


def test_steps_older_than_the_newest_checkpoint_are_not_looked_at(store: MemoryStore) -> None:
    Save(StepId(1, 5)).deliver_all(store)
    recording = RecordingStore(store)
    assert commit_whole_steps(recording) == []
    assert [op.name for op in recording.ops] == ["list", "list"]


def test_a_higher_attempt_is_newer_whatever_its_step(store: MemoryStore) -> None:
    Save(StepId(2, 1)).deliver_all(store)
    assert commit_whole_steps(store) == [StepId(2, 1)]


def test_d4_a_step_with_a_tombstone_stays_ended(store: MemoryStore) -> None:
    Save(StepId(1, 20)).deliver_all(store)
    store.put_new(keys.checkpoint(StepId(1, 20)), TOMBSTONE)
    assert commit_whole_steps(store) == []
    assert terminal(store, StepId(1, 20)) == TOMBSTONE


def test_a_tombstone_does_not_hide_whole_steps_before_it(store: MemoryStore) -> None:
    store.put_new(keys.checkpoint(StepId(1, 30)), TOMBSTONE)
    Save(StepId(1, 20)).deliver_all(store)
    assert commit_whole_steps(store) == [StepId(1, 20)]


def test_a_step_with_an_outcome_is_ended(store: MemoryStore) -> None:
    save = Save(StepId(1, 20))
    save.deliver(store, 0)
    put_outcome(store, new_outcome(StepId(1, 20), 1, 2, 1, "failed", "x"))
    assert commit_whole_steps(store) == []
    assert terminal(store, StepId(1, 20)) == TOMBSTONE


def test_a_damaged_record_does_not_keep_others_from_being_committed(
    store: MemoryStore, caplog
) -> None:
    Save(StepId(1, 20)).deliver_all(store)
    flip_byte(store, keys.rank(StepId(1, 20), 0), 0)
    Save(StepId(1, 30)).deliver_all(store)
    assert commit_whole_steps(store) == [StepId(1, 30)]
    assert "20-0001 is not whole" in caplog.text


def test_a_record_that_was_pruned_meanwhile_is_no_failure_of_the_store(store: MemoryStore) -> None:
    Save(StepId(1, 20)).deliver_all(store)

    class Pruned(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "get" and op.key.startswith("ranks/"):
                self.inner.delete(op.key)

    assert commit_whole_steps(Pruned(store)) == []


@pytest.mark.parametrize("name", ["list", "get", "put_new", "sync"])
def test_a_store_that_does_not_answer_raises(store: MemoryStore, name: str) -> None:
    Save(StepId(1, 20)).deliver_all(store)
    failing = FailingStore(store, frozenset({name}), StoreUnavailableError("", "no answer"))
    with pytest.raises(StoreUnavailableError):
        commit_whole_steps(failing)
    assert commit_whole_steps(store) == [StepId(1, 20)]


def test_n16_nothing_is_committed_where_another_one_might_win_too(
    store: MemoryStore, caplog
) -> None:
    Save(StepId(1, 20), previous=OLD).deliver_all(store)
    store.has_conditional_put = False
    assert commit_whole_steps(store) == []
    assert "only the daemon of rank 0" in caplog.text
    with pytest.raises(ObjectNotFoundError):
        terminal(store, StepId(1, 20))
