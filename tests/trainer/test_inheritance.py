"""Which values a rank goes on with when the world is another one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.errors import ConfigError, LayoutError
from ckptd.model.keys import StepId
from ckptd.trainer import rng
from ckptd.trainer.flatten import flatten
from ckptd.trainer.merging import merge_values
from ckptd.trainer.rng import RNGState, stream_of, stream_of_meshes
from ckptd.trainer.values import PerRank
from tests.fakes.checkpoints import write_checkpoint
from tests.trainer import test_resuming_ranks as resuming
from tests.trainer.test_resuming_ranks import Job, all_resumed, one

NEW = StepId(1, 2)
job, restored = resuming.job, resuming.restored


# --- PerRank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_r3_without_a_rule_another_world_size_is_refused_by_name(job: Job, world_size: int) -> None:
    job.write(NEW, [one(1.0, loader=PerRank({"at": rank})) for rank in range(2)])
    states = [one(loader=PerRank({"at": -1})) for _ in range(world_size)]
    for ended in job.resume(states):
        assert isinstance(ended.error, LayoutError)
        assert ended.error.fqn == "loader"
        assert "on_resize" in str(ended.error)
    assert resuming.values_of(states) == [0.0] * world_size, "nothing was changed"


def test_the_same_world_size_needs_no_rule(job: Job) -> None:
    job.write(NEW, [one(1.0, loader=PerRank({"at": rank})) for rank in range(2)])
    states = [one(loader=PerRank({"at": -1})) for _ in range(2)]
    all_resumed(job.resume(states))
    assert [state["loader"].value["at"] for state in states] == [0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_r3_a_function_makes_the_values_of_a_new_world_from_all_old_ones(
    job: Job, world_size: int
) -> None:
    def again(old: list[dict[str, int]], rank: int, world: int) -> dict[str, int]:
        return {"at": sum(value["at"] for value in old) * 100 + 10 * rank + world}

    job.write(NEW, [one(1.0, loader=PerRank({"at": rank + 1})) for rank in range(4)])
    states = [one(loader=PerRank({"at": -1}, on_resize=again)) for _ in range(world_size)]
    found = all_resumed(job.resume(states))
    expected = [1000 + 10 * rank + world_size for rank in range(world_size)]
    assert [state["loader"].value["at"] for state in states] == expected
    assert all(r.surplus == () for r in found), "the function has had them all"
    assert states[0]["loader"].on_resize is again, "the next resize has the same rule"


def test_a_rule_that_fails_names_the_entry_and_changes_nothing(job: Job) -> None:
    def broken(old: list[Any], rank: int, world: int) -> Any:
        raise IndexError("no such shard")

    job.write(NEW, [one(1.0, loader=PerRank(rank)) for rank in range(2)])
    states = [one(loader=PerRank(-1, on_resize=broken))]
    (ended,) = job.resume(states)
    assert isinstance(ended.error, LayoutError)
    assert "loader: on_resize failed for rank 0 of 1: IndexError" in str(ended.error)
    assert resuming.values_of(states) == [0.0]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="on_resize"):
        PerRank(1, on_resize="keep")  # type: ignore[arg-type]


# --- generators ---------------------------------------------------------------------------------


def seeded(number: int, stream: int | None) -> Any:
    torch.manual_seed(number)
    return rng.capture(stream)


def test_pain_32_each_rank_goes_on_with_its_own_generators(job: Job, restored) -> None:
    """Not with another rank's, though all ranks save their state under one name."""
    trees = resuming.write_with_generators(job, 4, seed_of=lambda rank: rank)
    all_resumed(job.resume([one(rng=RNGState()) for _ in range(4)]))
    assert [restored[f"rank-{rank}"] for rank in range(4)] == trees


def write_streams(job: Job, streams: list[int | None]) -> list[Any]:
    trees = [seeded(rank if s is None else 100 + s, s) for rank, s in enumerate(streams)]
    rng_capture, resuming.rng.capture = resuming.rng.capture, iter_of(trees)
    try:
        job.write(NEW, [one(1.0, rng=RNGState()) for _ in streams])
    finally:
        resuming.rng.capture = rng_capture
    return trees


def iter_of(trees: list[Any]) -> Any:
    left = list(trees)
    return lambda _stream=None: left.pop(0)


