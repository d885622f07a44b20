"""What a sample of the state sees, and what it does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.trainer.guard import STRIDE, Copied, Guard

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def pair(fqn: str, tensor: torch.Tensor) -> Copied:
    return Copied(fqn, tensor, torch.empty(tensor.shape, dtype=tensor.dtype))


def copy(pairs: list[Copied]) -> None:
    for each in pairs:
        each.place.copy_(each.source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 100, STRIDE, STRIDE + 1, 5 * STRIDE - 3])
def test_what_nobody_touched_is_unchanged(dtype: torch.dtype, count: int) -> None:
    tensor = torch.randint(0, 2, (count,)).to(dtype)
    pairs = [pair("a", tensor), pair("b", tensor.clone())]
    guard = Guard(pairs)
    copy(pairs)
    assert guard.changed() == []


def test_not_a_number_is_equal_to_itself() -> None:
    pairs = [pair("a", torch.full((100,), float("nan")))]
    guard = Guard(pairs)
    copy(pairs)
    assert guard.changed() == []


@given(count=st.integers(1, 4 * STRIDE), begin=st.integers(0, 4 * STRIDE), dims=st.booleans())
@settings(max_examples=60, deadline=None)
def test_p4_a_change_as_long_as_the_stride_is_always_seen(
    count: int, begin: int, dims: bool
) -> None:
    shape = (count, 2) if dims else (count,)
    tensor = torch.zeros(shape).t() if dims else torch.zeros(shape)
    begin %= count
    pairs = [pair("still", torch.zeros(10)), pair("moved", tensor), pair("int", torch.arange(9))]
    guard = Guard(pairs)
    flat = torch.arange(tensor.numel()).reshape(tensor.shape)
    tensor[(flat >= begin) & (flat < begin + STRIDE)] = 1.0
    is_long = min(begin + STRIDE, tensor.numel()) - begin >= min(STRIDE, tensor.numel())
    copy(pairs)
    assert guard.changed() in ([["moved"]] if is_long else [["moved"], []])


def test_the_offset_differs_from_save_to_save() -> None:
    tensor = torch.zeros(STRIDE)
    offsets = {Guard([pair("a", tensor)])._offset for _ in range(20)}
    assert len(offsets) > 10


def test_one_element_between_the_samples_is_not_seen() -> None:
    """Stated in the documents: this is a net with holes."""
    tensor = torch.zeros(STRIDE)
    pairs = [pair("a", tensor)]
    guard = Guard(pairs)
    tensor[(guard._offset + 1) % STRIDE] = 1.0
    copy(pairs)
    assert guard.changed() == []
