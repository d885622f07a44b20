"""What a commit cross-checks: nothing is mixed, nothing is missing, nothing stands there twice."""

from __future__ import annotations

import logging
import struct

import msgspec
import pytest

from ckptd.codec.records import decode_record, encode_record
from ckptd.errors import (
    CorruptError,
)
from ckptd.model import keys
from ckptd.model.box import Box
from ckptd.model.columns import Columns
from ckptd.model.keys import StepId
from ckptd.model.manifest import Manifest
from ckptd.pipeline.commit import (
    COMMITTED,
    TOMBSTONE,
    Proofs,
    Recent,
    Verdict,
    end_step,
    read_verdict,
    try_commit,
)
from ckptd.pipeline.recover import commit_whole_steps
from ckptd.store.base import Store
from ckptd.store.memory import MemoryStore
from ckptd.store.root import create_root
from tests.fakes.checkpoints import PLAIN, flip_byte, write_checkpoint
from tests.fakes.saves import MAX, Save

OLD, STEP = StepId(1, 10), StepId(1, 20)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def terminal(store: Store, step: StepId = STEP) -> bytes:
    return store.get(keys.checkpoint(step), max_bytes=MAX)


def refused(store: Store, step: StepId = STEP, world_size: int = 2) -> Verdict:
    """Commit; make sure that it ends in a tombstone that every other node explains alike."""
    verdict = try_commit(store, step, world_size, Proofs())
    assert verdict.state in {"failed", "skipped"}
    assert terminal(store, step) == TOMBSTONE
    assert read_verdict(store, step, world_size) == verdict
    assert try_commit(store, step, world_size, Proofs()).state == verdict.state
    return verdict


# --- what must not be mixed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("world_size", 3), ("sequence", 2), ("plan", "f" * 32)],
)
def test_d9_ranks_that_do_not_belong_together_end_the_step(
    store: MemoryStore, field: str, value: object
) -> None:
    save = Save(STEP)
    save.deliver(store, 0)
    save.deliver(store, 1, **{field: value})
    verdict = refused(store)
    assert verdict.kind == "SaveFailedError"
    assert field in verdict.reason or "plans" in verdict.reason
    assert "rank 0" in verdict.reason
    assert "rank 1" in verdict.reason


@pytest.mark.parametrize("changes", [{"step": 21}, {"attempt": 2}, {"rank": 0}])
def test_j6_a_record_of_another_step_attempt_or_rank_ends_the_step(
    store: MemoryStore, changes: dict[str, int]
) -> None:
    save = Save(STEP)
    save.deliver(store, 0)
    save.put_chunks(store, 1)
    store.put_new(keys.rank(STEP, 1), encode_record(save.record(1, **changes)))
    verdict = refused(store)
    assert verdict.kind == "CorruptError"
    assert keys.rank(STEP, 1) in verdict.reason


def test_a_hole_ends_the_step_with_fqn_and_ranks(store: MemoryStore) -> None:
    save = Save(STEP, is_planned=False)
    for rank in range(2):
        record = save.records[rank]
        fqns = [tensor.fqn for tensor in record.tensors]
        pieces = [p for p in record.unpack() if fqns[p.tensor] != "model.bias"]
        save.deliver(store, rank, pieces=Columns.pack(pieces))
    verdict = refused(store)
    assert (verdict.kind, verdict.fqn, verdict.ranks) == ("LayoutError", "model.bias", (0, 1))
    assert "[0:2]" in verdict.reason


def test_boxes_that_two_ranks_wrote_by_plan_end_the_step(store: MemoryStore) -> None:
    save = Save(STEP, is_planned=False)
    for rank in range(2):
        save.deliver(store, rank, plan="a" * 32)
    verdict = refused(store)
    assert verdict.kind == "LayoutError"
    assert verdict.fqn in PLAIN
    assert verdict.ranks == (0, 1)


def test_boxes_that_two_ranks_wrote_without_a_plan_are_fine(store: MemoryStore) -> None:
    save = Save(STEP, is_planned=False)
    save.deliver_all(store)
    assert save.commit(store) == COMMITTED


def test_replicas_that_differ_end_the_step_with_fqn_and_ranks(store: MemoryStore) -> None:
    save = Save(STEP, 3, is_planned=False)
    for rank in range(3):
        samples = {"model.weight": 7 if rank < 2 else 8}
        row = [samples.get(tensor.fqn, 5) for tensor in save.records[rank].tensors]
        save.deliver(store, rank, fingerprints=struct.pack(f"<{len(row)}Q", *row))
    verdict = refused(store, world_size=3)
    assert (verdict.kind, verdict.fqn) == ("ReplicaMismatchError", "model.weight")
    assert 2 in verdict.ranks


def test_replicas_are_compared_even_where_the_layout_was_proved_before(store: MemoryStore) -> None:
    proofs = Proofs()
    for step, sample in ((OLD, 5), (STEP, 6)):
        save = Save(step, is_planned=False)
        for rank in range(2):
            row = [sample if rank else 5 for _ in save.records[rank].tensors]
            save.deliver(store, rank, fingerprints=struct.pack(f"<{len(row)}Q", *row))
    assert try_commit(store, OLD, 2, proofs) == COMMITTED
    assert try_commit(store, STEP, 2, proofs).kind == "ReplicaMismatchError"