def test_r3_tensor_parallel_peers_get_one_stream_where_each_rank_had_its_own(
    job: Job, restored
) -> None:
    """From 4 data-parallel ranks to 2 times 2: peers must draw the same dropout masks."""
    trees = write_streams(job, [None] * 4)
    all_resumed(job.resume([one(rng=RNGState(rank // 2)) for rank in range(4)]))
    got = [restored[f"rank-{rank}"] for rank in range(4)]
    assert got == [trees[0], trees[0], trees[1], trees[1]]


def test_r3_streams_come_back_by_their_number_and_not_by_rank(job: Job, restored) -> None:
    """From 2 times 2 to 4 data-parallel ranks: two streams are there, two are new."""
    trees = write_streams(job, [0, 0, 1, 1])
    all_resumed(job.resume([one(rng=RNGState()) for _ in range(4)]))
    got = [restored[f"rank-{rank}"] for rank in range(4)]
    assert got[:2] == [trees[0], trees[2]]
    assert len({resuming.encode_key(tree) for tree in got}) == 4


class Mesh:
    """A mesh with named dimensions, as one rank sees it."""

    def __init__(self, names: tuple[str, ...] | None, shape: tuple[int, ...], at: list[int]):
        self.mesh_dim_names, self.shape, self.ndim = names, shape, len(shape)
        self._at = at

    def get_coordinate(self) -> list[int]:
        return self._at

    def get_local_rank(self) -> int:
        return self._at[0]


@pytest.mark.parametrize(
    ("names", "shape", "at", "stream"),
    [
        (("dp", "tp"), (2, 4), [1, 3], 1),
        (("replicate", "shard", "tp"), (2, 3, 2), [1, 2, 1], 5),
        (("tp",), (4,), [3], 0),
        (("tp",), (2,), [1], None),
        (("dp",), (4,), [3], None),
        (None, (4,), [3], None),
    ],
)
def test_a_stream_is_the_place_among_what_is_not_tensor_parallel(
    names: Any, shape: Any, at: Any, stream: int | None
) -> None:
    world_size = max(4, math.prod(shape))
    assert stream_of_meshes([Mesh(names, shape, at)], world_size) == stream


def test_a_stream_may_be_given_as_a_mesh() -> None:
    assert RNGState(Mesh(("dp",), (4,), [2])).stream == 2
    assert stream_of(rng.capture(2), 0) == 2
    assert stream_of(rng.capture(), 3) == 3


# --- what follows parameters --------------------------------------------------------------------


def group(*params: str, idle: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"params": list(params), "options": options, "class": "A"}
    return found | ({"idle": list(idle)} if idle else {})


def test_groups_of_several_ranks_are_one_list_and_each_parameter_stands_once() -> None:
    one = {"groups": [group("a", "b", lr=1)], "state_values": {"a": {"n": 1}}}
    two = {"groups": [group("b", "c", lr=2)], "state_values": {"c": {"n": 2}}, "shared": {"k": 3}}
    assert merge_values("o", [one, two]) == {
        "groups": [group("a", "b", lr=1), group("c", lr=2)],
        "state_values": {"a": {"n": 1}, "c": {"n": 2}},
        "shared": {"k": 3},
    }


def test_a_parameter_is_idle_only_if_it_is_so_on_all_ranks_that_have_it() -> None:
    one = {"groups": [group("a", "b", idle=("a", "b"))], "state_values": {}}
    two = {"groups": [group("a", "b", idle=("b",))], "state_values": {}}
    assert merge_values("o", [one, two])["groups"] == [group("a", "b", idle=("b",))]


def test_pain_24_moments_of_pipeline_stages_come_back_on_one_rank(tmp_path) -> None:
    """Nothing is dropped silently: each stage's moments and options are there, or it is an error."""
    stages = [nn.ModuleDict({name: nn.Linear(2, 2)}) for name in ("a", "b")]
    optimizers = [
        torch.optim.AdamW(stage.parameters(), lr=0.1 * (i + 1)) for i, stage in enumerate(stages)
    ]
    for stage, optimizer in zip(stages, optimizers, strict=True):
        for parameter in stage.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    with ckptd.Checkpointer(tmp_path / "root", daemon=False) as ckpt:
        ckpt.save(1, {"model": stages, "optimizer": optimizers}, wait=True)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    groups = [{"params": model["a"].parameters()}, {"params": model["b"].parameters()}]
    optimizer = torch.optim.AdamW(groups)
    resumed = ckptd.restore(tmp_path / "root", {"model": model, "optimizer": optimizer})
    assert (resumed.missing, resumed.unused) == ((), ())
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    for stage, saved in zip(stages, optimizers, strict=True):
        for name, parameter in stage.named_parameters():
            live = optimizer.state[model.get_parameter(name)]
            for key, value in saved.state[parameter].items():
                assert torch.equal(live[key], value), (name, key)


class Scaled(nn.Linear):
    """A layer with extra state."""

    scale = 1.0

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_extra_state_of_stages_is_put_together_on_any_number_of_ranks(
    job: Job, world_size: int
) -> None:
    stages = [nn.ModuleDict({name: Scaled(2, 2)}) for name in ("a", "b")]
    for scale, stage in enumerate(stages, start=5):
        next(iter(stage.values())).scale = float(scale)
    whole = nn.ModuleDict({**stages[0], **stages[1]})
    tensors = {f"model.{name}": p.detach().numpy() for name, p in whole.named_parameters()}
    values = [flatten({"model": stage}).values for stage in stages]
    write_checkpoint(job.store, NEW, tensors, world_size=2, values=values)
    states = [
        {"model": nn.ModuleDict({"a": Scaled(2, 2), "b": Scaled(2, 2)})} for _ in range(world_size)
    ]
    all_resumed(job.resume(states))
    for state in states:
        assert [layer.scale for layer in state["model"].values()] == [5.0, 6.0]
        assert torch.equal(state["model"]["b"].weight, whole["b"].weight)
