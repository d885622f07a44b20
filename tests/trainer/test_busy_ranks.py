"""Ranks of one job whose store is slower than they save: all leave out the same saves, or none does."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ckptd.codec.records import decode_record
from ckptd.engine import runner as runner_module
from ckptd.errors import SaveFailedError, SaveSkippedError, SlotsBusyError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Outcome, RankManifest
from ckptd.pipeline.catalog import read_manifest, read_ranks
from ckptd.pipeline.verify import verify
from ckptd.store.open import open_store
from ckptd.trainer.checkpointer import Checkpointer
from tests.fakes.training import WAIT_S, Gate, GateStore
from tests.trainer import test_checkpointer_ranks as ranks
from tests.trainer.test_checkpointer_ranks import Job, Start, error_of, replicas

start = ranks.start  # the fixture


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Return what lets no chunk of any rank in while it is shut."""
    gate = Gate()
    monkeypatch.setattr(
        runner_module, "open_store",
        lambda url, options=None: GateStore(open_store(url, options), gate),
    )  # fmt: skip
    yield gate
    gate.open()


@contextlib.contextmanager
def slots_taken(ckpt: Checkpointer) -> Iterator[None]:
    """Take all slots of a rank, as a store does that takes nothing."""
    pool = ckpt._snapshots._shelf.pool
    slots = [pool.acquire(0) for _ in range(pool.free_count)]
    yield
    for slot in slots:
        pool.release(slot)


def free_slots(job: Job) -> list[int]:
    return [ckpt._snapshots._shelf.pool.free_count for ckpt in job.ranks]


def outcomes(job: Job, step: int) -> list[Outcome]:
    """Return what ranks left in place of rank manifests."""
    found = [
        decode_record(
            job.store.get(entry.key, max_bytes=1 << 20), RankManifest | Outcome, key=entry.key
        )
        for entry in job.store.list(f"{keys.RANKS}{StepId(1, step)}/")
    ]
    return [record for record in found if isinstance(record, Outcome)]


