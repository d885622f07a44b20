from __future__ import annotations

import datetime as dt
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from ckptd.errors import UnsupportedValueError
from ckptd.model.box import Box
from ckptd.plan.reading import Wanted, plan_reads
from ckptd.plan.split import split
from ckptd.trainer.flatten import flatten
from ckptd.trainer.fsdp1 import boxes_of_run
from ckptd.trainer.layouts import layout_of
from ckptd.trainer.shards import Split, is_run, rows_inside, rows_of, shards_of
from tests.plan import layouts as make


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=0, world_size=1, timeout=dt.timedelta(seconds=30)
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# --- one dimension ------------------------------------------------------------------------------


@st.composite
def cuts(draw: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Draw mesh sizes, and of each mesh dimension how it cuts dimension 0."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    placements = [
        draw(st.one_of(st.just(Shard(0)), st.builds(_strided, st.integers(1, 4)))) for _ in sizes
    ]
    return tuple(sizes), placements


def _strided(factor: int) -> _StridedShard:
    return _StridedShard(0, split_factor=factor)


def as_splits(sizes: tuple[int, ...], placements: list[Any], place: tuple[int, ...]) -> Any:
    return tuple(
        Split(n, i, int(p.split_factor) if isinstance(p, _StridedShard) else None)
        for n, i, p in zip(sizes, place, placements, strict=True)
    )


@given(cuts(), st.integers(0, 40))
def test_r3_rows_are_those_that_torch_cuts(drawn: Any, extent: int) -> None:
    sizes, placements = drawn
    seen = []
    for place in itertools.product(*map(range, sizes)):
        rows = torch.arange(extent)
        for n, i, placement in zip(sizes, place, placements, strict=True):
            parts, _ = placement._split_tensor(rows, n, with_padding=False)
            rows = parts[i]
        found = rows_of(extent, as_splits(sizes, placements, place))
        assert found.tolist() == rows.tolist()
        seen += found.tolist()
    assert sorted(seen) == list(range(extent)), "each row is somebody's, and nobody else's"


@given(st.integers(1, 10), st.integers(1, 4), st.integers(1, 4))
def test_shards_of_fsdp2_over_tensor_parallelism_are_runs_where_they_are_even(
    per_rank: int, dp: int, tp: int
) -> None:
    placements = [_StridedShard(0, split_factor=tp), Shard(0)]
    for place in itertools.product(range(dp), range(tp)):
        splits = as_splits((dp, tp), placements, place)
        rows = rows_of(per_rank * dp * tp, splits)
        assert is_run(rows)
        assert rows.tolist() == rows_inside(per_rank * dp * tp, splits).tolist()


def test_where_torch_and_fsdp2_cut_uneven_rows_in_two_ways_it_shows() -> None:
    """27 rows on 3 times 4 ranks: one rank's row is number 20 in memory, and 26 by its placement."""
    splits = as_splits((3, 4), [_StridedShard(0, split_factor=4), Shard(0)], (2, 2))
    assert (rows_of(27, splits).tolist(), rows_inside(27, splits).tolist()) == ([26], [20])


# --- meshes and placements, through plan and reshard ------------------------------------------------


@st.composite
def spread(draw: Any, shape: tuple[int, ...], name: str) -> list[list[Box]]:
    """Draw a mesh and placements, and return the boxes of each rank as torch computes them."""
    sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2), label=name))
    choices = [Replicate(), *(Shard(d) for d in range(len(shape)))]
    placements = [draw(st.sampled_from(choices)) for _ in sizes]
    ranks = []
    for place in itertools.product(*map(range, sizes)):
        local, start = _compute_local_shape_and_global_offset(shape, sizes, list(place), placements)
        box = Box(tuple(start), tuple(a + n for a, n in zip(start, local, strict=True)))
        ranks.append([box] if box.volume else [])
    return ranks


@given(st.data(), st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple))
def test_r3_any_mesh_and_placement_is_read_back_under_any_other(
    data: Any, shape: tuple[int, ...]
) -> None:
    before, after = data.draw(spread(shape, "before")), data.draw(spread(shape, "after"))
    whole = make.tensor("w", shape)
    layouts = [make.layout((whole, boxes), is_replicated=True) for boxes in before]
    plan, blobs = split(layouts, 64), {}
    manifests = [
        make.manifest(rank, own, plan.shares[rank], world_size=len(layouts), plan=plan.digest,
                      chunk_bytes=64, blobs=blobs)
        for rank, own in enumerate(layouts)
    ]  # fmt: skip
    expected = make.contents(whole, 0, is_replicated=True)
    for boxes in after:
        wanted = [Wanted("w", box) for box in boxes]
        into = [(box, np.full(box.shape, 77, np.float32)) for box in boxes]
        make.read(plan_reads(wanted, manifests), blobs, into)
        for box, array in into:
            np.testing.assert_array_equal(array, expected[box.slices((0,) * len(shape))])


@given(st.data(), st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_a_run_of_elements_is_few_boxes_in_order(data: Any, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    boxes = list(boxes_of_run(shape, first, last))
    numbers = np.arange(count).reshape(shape)
    parts = [numbers[box.slices((0,) * len(shape))].ravel() for box in boxes]
    found = np.concatenate(parts).tolist() if parts else []
    assert found == list(range(first, last))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


# --- live tensors -----------------------------------------------------------------------------------


def test_a_sum_that_is_not_added_up_is_refused_by_name(mesh: Any) -> None:
    part = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    with pytest.raises(UnsupportedValueError, match=r"w: .*Partial"):
        flatten({"w": part})


def test_a_shard_of_another_size_than_its_placement_is_refused(mesh: Any) -> None:
    odd = DTensor.from_local(
        torch.ones(3, 2), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 2)), stride=(2, 1)
    )
    with pytest.raises(UnsupportedValueError, match=r"w: .*\(4, 2\).*holds \(3, 2\)"):
        shards_of("w", odd)


def test_a_strided_shard_with_gaps_is_refused_by_name() -> None:
    class Mesh:
        shape = (2,)

        def get_coordinate(self) -> list[int]:
            return [0]

    class Odd:
        device_mesh, placements = Mesh(), (_strided(2),)
        shape = torch.Size((8, 2))

    from ckptd.trainer.shards import _check_rows

    with pytest.raises(UnsupportedValueError, match=r"w: the rows of a strided shard"):
        _check_rows("w", Odd(), Box((0, 0), (4, 2)))


def test_a_tied_dtensor_is_one_tensor_with_two_names(mesh: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
    model["a"].weight = model["b"].weight = weight
    flat = flatten({"model": model})
    assert flat.aliases == {"model.b.weight": "model.a.weight"}
    assert [h.boxes for h in layout_of(flat).held] == [(Box((0, 0), (2, 2)),)]


def test_a_second_flattening_of_dtensors_is_the_first_until_one_gets_other_memory(
    mesh: Any,
) -> None:
    weight = distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])
    first = flatten({"w": weight})
    again = flatten({"w": weight}, previous=first)
    assert again.leaves is first.leaves
    weight._local_tensor = torch.zeros(2, 2)
    changed = flatten({"w": weight}, previous=first)
    assert changed.leaves[0].parts[0] is weight._local_tensor
    assert changed.signature() == first.signature()
