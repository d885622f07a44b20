"""The one terminal record of a step: in order, once, and the same for everyone who looks."""

from __future__ import annotations

import itertools

import pytest

from ckptd.codec.records import decode_record
from ckptd.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    SaveFailedError,
    StoreError,
    StoreUnavailableError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Manifest
from ckptd.pipeline.commit import (
    COMMITTED,
    MAX_OUTCOME_BYTES,
    TOMBSTONE,
    Proofs,
    Verdict,
    end_step,
    give_up,
    incomplete,
    new_outcome,
    put_outcome,
    put_rank,
    read_verdict,
    try_commit,
)
from ckptd.pipeline.verify import verify
from ckptd.store.base import Store
from ckptd.store.memory import MemoryStore
from tests.fakes.saves import MAX, Save
from tests.fakes.stores import FlakyStore, Op, RecordingStore

OLD, STEP = StepId(1, 10), StepId(1, 20)
WHY = Verdict("failed", "SaveFailedError", "rank 1 failed: the disk is full", ranks=(1,))
OUTCOME = new_outcome(STEP, 1, 2, 1, "failed", "the disk is full")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def terminal(store: Store, step: StepId = STEP) -> bytes:
    return store.get(keys.checkpoint(step), max_bytes=MAX)


def lost(store: Store, name: str = "put_new") -> FlakyStore:
    """A store that acts and whose every answer is lost."""
    return FlakyStore(store, {name: 1.0}, seed=0, acted=1.0)


def silent(store: Store, name: str = "put_new") -> FlakyStore:
    """A store that neither acts nor answers."""
    return FlakyStore(store, {name: 1.0}, seed=0)


def refused(store: Store, step: StepId = STEP, world_size: int = 2) -> Verdict:
    """Commit; make sure that it ends in a tombstone that every other node explains alike."""
    verdict = try_commit(store, step, world_size, Proofs())
    assert verdict.state in {"failed", "skipped"}
    assert terminal(store, step) == TOMBSTONE
    assert read_verdict(store, step, world_size) == verdict
    assert try_commit(store, step, world_size, Proofs()).state == verdict.state
    return verdict


# --- the way to a commit -----------------------------------------------------------------------


def test_a_step_without_a_terminal_record_is_waiting(store: MemoryStore) -> None:
    assert read_verdict(store, STEP, 2) == Verdict("waiting")


def test_d9_ranks_that_are_not_there_are_named_and_nothing_is_decided(store: MemoryStore) -> None:
    save = Save(STEP, 3)
    save.deliver(store, 1)
    assert save.commit(store) == Verdict("waiting", ranks=(0, 2))
    with pytest.raises(ObjectNotFoundError):
        terminal(store)


def test_d9_a_record_of_a_rank_beyond_the_world_does_not_count(store: MemoryStore) -> None:
    save = Save(STEP, 2)
    save.deliver(store, 0)
    store.put_new(keys.rank(STEP, 7), b"whatever")
    assert save.commit(store).ranks == (1,)
    save.deliver(store, 1)
    assert save.commit(store) == COMMITTED
    assert len(decode_record(terminal(store), Manifest, key="").ranks) == 2


def test_d1_a_commit_names_every_rank_manifest_by_its_bytes(store: MemoryStore) -> None:
    save = Save(STEP, 3)
    save.deliver_all(store)
    assert save.commit(store) == COMMITTED
    report = verify(store, STEP, is_data=True)
    assert report.is_whole, report.damage
    assert read_verdict(store, STEP, 3) == COMMITTED


def test_d3_chunks_then_sync_then_rank_manifests_then_sync_then_the_manifest() -> None:
    store = RecordingStore(MemoryStore())
    save = Save(STEP, 2)
    save.deliver_all(store)
    save.commit(store)
    kinds = [op.name if op.name == "sync" else op.key.split("/")[0] for op in store.writes]
    order = [kind for kind, _ in itertools.groupby(kinds)]
    assert order == ["chunks", "sync", "ranks"] * 2 + ["sync", "checkpoints"]
    assert {op.name for op in store.writes if op.key.startswith("chunks")} == {"put_deferred"}
    assert {op.name for op in store.writes if "rank" in op.key or "check" in op.key} == {"put_new"}