@pytest.mark.parametrize("overlap", [False, True])
def test_d11_while_the_store_takes_nothing_all_ranks_leave_out_the_same_saves_and_later_go_on(
    start: Start, gate: Gate, overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # Nobody waits: busy_timeout_s is more than a test may take.
    job = start(3, on_busy="skip", slots=2, busy_timeout_s=1e6, overlap=overlap)
    states = replicas(3)
    gate.shut()
    taken = [*job.save(1, states), *job.save(2, states)]
    with caplog.at_level(logging.INFO, "ckptd.trainer"):
        skipped = [*job.save(3, states), *job.save(4, states)]
    assert all(handle.is_done and handle.wait_captured(0) for handle in skipped)
    assert {type(error_of(handle)) for handle in skipped} == {SaveSkippedError}
    assert not any(handle.is_done for handle in taken)
    assert [ckpt._saving.skipped for ckpt in job.ranks] == [2, 2, 2]
    told = [(r.levelname, r.getMessage()) for r in caplog.records if "skipped" in r.getMessage()]
    assert told.count(("WARNING", "step 3 skipped on all ranks: no slot is free")) == 1
    assert told.count(("INFO", "step 3 skipped: rank 0 has no free slot")) == 2
    gate.open()
    for handle in taken:
        handle.result(WAIT_S)
    assert all(ckpt.wait(WAIT_S) for ckpt in job.ranks), "a save that was left out is no failure"
    for handle in job.save(5, states):
        assert handle.result(WAIT_S).previous == str(StepId(1, 2))
    assert [[(r.rank, r.state, r.sequence) for r in outcomes(job, n)] for n in (3, 4)] == [
        [(0, "skipped", 3)], [(0, "skipped", 4)],
    ]  # fmt: skip
    assert free_slots(job) == [2, 2, 2]


def test_p3_a_save_that_is_left_out_takes_no_slot_and_reserves_no_memory(start: Start) -> None:
    job = start(2, on_busy="skip", busy_timeout_s=1e6)
    states = replicas(2)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    for state in states:
        state["more"] = torch.zeros(1 << 20)  # would need larger slots
    with slots_taken(job.ranks[0]):
        handles = job.save(2, states)
        assert free_slots(job) == [0, 2]
    assert [handle.captured_bytes for handle in handles] == [0, 0]
    assert [ckpt._snapshots._shelf.number for ckpt in job.ranks] == [1, 1]
    for handle in job.save(3, states):
        handle.result(WAIT_S)
    assert [ckpt._snapshots._shelf.number for ckpt in job.ranks] == [2, 2]


def test_a_rank_that_alone_has_no_slot_leaves_an_outcome_which_ends_the_step_for_all(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    job = start(3, on_busy="skip", busy_timeout_s=0.05)
    states = replicas(3)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    with slots_taken(job.ranks[1]):
        handles = job.save(2, states)
        for handle in handles:
            error = error_of(handle)
            assert isinstance(error, SaveSkippedError)
            assert "rank 1 skipped: no slot got free" in str(error)
    assert "step 2 skipped, also on ranks that took it" in caplog.text
    assert [(r.rank, r.state) for r in outcomes(job, 2)] == [(1, "skipped")]
    assert [ckpt._saving.skipped for ckpt in job.ranks] == [0, 1, 0]
    for handle in job.save(3, states):
        handle.result(WAIT_S)
    assert free_slots(job) == [2, 2, 2]


def test_p1_a_rank_that_neither_hears_rank_0_nor_has_a_slot_does_not_wait_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(2, on_busy="skip", busy_timeout_s=1e6)
    states = replicas(2)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    with slots_taken(job.ranks[1]), monkeypatch.context() as patch:
        patch.setattr(job.ranks[1]._saving._decisions, "on", lambda *_, **__: (True, 0.0))
        handles = job.save(2, states)
    assert {type(error_of(handle)) for handle in handles} == {SaveSkippedError}
    assert [(r.rank, r.state) for r in outcomes(job, 2)] == [(1, "skipped")]


@pytest.mark.parametrize("has_room", [True, False])
def test_p1_a_rank_that_does_not_hear_rank_0_goes_on_by_itself(
    start: Start, has_room: bool, caplog: pytest.LogCaptureFixture
) -> None:
    job = start(2, on_busy="skip", busy_timeout_s=0.05)
    states = replicas(2)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    early = job.ranks[1].save(2, states[1])
    assert "save 2: rank 0 did not say" in caplog.text
    assert early.captured_bytes > 0
    with contextlib.nullcontext() if has_room else slots_taken(job.ranks[0]):
        late = job.ranks[0].save(2, states[0])
    if has_room:
        assert {early.result(WAIT_S).step, late.result(WAIT_S).step} == {2}
    else:
        assert {type(error_of(handle)) for handle in (early, late)} == {SaveSkippedError}
        assert [(r.rank, r.state) for r in outcomes(job, 2)] == [(0, "skipped")]


@pytest.mark.parametrize("is_heard", [True, False])
def test_a_layout_that_changes_in_a_save_that_is_left_out_gets_a_plan_afterwards(
    start: Start, is_heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(2, on_busy="skip", busy_timeout_s=1e6)
    states = replicas(2)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    job.wait_planned()
    for state in states:
        torch.manual_seed(7)
        state["head"] = nn.Linear(4, 4)
    with slots_taken(job.ranks[0]), monkeypatch.context() as patch:
        if not is_heard:  # then rank 1 alone gives up its plan in this save
            patch.setattr(job.ranks[1]._saving._decisions, "on", lambda *_, **__: (True, 0.0))
        for handle in job.save(2, states):
            assert isinstance(error_of(handle), SaveSkippedError)
    for step in (3, 4, 5):  # one in which the change is seen, one for the offers
        if step == 5:
            job.wait_planned()
        for handle in job.save(step, states):
            handle.result(WAIT_S)
        assert verify(job.store, StepId(1, step), is_data=True).is_whole
    found = read_ranks(job.store, read_manifest(job.store, StepId(1, 5)))
    assert found[0].plan == found[1].plan is not None


def test_a_save_that_waits_for_its_commit_is_not_left_out(start: Start, gate: Gate) -> None:
    job = start(1, on_busy="skip", slots=1, busy_timeout_s=WAIT_S)
    (state,) = replicas(1)
    gate.shut()
    job.ranks[0].save(1, state)
    threading.Timer(0.05, gate.open).start()
    assert job.ranks[0].save(2, state, wait=True).is_done


def test_who_wants_to_wait_hears_which_rank_had_no_slot(start: Start) -> None:
    job = start(2, on_busy="wait", busy_timeout_s=0.05)
    states = replicas(2)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    handle = job.ranks[0].save(2, states[0])
    with slots_taken(job.ranks[1]), pytest.raises(SlotsBusyError, match=r"in 0\.05 s"):
        job.ranks[1].save(2, states[1])
    error = error_of(handle)
    assert isinstance(error, SaveFailedError)
    assert "rank 1 failed" in str(error)
    assert [ckpt._saving.skipped for ckpt in job.ranks] == [0, 0]
    for handle in job.save(3, states):
        handle.result(WAIT_S)