def test_a_damaged_rank_record_ends_the_step_and_is_named(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    flip_byte(store, keys.rank(STEP, 1), 0)
    verdict = refused(store)
    assert verdict.kind == "CorruptError"
    assert keys.rank(STEP, 1) in verdict.reason


def test_a_rank_record_that_is_damaged_after_the_commit_does_not_end_it(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    save.commit(store)
    flip_byte(store, keys.rank(STEP, 1), 0)
    assert save.commit(store) == COMMITTED


def test_a_shape_that_ranks_disagree_about_ends_the_step(store: MemoryStore) -> None:
    save = Save(STEP, is_planned=False)
    save.deliver(store, 0)
    tensors = tuple(
        msgspec.structs.replace(t, kind="buffer") if t.fqn == "model.bias" else t
        for t in save.records[1].tensors
    )
    save.deliver(store, 1, tensors=tensors)
    verdict = refused(store)
    assert (verdict.kind, verdict.fqn, verdict.ranks) == ("LayoutError", "model.bias", (0, 1))


def test_j6_a_manifest_of_another_step_is_no_commit(store: MemoryStore) -> None:
    write_checkpoint(store, OLD, PLAIN)
    store.put_new(keys.checkpoint(STEP), terminal(store, OLD))
    with pytest.raises(CorruptError):
        read_verdict(store, STEP, 1)


def test_a_damaged_manifest_is_neither_committed_nor_failed(store: MemoryStore) -> None:
    save = Save(STEP)
    save.deliver_all(store)
    save.commit(store)
    flip_byte(store, keys.checkpoint(STEP), 0)
    for look in (
        lambda: read_verdict(store, STEP, 2),
        lambda: save.commit(store),
        lambda: end_step(store, STEP, 2, Verdict("failed")),
    ):
        with pytest.raises(CorruptError):
            look()


# --- proofs ------------------------------------------------------------------------------------


def test_a_proof_is_made_once_for_an_unchanged_layout(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptd.plan import commit as plan_commit

    proved = []
    prove = plan_commit.prove_coverage
    monkeypatch.setattr(plan_commit, "prove_coverage", lambda r: proved.append(1) or prove(r))
    proofs = Proofs()
    for step in (10, 20, 30):
        save = Save(StepId(1, step))
        save.deliver_all(store)
        proved.clear()
        assert try_commit(store, save.id, 2, proofs) == COMMITTED
        assert bool(proved) == (step == 10)


def test_a_layout_that_was_refused_is_not_remembered_as_proved(store: MemoryStore) -> None:
    proofs = Proofs()
    for step in (10, 20):
        save = Save(StepId(1, step), is_planned=False)
        for rank in range(2):
            save.deliver(store, rank, plan="a" * 32)
        assert try_commit(store, save.id, 2, proofs).kind == "LayoutError"


def test_old_proofs_are_forgotten() -> None:
    proofs = Recent(2)
    for name in "abc":
        proofs.add(name)
    assert [proofs.has(name) for name in "abc"] == [False, True, True]


def test_a_box_that_moved_needs_a_new_proof(store: MemoryStore) -> None:
    """The same layout and plan, but a rank left something out: the proof must not be reused."""
    proofs = Proofs()
    whole = Save(OLD, 1)
    whole.deliver_all(store)
    assert try_commit(store, OLD, 1, proofs) == COMMITTED
    save = Save(STEP, 1)
    pieces = save.records[0].unpack()[1:]
    save.deliver(store, 0, pieces=Columns.pack(pieces))
    assert try_commit(store, STEP, 1, proofs).kind == "LayoutError"


def test_what_ranks_keep_for_themselves_is_logged_once(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    proofs = Proofs()
    with caplog.at_level(logging.INFO, "ckptd"):
        for step in (OLD, STEP):
            save = Save(step, values=[{"seed": 1, "epoch": 2}, {"seed": 5, "epoch": 2}])
            save.deliver_all(store)
            assert try_commit(store, step, 2, proofs) == COMMITTED
    assert [record.getMessage().count("seed") for record in caplog.records] == [1]
    assert decode_record(terminal(store), Manifest, key="").differing == ("seed",)


def test_a_rank_may_hold_only_a_part(store: MemoryStore) -> None:
    halves = {"model.weight": [[Box((0, 0), (1, 4))], [Box((1, 0), (3, 4))]]}
    save = Save(STEP, plan=halves)
    save.deliver_all(store)
    assert save.commit(store) == COMMITTED


def test_a_part_that_nobody_holds_is_named(store: MemoryStore) -> None:
    halves = {"model.weight": [[Box((0, 0), (1, 4))], [Box((1, 0), (3, 4))]]}
    save = Save(STEP, plan=halves)
    save.deliver(store, 0)
    record = save.records[1]
    fqns = [tensor.fqn for tensor in record.tensors]
    pieces = [p for p in record.unpack() if fqns[p.tensor] != "model.weight"]
    save.deliver(store, 1, pieces=Columns.pack(pieces))
    verdict = refused(store)
    assert (verdict.kind, verdict.fqn) == ("LayoutError", "model.weight")
    assert "[1:3, 0:4]" in verdict.reason


def test_commit_whole_steps_is_what_resume_uses(store: MemoryStore) -> None:
    create_root(store)
    save = Save(STEP)
    save.deliver_all(store)
    assert commit_whole_steps(store) == [STEP]
    assert read_verdict(store, STEP, 2) == COMMITTED
