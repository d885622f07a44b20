from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import LayoutError, MissingTensorError, ShapeMismatchError
from ckptd.model.box import Box
from ckptd.plan.reading import ChunkRead, Region, Wanted, may_suffice, plan_reads
from ckptd.plan.split import split, whole_share
from tests.plan import layouts as make


def stored(layouts, *, plan=None, chunk_bytes=1 << 20):
    """The manifests of ranks that followed `plan`, or wrote all they hold."""
    return [
        make.manifest(
            rank,
            own,
            plan.shares[rank] if plan else whole_share(own),
            world_size=len(layouts),
            plan=plan.digest if plan else None,
            chunk_bytes=chunk_bytes,
        )
        for rank, own in enumerate(layouts)
    ]


def sharded(*spans, kind="parameter"):
    t = make.tensor("w", (8, 8), kind=kind)
    return [make.layout((t, [make.rows(*span)])) for span in spans]


@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.sampled_from([16, 64, 4096]))
def test_r3_any_layout_written_is_read_back_under_any_other(data, before, after, chunk_bytes):
    """Planned and unplanned ranks mixed, buffers that differ between ranks included."""
    tensors = data.draw(make.tensors())
    layouts = data.draw(make.layouts(tensors, before))
    plan = split(layouts, chunk_bytes)
    blobs: dict[str, bytes] = {}
    manifests = []
    for rank, own in enumerate(layouts):
        is_planned = data.draw(st.booleans())
        share, digest = (plan.shares[rank], plan.digest) if is_planned else (whole_share(own), None)
        manifests.append(
            make.manifest(rank, own, share, world_size=before, plan=digest,
                          chunk_bytes=chunk_bytes, blobs=blobs)
        )  # fmt: skip
    expected = expect(tensors, layouts)
    for other in data.draw(make.layouts(tensors, after)):
        wanted = [Wanted(h.tensor.fqn, box) for h in other.held for box in h.boxes]
        dtypes = [make.NUMPY[h.tensor.dtype] for h in other.held for _ in h.boxes]
        into = [
            (want.box, np.full(want.box.shape, 77, dtype))
            for want, dtype in zip(wanted, dtypes, strict=True)
        ]
        make.read(plan_reads(wanted, data.draw(st.permutations(manifests))), blobs, into)
        for want, (box, array) in zip(wanted, into, strict=True):
            whole = expected[want.fqn]
            np.testing.assert_array_equal(array, whole[box.slices((0,) * whole.ndim)])


def expect(tensors, layouts):
    """Each element as its lowest holder has it."""
    expected = {t.fqn: np.zeros(t.shape, make.NUMPY[t.dtype]) for t in tensors}
    for rank in reversed(range(len(layouts))):
        for held in layouts[rank].held:
            t = held.tensor
            own = make.contents(t, rank, is_replicated=held.is_replicated)
            for box in held.boxes:
                where = box.slices((0,) * len(t.shape))
                expected[t.fqn][where] = own[where]
    return expected


@given(st.data(), st.integers(1, 4))
def test_no_wanted_element_is_read_twice(data, world_size):
    tensors = data.draw(make.tensors())
    manifests = stored(data.draw(make.layouts(tensors, world_size)), chunk_bytes=32)
    wanted = [Wanted(t.fqn, Box.full(t.shape)) for t in tensors]
    counts = [np.zeros(t.shape, int) for t in tensors]
    for _, regions in plan_reads(wanted, manifests):
        for region in regions:
            counts[region.wanted][region.box.slices((0,) * counts[region.wanted].ndim)] += 1
    assert all((count == 1).all() for count in counts)


def test_parameters_come_from_the_manifest_given_first():
    manifests = stored(sharded((0, 8), (0, 8), (0, 8)))
    for m, record in enumerate(manifests):  # contents are equal, so tell the chunks apart
        chunk = msgspec.structs.replace(record.chunks[0], hash=f"{m:032x}")
        manifests[m] = msgspec.structs.replace(record, chunks=(chunk,))
    wanted = [Wanted("w", make.rows(2, 4))]
    (read,) = plan_reads(wanted, [manifests[2], manifests[0], manifests[1]])
    assert read.chunk == manifests[2].chunks[0]


@pytest.mark.parametrize("kind", ["buffer", "other"])
def test_buffers_come_from_the_lowest_rank_whatever_the_order(kind):
    manifests = stored(sharded((0, 8), (0, 8), (0, 8), kind=kind))
    (read,) = plan_reads([Wanted("w", make.rows(2, 4))], manifests[::-1])
    assert read.chunk == manifests[0].chunks[0]


