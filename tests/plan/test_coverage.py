from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.plan.coverage import prove_coverage
from ckptd.plan.rows import Rows, column_rows, find_crowded
from ckptd.plan.split import split, whole_share
from tests.plan import layouts as make

PLAN = "a" * 32


def wrote(rank, *boxes, of=None, plan=PLAN, world_size=9):
    """The manifest of a rank that holds a tensor and wrote these boxes of it."""
    t = of or make.tensor("model.x", (8, 8))
    own = make.layout((t, boxes))
    share = tuple((0, box) for box in boxes)
    return make.manifest(rank, own, share, world_size=world_size, plan=plan, chunk_bytes=1 << 20)


@given(st.data(), st.integers(1, 6))
def test_every_split_covers_with_any_mixture_of_planned_and_unplanned_ranks(data, world_size):
    layouts = data.draw(make.layouts(data.draw(make.tensors()), world_size))
    plan = split(layouts, 64)
    manifests = []
    for rank, own in enumerate(layouts):
        is_planned = data.draw(st.booleans())
        manifests.append(
            make.manifest(
                rank,
                own,
                plan.shares[rank] if is_planned else whole_share(own),
                world_size=world_size,
                plan=plan.digest if is_planned else None,
            )
        )
    prove_coverage(data.draw(st.permutations(manifests)))


boxes_of_4x4 = st.tuples(*(st.integers(0, 4) for _ in range(4))).map(
    lambda n: Box((min(n[:2]), min(n[2:])), (max(n[:2]), max(n[2:])))
)


@given(st.lists(st.tuples(boxes_of_4x4, st.booleans()), min_size=1, max_size=7))
def test_the_proof_agrees_with_counting_elements(written):
    t = make.tensor("x", (4, 4))
    planned, unplanned = np.zeros((4, 4), int), np.zeros((4, 4), int)
    manifests = []
    for rank, (box, is_planned) in enumerate(written):
        counts = planned if is_planned else unplanned
        counts[box.slices((0, 0))] += 1
        boxes = [box] if box.volume else []
        manifests.append(wrote(rank, *boxes, of=t, plan=PLAN if is_planned else None))
    is_whole = ((planned + unplanned) > 0).all() and (planned <= 1).all()
    if is_whole:
        prove_coverage(manifests)
    else:
        with pytest.raises(LayoutError) as caught:
            prove_coverage(manifests)
        assert caught.value.fqn == "x"


def test_a_hole_names_fqn_box_and_who_holds_parts():
    manifests = [wrote(0, make.rows(0, 3)), wrote(1, make.rows(5, 8))]
    with pytest.raises(LayoutError, match=r"box \[3:5, 0:8\] of model\.x .* no rank") as caught:
        prove_coverage(manifests)
    assert (caught.value.fqn, caught.value.ranks) == ("model.x", (0, 1))


def test_a_hole_in_the_middle_is_found():
    frame = Box((0, 0), (8, 8)).subtract(Box((2, 3), (4, 5)))
    with pytest.raises(LayoutError, match=r"\[2:4, 3:5\]"):
        prove_coverage([wrote(0, *frame)])
    prove_coverage([wrote(0, *frame), wrote(1, Box((2, 3), (4, 5)))])


def test_a_tensor_that_nobody_wrote_is_a_hole_and_an_empty_one_is_not():
    with pytest.raises(LayoutError, match=r"rank 3 holds"):
        prove_coverage([wrote(3)])
    with pytest.raises(LayoutError, match=r"\[\] of s"):
        prove_coverage([wrote(3, of=make.tensor("s", ()))])
    prove_coverage([wrote(3, of=make.tensor("empty", (3, 0)))])


def test_two_planned_ranks_that_overlap_are_both_named():
    manifests = [wrote(2, make.rows(0, 5)), wrote(7, make.rows(4, 8)), wrote(1, plan=None)]
    with pytest.raises(LayoutError, match=r"\[4:5, 0:8\]") as caught:
        prove_coverage(manifests)
    assert caught.value.ranks == (2, 7)


def test_two_planned_ranks_with_the_same_box_are_both_named():
    with pytest.raises(LayoutError) as caught:
        prove_coverage([wrote(2, make.rows(0, 8)), wrote(7, make.rows(0, 8))])
    assert caught.value.ranks == (2, 7)


def test_one_planned_rank_that_wrote_a_box_twice_is_refused():
    with pytest.raises(LayoutError) as caught:
        prove_coverage([wrote(2, make.rows(0, 8), make.rows(0, 8))])
    assert caught.value.ranks == (2,)


def test_an_overlap_of_planned_ranks_is_found_below_an_unplanned_whole():
    whole = wrote(0, make.rows(0, 8), plan=None)
    prove_coverage([whole, wrote(1, make.rows(0, 5)), wrote(2, make.rows(5, 8))])
    with pytest.raises(LayoutError):
        prove_coverage([whole, wrote(1, make.rows(0, 5)), wrote(2, make.rows(4, 8))])


