from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.model.tensor import Layout
from ckptd.plan.split import merge_runs, split, whole_share
from ckptd.units import KIB, MIB
from tests.plan import layouts as make

CHUNK = 32 * MIB


def share_bytes(layouts, plan):
    return [
        sum(box.volume * own.held[place].tensor.itemsize for place, box in share)
        for own, share in zip(layouts, plan.shares, strict=True)
    ]


def counts(layouts, plan):
    """How often each element of each tensor is written."""
    written = {}
    for own, share in zip(layouts, plan.shares, strict=True):
        for held in own.held:
            written.setdefault(held.tensor.fqn, np.zeros(held.tensor.shape, int))
        for place, box in share:
            t = own.held[place].tensor
            written[t.fqn][box.slices((0,) * len(t.shape))] += 1
    return written


@given(st.data(), st.integers(1, 6), st.sampled_from([8, 64, 4096]))
def test_every_element_is_written_exactly_once(data, world_size, chunk_bytes):
    layouts = data.draw(make.layouts(data.draw(make.tensors()), world_size))
    plan = split(layouts, chunk_bytes)
    assert all((written == 1).all() for written in counts(layouts, plan).values())


@given(st.data(), st.integers(1, 6))
def test_a_rank_writes_only_what_it_holds(data, world_size):
    layouts = data.draw(make.layouts(data.draw(make.tensors()), world_size))
    for own, share in zip(layouts, split(layouts, 64).shares, strict=True):
        for place, box in share:
            held = np.zeros(own.held[place].tensor.shape, bool)
            for mine in own.held[place].boxes:
                held[mine.slices((0,) * held.ndim)] = True
            assert held[box.slices((0,) * held.ndim)].all()


@given(st.data(), st.integers(1, 6))
def test_shares_stand_in_order_of_place_and_index(data, world_size):
    layouts = data.draw(make.layouts(data.draw(make.tensors()), world_size))
    for share in split(layouts, 64).shares:
        keys = [(place, box.start) for place, box in share]
        assert keys == sorted(set(keys))


def test_equal_arguments_give_equal_plans_whatever_the_objects():
    own = make.layout(make.tensor("a", (100, 7)), make.tensor("b", (3,)))
    copy = msgspec.json.decode(msgspec.json.encode(own), type=Layout)
    assert split([own, own, own], CHUNK) == split([own, copy, own], CHUNK)


def test_the_digest_tells_layouts_their_order_and_chunk_bytes_apart():
    a, b = make.layout(make.tensor("a")), make.layout(make.tensor("b"))
    digests = [
        split(*args).digest for args in [([a, b], 64), ([b, a], 64), ([a, b], 128), ([a], 64)]
    ]
    assert len(set(digests)) == 4


@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
@pytest.mark.parametrize("kind", ["one large", "many small", "mixed"])
def test_replicas_share_large_states_to_five_percent(world_size, kind):
    rng = random.Random(world_size)
    shapes = {
        "one large": [(100_000, 1025)],
        "many small": [(rng.randrange(1, 3000),) for _ in range(4000)],
        "mixed": [(rng.randrange(1, 4096), rng.randrange(1, 2048)) for _ in range(80)],
    }[kind]
    own = make.layout(*(make.tensor(f"t{i:04d}", shape) for i, shape in enumerate(shapes)))
    layouts = [own] * world_size
    sizes = share_bytes(layouts, split(layouts, CHUNK))
    mean = sum(sizes) / world_size
    assert 0.95 * mean <= min(sizes) <= max(sizes) <= 1.05 * mean


@pytest.mark.parametrize(
    ("share_mib", "granule"), [(700, 32 * MIB), (40, MIB), (10, 512 * KIB), (0.01, 4 * KIB)]
)
def test_the_granule_fits_the_share(share_mib, granule):
    t = make.tensor("w", (int(2 * share_mib * MIB),), "uint8")
    (_, first), (_, second) = (share[0] for share in split([make.layout(t)] * 2, CHUNK).shares)
    assert first.stop == second.start
    assert first.stop[0] % granule == 0


def test_each_holder_gets_one_range_of_the_tensors_laid_end_to_end():
    own = make.layout(*(make.tensor(f"t{i}", (64, 1024)) for i in range(4)))
    shares = split([own] * 2, CHUNK).shares
    assert shares[0] == ((0, Box((0, 0), (64, 1024))), (1, Box((0, 0), (64, 1024))))
    assert shares[1] == ((2, Box((0, 0), (64, 1024))), (3, Box((0, 0), (64, 1024))))


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_a_boundary_moves_by_half_a_granule_at_most(world_size):
    own = make.layout(make.tensor("w", (9_999_991,), "uint8"))
    layouts = [own] * world_size
    ends = np.cumsum(share_bytes(layouts, split(layouts, 64 * KIB)))
    ideal = np.arange(1, world_size + 1) * 9_999_991 / world_size
    assert abs(ends - ideal).max() <= 32 * KIB


def test_groups_of_holders_are_split_apart():
    """HSDP: ranks 0 and 2 hold the upper half, 1 and 3 the lower."""
    t = make.tensor("w", (4096, 1024))
    upper, lower = Box((0, 0), (2048, 1024)), Box((2048, 0), (4096, 1024))
    layouts = [make.layout((t, [upper if r % 2 == 0 else lower])) for r in range(4)]
    plan = split(layouts, CHUNK)
    assert share_bytes(layouts, plan) == [4 * MIB] * 4