def test_whoever_commits_makes_the_same_bytes() -> None:
    found = set()
    for _ in range(2):
        store = MemoryStore()
        save = Save(STEP, 2)
        save.deliver(store, 1)
        save.deliver(store, 0)
        save.commit(store)
        found.add(terminal(store))
    assert len(found) == 1


def test_a_failing_sync_before_the_manifest_decides_nothing(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    with pytest.raises(StoreUnavailableError):
        save.commit(silent(store, "sync"))
    with pytest.raises(ObjectNotFoundError):
        terminal(store)
    assert save.commit(store) == COMMITTED


# --- lost answers ------------------------------------------------------------------------------


def test_d8_a_rank_manifest_whose_answer_was_lost_is_there(store: MemoryStore) -> None:
    record = Save(STEP).record(0)
    put_rank(lost(store), record)
    put_rank(store, record)
    put_rank(lost(store), record)


def test_a_rank_manifest_that_was_not_taken_is_tried_again(store: MemoryStore) -> None:
    with pytest.raises(StoreUnavailableError):
        put_rank(silent(store), Save(STEP).record(0))
    assert list(store.list("ranks/")) == []


@pytest.mark.parametrize("changes", [{"sequence": 2}, {"layout": "f" * 32}])
@pytest.mark.parametrize("wrap", [lambda s: s, lost])
def test_d9_another_save_of_the_same_step_does_not_take_the_rank_manifests_place(
    store: MemoryStore, changes, wrap
) -> None:
    save = Save(STEP)
    put_rank(store, save.record(0))
    before = store.get(keys.rank(STEP, 0), max_bytes=MAX)
    with pytest.raises(SaveFailedError, match="another record of rank 0") as caught:
        put_rank(wrap(store), save.record(0, **changes))
    assert caught.value.step == 20
    assert store.get(keys.rank(STEP, 0), max_bytes=MAX) == before


def test_a_rank_manifest_does_not_take_the_place_of_an_outcome(store: MemoryStore) -> None:
    put_outcome(store, OUTCOME)
    with pytest.raises(SaveFailedError):
        put_rank(store, Save(STEP).record(1))


def test_an_outcome_leaves_what_stands_there(store: MemoryStore) -> None:
    record = Save(STEP).record(1)
    put_rank(store, record)
    put_outcome(store, OUTCOME)
    put_rank(store, record)


def test_an_outcome_may_be_put_again_after_a_lost_answer(store: MemoryStore) -> None:
    with pytest.raises(StoreUnavailableError):
        put_outcome(lost(store), OUTCOME)
    put_outcome(store, OUTCOME)


def test_the_reason_of_an_outcome_is_cut(store: MemoryStore) -> None:
    put_outcome(store, new_outcome(STEP, 1, 2, 1, "failed", "x" * 100_000))
    assert store.get(keys.rank(STEP, 1), max_bytes=10_000)


def test_d5_a_commit_whose_answer_was_lost_is_read_back(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    assert save.commit(lost(store)) == COMMITTED


def test_d5_a_commit_that_was_not_taken_is_undecided_and_not_failed(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    with pytest.raises(StoreUnavailableError):
        save.commit(silent(store))
    assert read_verdict(store, STEP, 2).state == "waiting"


def test_d5_a_commit_that_cannot_be_read_back_is_undecided(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)

    class Mute(RecordingStore):
        def _before(self, op: Op) -> None:
            if op == Op("get", keys.checkpoint(STEP)):
                raise StoreUnavailableError(op.key, "silent")

    with pytest.raises(StoreUnavailableError):
        save.commit(Mute(store))
    assert save.commit(store) == COMMITTED


def test_d4_a_lost_answer_does_not_hide_a_tombstone_that_came_first(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    put_tombstone(store)

    class Lost(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "put_new":  # an SDK that tries again hears of its own object
                raise StoreUnavailableError(op.key, "no answer")

    assert save.commit(Lost(store)).state == "failed"


def test_a_tombstone_whose_answer_was_lost_is_there(store: MemoryStore) -> None:
    assert end_step(lost(store), STEP, 2, WHY) == WHY
    assert terminal(store) == TOMBSTONE


def test_a_tombstone_that_was_not_taken_decides_nothing(store: MemoryStore) -> None:
    with pytest.raises(StoreUnavailableError):
        end_step(silent(store), STEP, 2, WHY)


@pytest.mark.parametrize("wrap", [lambda s: s, lost])
def test_d4_ending_a_committed_step_finds_it_committed(store: MemoryStore, wrap) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    save.commit(store)
    before = terminal(store)
    assert end_step(wrap(store), STEP, 2, WHY) == COMMITTED
    assert terminal(store) == before


def test_a_lost_listing_decides_nothing(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    with pytest.raises(StoreError):
        save.commit(silent(store, "list"))
    with pytest.raises(StoreError):
        save.commit(silent(store, "get"))
    assert read_verdict(store, STEP, 2).state == "waiting"


def put_tombstone(store: Store) -> None:
    store.put_new(keys.checkpoint(STEP), TOMBSTONE)


# --- a tombstone is for ever -------------------------------------------------------------------


def test_d4_a_tombstone_is_never_replaced_by_a_manifest(store: MemoryStore) -> None:
    put_tombstone(store)
    save = Save(STEP)
    save.deliver_all(store)
    verdict = save.commit(store)
    assert verdict.state == "failed"
    assert "tombstone" in verdict.reason
    assert terminal(store) == TOMBSTONE


def test_d11_the_reason_of_a_failed_rank_is_found_on_every_node(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver(store, 0)
    put_outcome(store, OUTCOME)
    verdict = refused(store)
    assert verdict == Verdict(
        "failed", "SaveFailedError", "step 20: rank 1 failed: the disk is full", ranks=(1,)
    )


def test_a_skipped_rank_skips_the_step_on_every_node(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver(store, 0)
    put_outcome(store, new_outcome(STEP, 1, 2, 1, "skipped", "no slot got free"))
    verdict = refused(store)
    assert (verdict.state, verdict.kind) == ("skipped", "SaveSkippedError")


def test_an_outcome_ends_a_step_before_the_other_ranks_are_there(store: MemoryStore) -> None:
    put_outcome(store, OUTCOME)
    assert refused(store).ranks == (1,)


def test_d9_a_step_that_was_ended_for_missing_ranks_names_them_on_every_node(
    store: MemoryStore,
) -> None:
    Save(STEP, 3).deliver(store, 1)
    why = incomplete(STEP, [0, 2], 600.0)
    assert "ranks 0, 2" in why.reason
    assert "600 s" in why.reason
    assert end_step(store, STEP, 3, why) == why
    found = read_verdict(store, STEP, 3)
    assert (found.state, found.kind, found.ranks) == ("failed", "IncompleteError", (0, 2))


def test_d9_giving_up_names_the_ranks_that_are_not_in_the_store(store: MemoryStore) -> None:
    """A daemon knows only its own ranks, and must not blame the others."""
    save = Save(STEP, 4)
    for rank in (0, 2, 3):
        save.deliver(store, rank)
    why = incomplete(STEP, [0, 1, 3], 600.0)
    verdict = give_up(store, STEP, 4, Proofs(), why)
    assert (verdict.state, verdict.kind, verdict.ranks) == ("failed", "IncompleteError", (1,))
    assert "rank 1 delivered nothing" in verdict.reason
    assert terminal(store) == TOMBSTONE
    assert read_verdict(store, STEP, 4) == verdict
    assert give_up(store, STEP, 4, Proofs(), why) == verdict


def test_giving_up_a_step_that_turns_out_whole_commits_it(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    assert give_up(store, STEP, 2, Proofs(), incomplete(STEP, [1], 600.0)) == COMMITTED


def test_giving_up_finds_the_reason_that_another_rank_left(store: MemoryStore) -> None:
    put_outcome(store, OUTCOME)
    verdict = give_up(store, STEP, 2, Proofs(), incomplete(STEP, [0, 1], 600.0))
    assert "the disk is full" in verdict.reason


@pytest.mark.parametrize("wrap", [silent, lost])
def test_giving_up_decides_nothing_without_an_answer(store: MemoryStore, wrap) -> None:
    Save(STEP).deliver(store, 0)
    why = incomplete(STEP, [1], 600.0)
    if wrap is silent:
        with pytest.raises(StoreUnavailableError):
            give_up(silent(store), STEP, 2, Proofs(), why)
        assert read_verdict(store, STEP, 2).state == "waiting"
    else:
        assert give_up(lost(store), STEP, 2, Proofs(), why).ranks == (1,)


def test_as_long_as_ranks_are_missing_large_records_are_not_read(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptd.pipeline import commit

    monkeypatch.setattr(commit, "MAX_OUTCOME_BYTES", 400)
    save = Save(STEP, 3)
    save.deliver(store, 0)
    recording = RecordingStore(store)
    assert save.commit(recording).ranks == (1, 2)
    assert [op for op in recording.ops if op.name == "get" and op.key.startswith("ranks/")] == []
    put_outcome(store, OUTCOME)
    assert save.commit(store).ranks == (1,)


def test_while_ranks_are_missing_no_record_is_read_twice(store: MemoryStore) -> None:
    save = Save(STEP, 3)
    save.deliver(store, 0)
    recording, proofs = RecordingStore(store), Proofs()
    for _ in range(3):
        assert try_commit(recording, STEP, 3, proofs).ranks == (1, 2)
    save.deliver(store, 1)
    assert try_commit(recording, STEP, 3, proofs).ranks == (2,)
    read = [op.key for op in recording.ops if op.name == "get" and op.key.startswith("ranks/")]
    assert read == [keys.rank(STEP, 0), keys.rank(STEP, 1)]
    save.deliver(store, 2)
    assert try_commit(recording, STEP, 3, proofs) == COMMITTED


def test_what_one_root_delivered_hides_no_outcome_in_another(store: MemoryStore) -> None:
    proofs, other = Proofs(), MemoryStore("memory://another")
    Save(STEP, 3).deliver(store, 0)
    assert try_commit(store, STEP, 3, proofs).ranks == (1, 2)
    put_outcome(other, new_outcome(STEP, 0, 3, 1, "failed", "the disk is full"))
    verdict = try_commit(other, STEP, 3, proofs)
    assert verdict.state == "failed"
    assert "the disk is full" in verdict.reason


@pytest.mark.parametrize("text", ["x", "\0", "\u2028", "\U0001f600", '"', "\ud7ff"])
def test_any_outcome_is_small_enough_to_be_read_at_once(store: MemoryStore, text: str) -> None:
    record = new_outcome(StepId(9999, 10**12 - 1), 99_999, 100_000, 1 << 47, "skipped", text * 9999)
    put_outcome(store, record)
    (entry,) = store.list("ranks/")
    assert entry.bytes <= MAX_OUTCOME_BYTES


def test_many_missing_ranks_do_not_fill_the_message() -> None:
    verdict = incomplete(STEP, range(5000), 600.0)
    assert len(verdict.reason) < 200
    assert len(verdict.ranks) == 5000


def test_an_exists_answer_with_nothing_behind_it_is_not_taken_for_success(
    store: MemoryStore,
) -> None:
    class Liar(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "put_new":
                raise ObjectExistsError(op.key, "exists already")

    with pytest.raises(ObjectExistsError):
        put_rank(Liar(store), Save(STEP).record(0))
    save = Save(STEP)
    save.deliver_all(store)
    assert save.commit(Liar(store)).state == "waiting"
    with pytest.raises(ObjectExistsError):
        end_step(Liar(store), STEP, 2, WHY)