def test_a_chunk_that_several_ranks_name_is_read_once():
    tensors = [make.tensor(f"t{i}", (8,)) for i in range(3)]
    manifests = stored([make.layout(*tensors)] * 2)
    assert manifests[0].chunks == manifests[1].chunks
    wanted = [Wanted(t.fqn, Box.full(t.shape)) for t in tensors]
    (read,) = plan_reads(wanted, manifests)
    assert [region.wanted for region in read.regions] == [0, 1, 2]
    assert read.spans() == [(0, 96)]


def test_what_is_not_stored_names_fqn_and_box():
    manifests = stored(sharded((0, 3), (5, 8)))
    with pytest.raises(LayoutError, match=r"\[3:5, 0:8\] of w") as caught:
        plan_reads([Wanted("w", make.rows(0, 8))], manifests)
    assert caught.value.fqn == "w"


def test_unknown_names_and_boxes_outside_are_refused():
    manifests = stored(sharded((0, 8)))
    with pytest.raises(MissingTensorError) as caught:
        plan_reads([Wanted("v", make.rows(0, 8))], manifests)
    assert caught.value.fqn == "v"
    with pytest.raises(ShapeMismatchError):
        plan_reads([Wanted("w", make.rows(0, 9))], manifests)
    with pytest.raises(ShapeMismatchError):
        plan_reads([Wanted("w", Box((0,), (8,)))], manifests)
    with pytest.raises(MissingTensorError):
        plan_reads([Wanted("w", make.rows(0, 8))], [])


def test_nothing_is_read_where_nothing_is_wanted():
    manifests = stored(sharded((0, 8)))
    assert plan_reads([], manifests) == []
    assert plan_reads([Wanted("w", make.rows(3, 3))], manifests) == []


def test_an_alias_stands_for_its_target():
    own = make.layout(make.tensor("w"), aliases={"tied": "w"})
    (read,) = plan_reads([Wanted("tied", Box.full((4, 8)))], stored([own]))
    assert read.regions[0].box == Box.full((4, 8))


def test_several_boxes_of_one_tensor_may_be_wanted():
    manifests = stored(sharded((0, 4), (4, 8)))
    wanted = [Wanted("w", make.rows(0, 1)), Wanted("w", make.rows(6, 8))]
    reads = plan_reads(wanted, manifests)
    assert {region.wanted for read in reads for region in read.regions} == {0, 1}


def test_a_span_runs_from_the_first_to_the_last_element():
    piece = Box((4, 0), (8, 10))
    assert Region(0, Box((5, 2), (7, 4)), piece, 100, 4).span() == (100 + 12 * 4, 100 + 24 * 4)
    assert Region(0, piece, piece, 100, 4).span() == (100, 100 + 160)
    assert Region(0, Box((), ()), Box((), ()), 8, 4).span() == (8, 12)


def test_spans_that_touch_are_merged_and_others_are_not():
    (manifest,) = stored(sharded((0, 8)))
    piece = make.rows(0, 8)
    regions = [Region(0, make.rows(a, b), piece, 0, 4) for a, b in ((6, 7), (0, 1), (1, 2), (0, 2))]
    spans = ChunkRead(manifest.chunks[0], tuple(regions)).spans()
    assert spans == [(0, 64), (192, 224)]


def test_a_few_records_may_suffice_where_nothing_was_stored_twice():
    layouts = sharded((0, 8), (0, 8), (0, 8), kind="buffer")
    unplanned, planned = stored(layouts), stored(layouts, plan=split(layouts, 1 << 20))
    for records in (planned[:1], planned[1:], planned, unplanned, unplanned[:1]):
        assert may_suffice([], records, 3)
    for records in (unplanned[1:2], unplanned[:2], [planned[0], unplanned[1]]):
        assert not may_suffice([], records, 3)


def test_records_that_lack_a_wanted_tensor_do_not_suffice():
    layouts = sharded((0, 8), (0, 8), (0, 8), kind="buffer")
    lowest, *others = stored(layouts, plan=split(layouts, 1 << 20))  # which wrote all of it
    name = lowest.tensors[0].fqn
    wanted, nothing = Wanted(name, make.rows(0, 8)), Wanted(name, make.rows(3, 3))
    assert may_suffice([wanted], [lowest], 3)
    assert not may_suffice([wanted], others, 3)
    assert may_suffice([nothing], others, 3)
