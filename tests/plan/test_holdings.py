"""What a rank holds, as arrays: it travels, and equal parts have equal names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.plan import holdings as module
from ckptd.plan.holdings import Holdings, TensorNames, TensorTable, name_boxes, name_holdings
from ckptd.plan.replicas import common_parts
from ckptd.plan.split import split
from tests.plan import layouts as make


@given(st.data(), st.integers(1, 4))
def test_holdings_travel(data, world_size):
    for layout in data.draw(make.layouts(data.draw(make.tensors()), world_size)):
        held = Holdings.of(layout)
        back = Holdings.unpack(held.pack(), TensorTable.unpack(held.table()))
        assert back.digest == held.digest
        assert [t.fqn for t in back.tensors] == [t.fqn for t in held.tensors]
        for one, other in zip(held[2:], back[2:], strict=True):
            assert np.array_equal(one, other)


def test_holdings_of_other_tensors_are_refused():
    held = Holdings.of(make.layout(make.tensor("a"), make.tensor("b")))
    for other in (
        make.layout(make.tensor("a")),
        make.layout(make.tensor("a", (4,)), make.tensor("b")),
    ):
        table = TensorTable.unpack(Holdings.of(other).table())
        with pytest.raises(ValueError, match="holdings"):
            Holdings.unpack(held.pack(), table)


def names(layout):
    held = Holdings.of(layout)
    return name_holdings(held, TensorNames.of(held.tensors)).tolist()


def test_equal_parts_have_equal_names_and_others_have_not():
    top, bottom, full = make.rows(0, 2), make.rows(2, 4), make.rows(0, 4)
    w = make.tensor("w")
    found = [
        names(make.layout((w, boxes)))[0]
        for boxes in ([top], [bottom], [full], [top, bottom], [bottom, top])
    ]
    assert len(set(found)) == 5
    assert all(found)
    assert names(make.layout((w, [top]), make.tensor("a")))[1] == found[0], "wherever it stands"
    assert names(make.layout((make.tensor("v"), [top])))[0] != found[0]


def test_what_needs_no_comparing_has_no_name():
    for layout in (
        make.layout(make.tensor(kind="buffer")),
        make.layout(make.tensor(), is_replicated=True),
        make.layout((make.tensor(), [make.rows(1, 1)])),
        make.layout(make.tensor(shape=(0, 8))),
    ):
        assert names(layout) == [0]


def test_parts_are_common_where_several_ranks_hold_them():
    w, v = make.tensor("w"), make.tensor("v")
    one = Holdings.of(make.layout(w, (v, [make.rows(0, 2)])))
    two = Holdings.of(make.layout(w, (v, [make.rows(2, 4)])))
    assert [list(row) for row in common_parts([(one, 1), (two, 1)])] == [[1], [1]]
    assert [list(row) for row in common_parts([(one, 2), (two, 1)])] == [[0, 1], [1]]
    assert [list(row) for row in common_parts([(one, 1)])] == [[]]
    (first,), (second,) = (row.values() for row in common_parts([(one, 1), (two, 1)]))
    assert first == second
    assert first[0] == "w"


@given(st.data(), st.integers(1, 4))
def test_boxes_of_one_name_are_told_apart_all_the_same(data, world_size):
    """As if every hash were the same: who writes what does not change."""
    layouts = data.draw(make.layouts(data.draw(make.tensors()), world_size))
    expected = split(layouts, 64)
    named = module.name_boxes
    try:
        for clumsy in (
            lambda rows: named(rows) & np.uint64(0),
            lambda rows: named(rows) << np.uint64(62),
        ):
            split.__globals__["name_boxes"] = clumsy
            assert split(layouts, 64) == expected
    finally:
        split.__globals__["name_boxes"] = name_boxes


def test_a_box_of_other_dimensions_is_refused_with_its_rank():
    with pytest.raises(LayoutError, match="rank 3") as caught:
        Holdings.of(make.layout((make.tensor("w"), [Box((0,), (1,))])), 3)
    assert caught.value.fqn == "w"
