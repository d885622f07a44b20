"""Several ranks in one process, each with an engine of its own, as on several nodes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.errors import (
    CkptdError,
    IncompleteError,
    LayoutError,
    ReplicaMismatchError,
    SaveFailedError,
    SaveSkippedError,
    UnsupportedValueError,
)
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import read_manifest, read_ranks
from ckptd.pipeline.verify import verify
from ckptd.store.memory import MemoryStore
from ckptd.trainer import checkpointer as module
from ckptd.trainer.boards import LocalBoard
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.handle import Handle
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.values import PerRank
from tests.fakes.training import WAIT_S, bits, make_state, same, train

_numbers = itertools.count(1)


class Job:
    """One incarnation: a Checkpointer for each rank, made and used on this thread."""

    def __init__(self, url: str, world_size: int, monkeypatch: pytest.MonkeyPatch, **options: Any):
        board = LocalBoard()
        self.store = MemoryStore.shared(url)
        self.ranks: list[Checkpointer] = []
        for rank in range(world_size):
            meeting = Meeting(board, rank, world_size)
            monkeypatch.setattr(module.Meeting, "of_job", lambda *_, m=meeting: m)
            settings = {"daemon": False, "slots": 2, "meeting_timeout_s": WAIT_S, **options}
            self.ranks.append(Checkpointer(url, **settings))

    def save(self, step: int, states: list[dict[str, Any]]) -> list[Handle]:
        return [ckpt.save(step, state) for ckpt, state in zip(self.ranks, states, strict=True)]

    def resume(self, states: list[dict[str, Any]], **options: Any) -> list[Any]:
        """Resume on a thread for each rank, since ranks wait for each other there."""
        with ThreadPoolExecutor(len(states)) as pool:
            return list(
                pool.map(lambda pair: pair[0].resume(pair[1], **options),
                         zip(self.ranks, states, strict=True))
            )  # fmt: skip

    def wait_planned(self) -> None:
        assert all(ckpt._agreement.wait_planned(WAIT_S) for ckpt in self.ranks)


Start = Callable[..., Job]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    url = f"memory://job-{next(_numbers)}"
    made: list[Job] = []

    def start(world_size: int, **options: Any) -> Job:
        made.append(Job(url, world_size, monkeypatch, **options))
        return made[-1]

    yield start
    threads = [
        threading.Thread(target=ckpt._leave) for job in made for ckpt in job.ranks
    ]  # all at once: some wait for what others deliver
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)


def error_of(handle: Handle) -> CkptdError:
    with pytest.raises(CkptdError) as caught:
        handle.result(WAIT_S)
    return caught.value


def replicas(count: int, **more: Any) -> list[dict[str, Any]]:
    return [make_state(1, **more) for _ in range(count)]


def test_all_ranks_hear_of_one_checkpoint(start: Start) -> None:
    job = start(3)
    found = [handle.result(WAIT_S) for handle in job.save(1, replicas(3))]
    assert len({(f.step, f.attempt, f.world_size) for f in found}) == 1
    assert found[0].world_size == 3
    assert verify(job.store, StepId(1, 1), is_data=True).is_whole


def test_before_the_ranks_agree_each_writes_all_and_afterwards_its_share(start: Start) -> None:
    job = start(2)
    states = replicas(2)
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    job.wait_planned()
    found = {}
    for step in (2, 3):
        for handle in job.save(step, states):
            handle.result(WAIT_S)
        manifest = read_manifest(job.store, StepId(1, step))
        found[step] = read_ranks(job.store, manifest)
        assert verify(job.store, StepId(1, step), is_data=True).is_whole
    assert found[3][0].plan is not None
    assert found[3][0].plan == found[3][1].plan
    written = [sum(chunk.raw_bytes for chunk in record.chunks) for record in found[3]]
    assert sum(written) == manifest.raw_bytes, "every byte once"
    assert all(written)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_r3_what_two_ranks_saved_resumes_on_any_number(start: Start, world_size: int) -> None:
    first = start(2)
    states = replicas(2)
    for state in states:
        torch.manual_seed(3)
        train(state, 2)
    for handle in first.save(2, states):
        handle.result(WAIT_S)
    expected = bits(states[0])
    second = start(world_size)
    others = [make_state(5 + rank) for rank in range(world_size)]
    for resumed in second.resume(others):
        assert (resumed.step, resumed.attempt) == (2, 1)
    assert all(same(bits(other), expected) for other in others)
    for handle in second.save(3, others):
        assert handle.result(WAIT_S).previous == str(StepId(1, 2))


def test_d11_a_rank_whose_state_cannot_be_stored_fails_the_step_for_all_by_name(
    start: Start,
) -> None:
    job = start(2)
    states = replicas(2)
    handle = job.ranks[0].save(1, states[0])
    with pytest.raises(UnsupportedValueError):
        job.ranks[1].save(1, {**states[1], "odd": object()})
    error = error_of(handle)
    assert isinstance(error, SaveFailedError)
    assert "rank 1" in str(error)
    assert "odd" in str(error)
    for good in job.save(2, states):
        assert good.result(WAIT_S).previous is None


def test_a_rank_without_a_slot_skips_the_step_for_all(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(2, on_busy="skip")
    states = replicas(2)
    with monkeypatch.context() as patch:
        patch.setattr(job.ranks[1]._snapshots, "capture", lambda *args, **kwargs: None)
        handles = job.save(1, states)
    for handle in handles:
        assert isinstance(error_of(handle), SaveSkippedError)
    for handle in job.save(2, states):
        assert handle.result(WAIT_S).step == 2
    for ckpt in job.ranks:
        assert ckpt.wait(WAIT_S)


def test_d9_a_rank_that_delivers_nothing_is_named_after_the_timeout(start: Start) -> None:
    job = start(3, commit_timeout_s=0.4)
    states = replicas(3)
    handles = [job.ranks[rank].save(1, states[rank]) for rank in (0, 2)]
    for handle in handles:
        error = error_of(handle)
        assert isinstance(error, IncompleteError)
        assert error.missing_ranks == (1,)
        assert "rank 1 delivered nothing" in str(error)


def test_replicas_that_differ_are_refused_with_their_name_and_ranks(start: Start) -> None:
    job = start(2)
    states = [make_state(1), make_state(2)]
    for handle in job.save(1, states):
        error = error_of(handle)
        assert isinstance(error, ReplicaMismatchError)
        assert error.fqn.startswith("model.")
        assert set(error.ranks) == {0, 1}


@pytest.mark.parametrize("is_agreed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_r2_buffers_that_differ_are_those_of_the_lowest_rank_for_all(
    start: Start, world_size: int, is_agreed: bool
) -> None:
    """Under DDP the statistics of BatchNorm differ on every rank; parts of several are nobody's."""

    def norm(value: float) -> nn.BatchNorm1d:
        made = nn.BatchNorm1d(5)
        made.running_mean.fill_(value)
        return made

    job = start(2)
    states = [make_state(1, norm=norm(rank + 1.0)) for rank in range(2)]
    for handle in job.save(1, states):
        handle.result(WAIT_S)
    if is_agreed:
        job.wait_planned()
        for step in (2, 3):
            for handle in job.save(step, states):
                handle.result(WAIT_S)
    others = [make_state(5, norm=norm(9.0)) for _ in range(world_size)]
    start(world_size).resume(others)
    assert [set(other["norm"].running_mean.tolist()) for other in others] == [{1.0}] * world_size


def test_values_that_differ_are_kept_per_rank_and_come_back(start: Start) -> None:
    job = start(2)
    states = [make_state(1, shard=rank, loader=PerRank([rank] * 3)) for rank in range(2)]
    for handle in job.save(1, states):
        assert handle.result(WAIT_S).differing == ("loader", "shard")
    others = replicas(2, shard=-1, loader=PerRank([], on_resize="drop"))
    start_again = start(2)
    start_again.resume(others)
    assert [other["shard"] for other in others] == [0, 1]
    assert [other["loader"].value for other in others] == [[0] * 3, [1] * 3]
    more = replicas(3, shard=-1, loader=PerRank([], on_resize="drop"))
    with pytest.raises(LayoutError, match="shard"):
        start(3).resume(more)


def test_d9_ranks_that_save_other_steps_do_not_commit_a_mixture(start: Start) -> None:
    job = start(2, commit_timeout_s=0.4)
    states = replicas(2)
    handles = [job.ranks[0].save(10, states[0]), job.ranks[1].save(11, states[1])]
    for handle in handles:
        assert isinstance(error_of(handle), SaveFailedError | IncompleteError)
    assert job.ranks[0].checkpoints() == []