def test_buffers_are_whole_and_of_the_lowest_rank_that_holds_them():
    buffer = make.tensor("b", (4096, 1024), kind="buffer")
    other = make.tensor("o", (4096, 1024), kind="other")
    layouts = [make.layout(buffer), make.layout(buffer, other), make.layout(buffer, other)]
    full = Box.full((4096, 1024))
    assert split(layouts, CHUNK).shares == (((0, full),), ((1, full),), ())


def test_buffers_that_a_placement_calls_replicated_are_split():
    buffer = make.tensor("b", (4096, 1024), kind="buffer")
    layouts = [make.layout(buffer, is_replicated=True)] * 4
    assert share_bytes(layouts, split(layouts, CHUNK)) == [4 * MIB] * 4
    layouts[3] = make.layout(buffer)  # one holder does not say so: then nobody can rely on it
    assert share_bytes(layouts, split(layouts, CHUNK)) == [16 * MIB, 0, 0, 0]


def test_a_place_is_that_of_the_ranks_own_layout():
    t = make.tensor("w", (4096, 1024))
    layouts = [make.layout(t), make.layout(make.tensor("a", (1,), kind="buffer"), t)]
    shares = split(layouts, CHUNK).shares
    assert [place for place, _ in shares[0]] == [0]
    assert [place for place, _ in shares[1]] == [0, 1]


def test_scalars_and_empty_tensors_are_split_too():
    own = make.layout(make.tensor("empty", (0, 5)), make.tensor("scalar", ()))
    shares = split([own] * 3, CHUNK).shares
    assert sorted(row for share in shares for row in share) == [(1, Box((), ()))]


def test_boxes_that_overlap_without_being_equal_name_fqn_and_ranks():
    t = make.tensor("model.w", (8, 8))
    layouts = [
        make.layout((t, [make.rows(0, 4)])),
        make.layout((t, [make.rows(4, 8)])),
        make.layout((t, [make.rows(3, 5)])),
    ]
    with pytest.raises(LayoutError, match=r"model\.w.*\[3:5, 0:8\]") as caught:
        split(layouts, CHUNK)
    assert caught.value.fqn == "model.w"
    assert 2 in caught.value.ranks


def test_a_pinwheel_which_no_plane_parts_is_no_overlap():
    t = make.tensor("w", (3, 3))
    wheel = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 3)),
        ((2, 1), (3, 3)),
        ((1, 0), (3, 1)),
        ((1, 1), (2, 2)),
    ]
    layouts = [make.layout((t, [Box(*corners)])) for corners in wheel]
    assert (counts(layouts, split(layouts, CHUNK))["w"] == 1).all()
    layouts[4] = make.layout((t, [Box((1, 1), (2, 3))]))
    with pytest.raises(LayoutError):
        split(layouts, CHUNK)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "float16"), ("shape", (8, 4)), ("kind", "buffer")]
)
def test_ranks_that_disagree_about_a_tensor_are_named(field, value):
    first = make.tensor("model.w", (4, 8))
    other = msgspec.structs.replace(first, **{field: value})
    with pytest.raises(LayoutError, match=field) as caught:
        split([make.layout(first), make.layout(first), make.layout(other)], CHUNK)
    assert (caught.value.fqn, caught.value.ranks) == ("model.w", (0, 2))


@pytest.mark.parametrize(
    "box",
    [Box((0, 0), (5, 8)), Box((-1, 0), (2, 8)), Box((3, 0), (2, 8)), Box((0,), (4,)), Box((), ())],
)
def test_boxes_outside_of_their_tensor_are_refused(box):
    with pytest.raises(LayoutError) as caught:
        split([make.layout((make.tensor("w", (4, 8)), [box]))], CHUNK)
    assert (caught.value.fqn, caught.value.ranks) == ("w", (0,))


def test_one_rank_with_a_box_twice_or_a_name_twice_is_refused():
    t, full = make.tensor("w", (4, 8)), make.rows(0, 4)
    with pytest.raises(LayoutError):
        split([make.layout((t, [full, full]))], CHUNK)
    with pytest.raises(LayoutError):
        split([make.layout((t, [make.rows(0, 2)]), (t, [make.rows(2, 4)]))], CHUNK)


def test_whole_share_is_everything_once():
    t = make.tensor("w", (4, 8))
    own = make.layout((t, [make.rows(0, 1), make.rows(3, 4), make.rows(0, 1), make.rows(2, 2)]))
    assert whole_share(own) == ((0, make.rows(0, 1)), (0, make.rows(3, 4)))


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 30), st.data())
def test_merged_runs_hold_the_same_elements_in_the_same_order(shape, most, data):
    parts = Box.full(tuple(shape)).cut(most)
    a = data.draw(st.integers(0, len(parts)))
    b = data.draw(st.integers(a, len(parts)))
    flat = np.arange(int(np.prod(shape))).reshape(shape)

    def elements(boxes):
        return [n for box in boxes for n in flat[box.slices((0,) * len(shape))].ravel().tolist()]

    merged = merge_runs(parts[a:b])
    assert elements(merged) == elements(parts[a:b])
    assert len(merged) <= 2 * max(1, len(shape))
