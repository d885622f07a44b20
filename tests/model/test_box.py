from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.model.box import Box

SIDE = 5


@st.composite
def box(draw, dims: int) -> Box:
    spans = [sorted(draw(st.tuples(*[st.integers(0, SIDE)] * 2))) for _ in range(dims)]
    return Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))


pairs = st.integers(0, 3).flatmap(lambda dims: st.tuples(box(dims), box(dims)))


def mask(*boxes: Box) -> np.ndarray:
    """How often each element is held."""
    dims = len(boxes[0].start) if boxes else 0
    counts = np.zeros((SIDE,) * dims, int)
    for each in boxes:
        counts[each.slices((0,) * dims)] += 1
    return counts


@given(pairs)
def test_intersection_is_what_both_hold(pair):
    one, two = pair
    common = one.intersect(two)
    both = mask(one) * mask(two)
    assert both.sum() == (common.volume if common else 0)
    if common:
        assert (mask(common) == both).all()


@given(pairs)
def test_subtraction_leaves_each_other_element_once(pair):
    one, two = pair
    rest = one.subtract(two)
    expected = mask(one) * (1 - mask(two))
    assert (sum(map(mask, rest), 0 * mask(one)) == expected).all()


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 60), st.data())
def test_cuts_are_runs_of_row_major_order_and_small_enough(shape, most, data):
    origin = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    whole = Box(origin, tuple(o + n for o, n in zip(origin, shape, strict=True)))
    flat = np.arange(math.prod(shape)).reshape(shape)
    elements = [flat[part.slices(origin)].ravel().tolist() for part in whole.cut(most)]
    assert [n for part in elements for n in part] == list(range(math.prod(shape)))
    assert all(len(part) <= most for part in elements)


def test_a_scalar_has_one_element_and_meets_itself():
    scalar = Box.full(())
    assert scalar.volume == 1
    assert scalar.is_within(())
    assert scalar.intersect(scalar) == scalar
    assert scalar.subtract(scalar) == []
    assert scalar.cut(1) == [scalar]
    assert str(scalar) == "[]"


@pytest.mark.parametrize(
    "bad",
    [
        Box((-1,), (2,)),
        Box((0,), (5,)),
        Box((3,), (2,)),
        Box((0,), (1, 2)),
        Box((0, 0), (1, 1)),
        Box((), ()),
    ],
)
def test_boxes_that_leave_the_shape_are_not_within_it(bad):
    assert not bad.is_within((4,))


def test_text_and_json():
    written = Box((0, 4), (4, 8))
    assert str(written) == "[0:4, 4:8]"
    assert msgspec.json.decode(msgspec.json.encode(written), type=Box) == written
