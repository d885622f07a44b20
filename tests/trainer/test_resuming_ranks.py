"""Several ranks resume as one: threads stand for ranks, over a board in memory."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ckptd.codec.records import decode_record, encode_record
from ckptd.errors import (
    CheckpointNotFoundError,
    CkptdError,
    CorruptError,
    LayoutError,
    MeetingError,
    MissingTensorError,
    StoreUnavailableError,
    TornRestoreError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import RankManifest
from ckptd.store.memory import MemoryStore
from ckptd.store.open import open_store
from ckptd.trainer import resuming as resuming_module
from ckptd.trainer import rng
from ckptd.trainer.boards import LocalBoard
from ckptd.trainer.filling import Request
from ckptd.trainer.flatten import flatten
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.options import Options
from ckptd.trainer.proposals import Root
from ckptd.trainer.resuming import Resumed, Resuming
from ckptd.trainer.rng import RNGState
from ckptd.trainer.terms import Terms
from ckptd.trainer.values import PerRank
from tests.fakes.checkpoints import flip_byte, write_checkpoint
from tests.fakes.stores import FailingStore

_numbers = itertools.count(1)
MAX = 1 << 30
WAIT_S = 20.0
OLD, NEW = StepId(1, 1), StepId(1, 2)


class Ended(NamedTuple):
    """How `resume` ended on one rank."""

    resumed: Resumed | None
    error: Exception | None


class Job:
    """A root, and resumes of it by any number of ranks."""

    def __init__(self) -> None:
        self.url = f"memory://ranks-{next(_numbers)}"
        self.store = MemoryStore.shared(self.url)

    def write(self, id_: StepId, states: list[dict[str, Any]], previous: StepId | None = None):
        """Write what these ranks hold as a checkpoint; tensors are replicated and split."""
        flats = [flatten(state) for state in states]
        tensors = {leaf.fqn: leaf.tensor.detach().numpy().copy() for leaf in flats[0].leaves}
        return write_checkpoint(
            self.store, id_, tensors, world_size=len(states), previous=previous,
            values=[flat.values for flat in flats],
        )  # fmt: skip

    def resume(
        self, states: list[dict[str, Any]], *, timeout_s: float = WAIT_S, **changes: Any
    ) -> list[Ended]:
        """Resume on one thread for each state, all at once."""
        board = LocalBoard()
        options = Options(
            self.url, False, "auto", "wait", 60.0, 2, {}, 600.0, timeout_s, False
        )  # fmt: skip
        ended: list[Ended] = [Ended(None, None)] * len(states)
        step = changes.pop("step", None)

        def work(rank: int) -> None:
            meeting = Meeting(board, rank, len(states))
            root = Root(options.url, options.storage_options, may_commit=True)
            resuming = Resuming(root, meeting, options.meeting_timeout_s)
            try:
                request = Request(states[rank], Terms(**changes), rank, len(states))
                ended[rank] = Ended(resuming.run(request, step), None)
            except Exception as error:  # noqa: BLE001 - the test judges it
                ended[rank] = Ended(None, error)

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank-{rank}")
            for rank in range(len(states))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended

    def damage_chunk_of(self, id_: StepId, rank: int) -> None:
        key = keys.rank(id_, rank)
        record = decode_record(self.store.get(key, max_bytes=MAX), RankManifest, key=key)
        chunk = record.chunks[0]
        flip_byte(self.store, chunk.id.key, chunk.stored_bytes - 1)


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep the state that each rank gave its generators, which are one set here."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        rng, "restore", lambda tree: found.__setitem__(threading.current_thread().name, tree)
    )
    return found


def one(value: float = 0.0, **more: object) -> dict[str, Any]:
    return {"w": torch.full((4, 3), value), "b": torch.full((3,), value), "epoch": 0, **more}


def all_resumed(ended: list[Ended]) -> list[Resumed]:
    assert [e.error for e in ended] == [None] * len(ended)
    found = [e.resumed for e in ended]
    assert None not in found
    assert len({(r.attempt, r.step) for r in found}) == 1, "all ranks resume the same checkpoint"
    return found


def values_of(states: list[dict[str, Any]]) -> list[float]:
    for state in states:
        assert len(set(state["w"].flatten().tolist() + state["b"].tolist())) == 1
    return [float(state["b"][0]) for state in states]


def generators(seed: int) -> Any:
    torch.manual_seed(seed)
    return rng.capture()


# --- one decision ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_r2_all_ranks_take_the_newest(job: Job, world_size: int) -> None:
    job.write(OLD, [one(1.0, epoch=1)] * 3)
    job.write(NEW, [one(2.0, epoch=2)] * 3, OLD)
    states = [one() for _ in range(world_size)]
    for resumed in all_resumed(job.resume(states)):
        assert (resumed.step, resumed.values["epoch"]) == (2, 2)
    assert values_of(states) == [2.0] * world_size
    assert [state["epoch"] for state in states] == [2] * world_size


def test_r2_an_empty_root_is_none_on_all_ranks(job: Job) -> None:
    assert job.resume([one(), one(), one()]) == [Ended(None, None)] * 3


def test_r2_damage_that_one_rank_meets_sends_all_to_the_older_checkpoint(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job.write(OLD, [one(1.0)] * 3)
    job.write(NEW, [one(2.0)] * 3, OLD)
    check_fill(monkeypatch, bad_rank=2)
    states = [one() for _ in range(3)]
    with caplog.at_level(logging.ERROR, "ckptd"):
        found = all_resumed(job.resume(states))
    assert found[0].step == 1
    assert values_of(states) == [1.0] * 3, "also where the newer one was read whole"
    assert sum("rank 2: a flipped bit" in r.getMessage() for r in caplog.records) == 3


def check_fill(monkeypatch: pytest.MonkeyPatch, *, bad_rank: int, bad_step: int = 2) -> None:
    """One rank finds a chunk of a step damaged, after it has read everything."""
    fill = resuming_module.Filling.fill

    def broken(self: Any) -> None:
        fill(self)
        if self._request.rank == bad_rank and self._records.manifest.step == bad_step:
            raise CorruptError("a flipped bit", key="chunks/ab")

    monkeypatch.setattr(resuming_module.Filling, "fill", broken)


def test_r4_damage_everywhere_says_on_all_ranks_that_the_objects_are_unusable(job: Job) -> None:
    job.write(OLD, [one(1.0)] * 2)
    job.write(NEW, [one(2.0)] * 2, OLD)
    for id_ in (OLD, NEW):
        job.damage_chunk_of(id_, 1)
    for ended in job.resume([one(), one()]):
        assert isinstance(ended.error, TornRestoreError)


def test_r2_a_damaged_record_that_one_rank_needs_sends_all_back_before_any_write(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write(NEW, [one(2.0)] * 2)
    flip_byte(job.store, keys.rank(NEW, 1), 3)
    states = [one(), one()]
    for ended in job.resume(states):
        assert isinstance(ended.error, CorruptError)
    assert values_of(states) == [0.0, 0.0]


def test_r4_a_state_that_does_not_fit_on_one_rank_raises_on_all_and_changes_nothing(
    job: Job,
) -> None:
    job.write(NEW, [one(2.0)] * 3)
    states = [one(), one(extra=torch.zeros(2)), one()]
    ended = job.resume(states)
    for rank, each in enumerate(ended):
        assert isinstance(each.error, MissingTensorError), rank
        assert each.error.fqn == "extra"
    assert "rank 1" in str(ended[0].error)
    assert values_of(states) == [0.0] * 3
    assert [state["epoch"] for state in states] == [0] * 3


def test_r2_a_bug_on_one_rank_raises_on_all(job: Job) -> None:
    class Broken:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, held: dict[str, int]) -> None:
            raise ZeroDivisionError("a bug of the job")

    class Fine(Broken):
        def load_state_dict(self, held: dict[str, int]) -> None:
            assert held == {"a": 1}

    job.write(NEW, [one(2.0, thing=Fine())] * 2)
    zero, one_ = job.resume([one(thing=Broken()), one(thing=Fine())])
    assert "a bug of the job" in repr(zero.error)
    assert isinstance(one_.error, CkptdError)
    assert "rank 0" in str(one_.error)
    assert "a bug of the job" in str(one_.error)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_r1_a_store_that_one_rank_does_not_reach_raises_on_all(
    job: Job, monkeypatch: pytest.MonkeyPatch, bad_rank: int
) -> None:
    job.write(NEW, [one(2.0)] * 2)

    def open_one(url: str, options: dict[str, object]) -> Any:
        store = open_store(url, options)
        if threading.current_thread().name != f"rank-{bad_rank}":
            return store
        return FailingStore(store, frozenset({"get"}), StoreUnavailableError("ranks/", "no answer"))

    monkeypatch.setattr(resuming_module, "open_store", open_one)
    states = [one(), one()]
    for ended in job.resume(states):
        assert isinstance(ended.error, StoreUnavailableError)
        assert "no answer" in str(ended.error)
    assert values_of(states) == [0.0, 0.0]


def test_a_rank_that_does_not_come_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write(NEW, [one(2.0)] * 3)
    gather = Meeting.gather

    def absent(self: Meeting, topic: str, payload: bytes, timeout_s: float) -> list[bytes]:
        if self.rank == 2:
            raise KeyboardInterrupt
        return gather(self, topic, payload, timeout_s)

    monkeypatch.setattr(Meeting, "gather", absent)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    for ended in job.resume([one(), one(), one()], timeout_s=0.2)[:2]:
        assert isinstance(ended.error, MeetingError)
        assert "rank 2" in str(ended.error)


def test_a_step_that_is_not_there_raises_on_all(job: Job) -> None:
    job.write(NEW, [one(2.0)] * 2)
    for ended in job.resume([one(), one()], step=7):
        assert isinstance(ended.error, CheckpointNotFoundError)


def test_a_damaged_chunk_is_met_by_all_that_need_it(job: Job) -> None:
    job.write(OLD, [one(1.0)] * 2)
    job.write(NEW, [one(2.0)] * 2, OLD)
    job.damage_chunk_of(NEW, 0)
    states = [one() for _ in range(3)]
    assert all_resumed(job.resume(states))[0].step == 1
    assert values_of(states) == [1.0] * 3


# --- another number of ranks -------------------------------------------------------------------


def write_with_generators(job: Job, world_size: int, *, seed_of: Callable[[int], int]) -> list[Any]:
    trees = [generators(seed_of(rank)) for rank in range(world_size)]
    tensors = {"w": np.ones((4, 3), np.float32), "b": np.ones(3, np.float32)}
    common = {"w": {"$tensor": "w"}, "b": {"$tensor": "b"}, "epoch": 1}
    write_checkpoint(
        job.store, NEW, tensors, world_size=world_size,
        values=[{**common, "rng": tree} for tree in trees],
    )  # fmt: skip
    return trees


def test_r3_on_the_same_number_of_ranks_each_gets_its_own_generators(job: Job, restored) -> None:
    trees = write_with_generators(job, 2, seed_of=lambda rank: rank)
    all_resumed(job.resume([one(rng=RNGState()) for _ in range(2)]))
    assert [restored[f"rank-{r}"] for r in range(2)] == trees


def test_r3_new_ranks_get_generators_of_their_own(job: Job, restored) -> None:
    trees = write_with_generators(job, 2, seed_of=lambda rank: rank)
    found = all_resumed(job.resume([one(rng=RNGState()) for _ in range(4)]))
    got = [restored[f"rank-{r}"] for r in range(4)]
    assert got[:2] == trees
    assert got[2] == rng.derive(trees[0], 2)
    assert len({encode_key(tree) for tree in got}) == 4
    assert all(r.surplus == () for r in found)


@pytest.mark.parametrize("world_size", [1, 2])
def test_r3_new_ranks_get_generators_of_their_own_also_where_the_old_ones_agreed(
    job: Job, restored, world_size: int
) -> None:
    """One rank agrees with itself: its generators must not become those of all new ranks."""
    trees = write_with_generators(job, world_size, seed_of=lambda _: 5)
    all_resumed(job.resume([one(rng=RNGState()) for _ in range(world_size + 2)]))
    got = [restored[f"rank-{r}"] for r in range(world_size + 2)]
    assert got[:world_size] == trees
    assert len({encode_key(tree) for tree in got}) == 3


def test_r3_generators_of_ranks_that_are_gone_are_listed(job: Job, restored) -> None:
    trees = write_with_generators(job, 3, seed_of=lambda rank: rank)
    (found,) = all_resumed(job.resume([one(rng=RNGState())]))
    assert restored["rank-0"] == trees[0]
    assert found.surplus == ("rng@1", "rng@2")


def encode_key(tree: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(tree)


def test_r3_values_kept_per_rank_go_to_the_old_ranks_and_new_ones_keep_theirs(job: Job) -> None:
    job.write(NEW, [one(1.0, loader=PerRank({"at": rank})) for rank in range(2)])
    states = [one(loader=PerRank({"at": -1}, on_resize="drop")) for _ in range(3)]
    found = all_resumed(job.resume(states))
    assert [state["loader"].value for state in states] == [{"at": 0}, {"at": 1}, {"at": -1}]
    assert all(r.surplus == () for r in found)
    fewer = [one(loader=PerRank({"at": -1}, on_resize="drop"))]
    (resumed,) = all_resumed(job.resume(fewer))
    assert fewer[0]["loader"].value == {"at": 0}
    assert resumed.surplus == ("loader@1",)


@pytest.mark.parametrize("world_size", [1, 2])
def test_r3_values_kept_per_rank_do_not_go_to_new_ranks_where_the_old_ones_agreed(
    job: Job, world_size: int
) -> None:
    job.write(NEW, [one(1.0, loader=PerRank({"at": 7}))] * world_size)
    states = [one(loader=PerRank({"at": -1}, on_resize="drop")) for _ in range(3)]
    all_resumed(job.resume(states))
    expected = [7] * world_size + [-1] * (3 - world_size)
    assert [state["loader"].value["at"] for state in states] == expected


@pytest.mark.parametrize("world_size", [1, 3])
def test_r3_a_value_that_differed_is_refused_by_name_on_another_number_of_ranks(
    job: Job, world_size: int
) -> None:
    job.write(NEW, [one(1.0, seed=rank) for rank in range(2)])
    states = [one(seed=-1) for _ in range(world_size)]
    for ended in job.resume(states):
        assert isinstance(ended.error, LayoutError)
        assert ended.error.fqn == "seed"
        assert "PerRank" in str(ended.error)
    assert values_of(states) == [0.0] * world_size
    for state in states:
        del state["seed"]
    for resumed in all_resumed(job.resume(states)):
        assert "seed" not in resumed.values, "it is nobody's"
        assert resumed.values["epoch"] == 0


def test_a_value_that_differed_is_each_ranks_own_on_the_same_number_of_ranks(job: Job) -> None:
    job.write(NEW, [one(1.0, seed=rank) for rank in range(3)])
    states = [one(seed=-1) for _ in range(3)]
    all_resumed(job.resume(states))
    assert [state["seed"] for state in states] == [0, 1, 2]


def test_without_strict_a_value_that_differed_goes_to_the_old_ranks_with_a_warning(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.write(NEW, [one(1.0, seed=rank) for rank in range(2)])
    states = [one(seed=-1) for _ in range(3)]
    all_resumed(job.resume(states, strict=False))
    assert [state["seed"] for state in states] == [0, 1, -1]
    assert "seed was different" in caplog.text


def test_a_value_that_agreed_goes_to_all(job: Job) -> None:
    job.write(NEW, [one(1.0, epoch=9)] * 2)
    states = [one() for _ in range(4)]
    all_resumed(job.resume(states))
    assert [state["epoch"] for state in states] == [9] * 4


def test_a_rank_whose_record_differs_from_the_commit_is_damage(job: Job) -> None:
    """A rank manifest that was replaced after the commit, well formed, is not what was committed."""
    job.write(OLD, [one(1.0)] * 2)
    job.write(NEW, [one(2.0, seed=rank) for rank in range(2)], OLD)
    key = keys.rank(NEW, 1)
    record = decode_record(job.store.get(key, max_bytes=MAX), RankManifest, key=key)
    record.values["epoch"] = 666
    job.store.put(key, encode_record(record))
    states = [one(), one()]
    assert all_resumed(job.resume(states))[0].step == 1