def test_two_scalars_by_plan_overlap():
    scalar = make.tensor("s", ())
    one, two = (wrote(rank, Box((), ()), of=scalar) for rank in (0, 1))
    prove_coverage([one])
    with pytest.raises(LayoutError):
        prove_coverage([one, two])
    prove_coverage([one, msgspec.structs.replace(two, plan=None)])


def test_a_pinwheel_covers():
    wheel = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 3)),
        ((2, 1), (3, 3)),
        ((1, 0), (3, 1)),
        ((1, 1), (2, 2)),
    ]
    t = make.tensor("w", (3, 3))
    manifests = [wrote(rank, Box(*corners), of=t) for rank, corners in enumerate(wheel)]
    prove_coverage(manifests)
    with pytest.raises(LayoutError, match=r"\[1:2, 1:2\]"):
        prove_coverage(manifests[:4])


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "int32"), ("shape", (4, 16)), ("kind", "other")]
)
def test_ranks_that_disagree_about_a_tensor_are_named(field, value):
    t = make.tensor("x", (8, 8))
    other = msgspec.structs.replace(t, **{field: value})
    with pytest.raises(LayoutError, match=field) as caught:
        prove_coverage([wrote(0, make.rows(0, 8), of=t), wrote(4, of=other)])
    assert (caught.value.fqn, caught.value.ranks) == ("x", (0, 4))


def test_ranks_that_disagree_about_an_alias_are_named():
    a, b = make.tensor("a"), make.tensor("b")
    own = make.layout(a, b)
    one = make.manifest(0, own, whole_share(own), world_size=2, aliases={"z": "a"})
    two = make.manifest(1, own, whole_share(own), world_size=2, aliases={"z": "b"})
    with pytest.raises(LayoutError, match="z is tied to") as caught:
        prove_coverage([one, two])
    assert caught.value.ranks == (0, 1)
    prove_coverage([one, msgspec.structs.replace(two, aliases={})])


def test_an_alias_that_is_another_ranks_tensor_is_refused():
    a, z = make.layout(make.tensor("a")), make.layout(make.tensor("z"))
    one = make.manifest(0, a, whole_share(a), world_size=2, aliases={"z": "a"})
    two = make.manifest(1, z, whole_share(z), world_size=2)
    with pytest.raises(LayoutError) as caught:
        prove_coverage([one, two])
    assert caught.value.fqn == "z"


@pytest.mark.parametrize("seed", range(3))
def test_a_large_mesh_is_proven_and_one_lost_shard_is_found(seed):
    """64 ranks, 8 x 8 shards of uneven sizes."""
    rng = random.Random(seed)
    edges = [[0, *sorted(rng.sample(range(1, 99), 7)), 99] for _ in range(2)]
    t = make.tensor("w", (99, 99))
    shards = [
        Box((edges[0][i], edges[1][j]), (edges[0][i + 1], edges[1][j + 1]))
        for i in range(8)
        for j in range(8)
    ]
    manifests = [wrote(rank, box, of=t, world_size=64) for rank, box in enumerate(shards)]
    prove_coverage(manifests)
    lost = rng.randrange(64)
    manifests[lost] = wrote(lost, of=t, world_size=64)
    with pytest.raises(LayoutError) as caught:
        prove_coverage(manifests)
    assert str(shards[lost]) in str(caught.value)


def rows_of(boxes: Sequence[Box]) -> Rows:
    numbers = np.array([n for box in boxes for n in (*box.start, *box.stop)])
    tensor = np.full(len(boxes), 5)
    dims_of = np.full(6, len(boxes[0].start))
    (rows,) = column_rows([(0, tensor, np.arange(len(boxes)), numbers)], dims_of)
    return rows


def test_boxes_that_planes_part_only_after_several_rounds_are_not_crowded():
    """A staircase: each plane parts one box from the rest, in alternating directions."""
    boxes, rest = [], Box((0, 0), (64, 64))
    for turn in range(20):
        d = 1 - turn % 2
        at = rest.start[d] + 1
        boxes.append(Box(rest.start, tuple(at if i == d else n for i, n in enumerate(rest.stop))))
        rest = Box(tuple(at if i == d else n for i, n in enumerate(rest.start)), rest.stop)
    rows = rows_of((*boxes, rest))
    assert not len(find_crowded(rows))
    rows = rows_of((*boxes, rest, rest))
    assert find_crowded(rows).tolist() == [5]


def test_coordinates_near_the_limit_do_not_overflow():
    """Two rows of boxes of 2**47 elements a side: a running maximum over parts must not wrap."""
    count, side = 40_000, 1 << 47
    tensor = np.repeat(np.arange(count), 2)
    box = np.tile(np.array([[0, side], [side, 2 * side]]), (count, 1))
    rows = Rows(tensor, tensor, tensor, box)
    assert not len(find_crowded(rows))
    box[7] -= 1
    assert find_crowded(rows).tolist() == [3]
