"""Bytes of a box put into a tensor in parts: where that is possible, and that they get there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.model.box import Box
from ckptd.trainer.targets import put_of, tensor_over, write_box


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=4)))
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    return shape, Box(start, stop)


@given(case=cases(), seed=st.integers(0, 1000), dtype=st.sampled_from(["f4", "i8", "u1"]))
@settings(max_examples=200, deadline=None)
def test_parts_add_up_to_what_is_written_at_once(case, seed, dtype) -> None:
    shape, box = case
    dice = np.random.default_rng(seed)
    source = dice.integers(0, 200, box.shape).astype(dtype)
    whole, parts = (torch.from_numpy(np.full(shape, 7, dtype)) for _ in range(2))
    write_box(whole, box, source.tobytes())
    put = put_of(parts, box)
    one_piece = np.zeros(shape, np.int64)
    one_piece[box.slices((0,) * len(shape))] = 1
    places = np.flatnonzero(one_piece.reshape(-1))
    assert (put is not None) == (places[-1] - places[0] + 1 == len(places))
    if put is None:
        return
    raw = np.frombuffer(source.tobytes(), np.uint8)
    cuts = sorted(
        {0, len(raw), *(int(c) * source.itemsize for c in dice.integers(0, source.size, 3))}
    )
    for begin, end in reversed(list(itertools.pairwise(cuts))):
        put(begin, raw[begin:end])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_types_that_numpy_has_not_are_put_too(dtype: torch.dtype) -> None:
    tensor = torch.zeros(6, 2, dtype=dtype)
    source = torch.randint(0, 2, (3, 2)).to(dtype)
    put = put_of(tensor, Box((2, 0), (5, 2)))
    assert put is not None
    put(0, source.view(torch.uint8).numpy().reshape(-1))
    assert torch.equal(tensor[2:5].view(torch.uint8), source.view(torch.uint8))
    assert not tensor[:2].view(torch.uint8).any()


def test_memory_in_another_order_is_written_at_once() -> None:
    box = Box.full((4, 6))
    for tensor in (torch.zeros(6, 4).t(), torch.zeros(4, 12)[:, ::2]):
        assert put_of(tensor, box) is None
    lazy = torch.zeros(4, 6, dtype=torch.complex64).conj()
    assert put_of(lazy, box) is None


def test_a_parameter_is_written_without_a_graph() -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    put = put_of(weight, Box.full((8,)))
    assert put is not None
    put(0, np.frombuffer(np.ones(8, np.float32).tobytes(), np.uint8))
    assert torch.equal(weight.detach(), torch.ones(8))
    assert weight.grad_fn is None


def test_a_box_outside_of_the_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        put_of(torch.zeros(4), Box((2,), (5,)))


def test_bytes_that_may_only_be_read_become_a_tensor_without_a_warning() -> None:
    """As those of a daemon's memory on their way to a GPU; a warning is an error here."""
    raw = np.frombuffer(b"snapshot", np.uint8)
    assert not raw.flags.writeable
    there = torch.zeros(8, dtype=torch.uint8)
    there.copy_(tensor_over(raw))
    assert bytes(there.tolist()) == b"snapshot"
    assert bytes(tensor_over(raw[2:5]).tolist()) == b"aps"
