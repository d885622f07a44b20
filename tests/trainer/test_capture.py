from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptd.model.box import Box
from ckptd.model.columns import Piece
from ckptd.model.tensor import Held, Tensor
from ckptd.plan.pack import ChunkSpan
from ckptd.trainer.capture import Destination
from ckptd.trainer.flatten import Leaf, flatten
from ckptd.trainer.layouts import layout_of
from ckptd.wire.messages import ChunkPlan
from tests.fakes.trainer_bytes import save


def raw_of(tensor: torch.Tensor) -> bytes:
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(whole.view(torch.uint8).tolist())


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_copied_bit_for_bit(dtype) -> None:
    raw = torch.randint(
        0, 2 if dtype is torch.bool else 256, (24 * dtype.itemsize,), dtype=torch.uint8
    )
    tensor = raw.view(dtype).reshape(2, 3, 4)
    state = {"x": tensor, "t": tensor.transpose(0, 2), "scalar": tensor[0, 0, 0]}
    found = save(state, max_elements=5).bytes_of
    for name, source in state.items():
        assert found[name] == raw_of(source), name


def test_lazy_conjugates_and_negatives_are_resolved() -> None:
    z = torch.complex(torch.arange(6.0), torch.arange(6.0) - 3).reshape(2, 3)
    state = {"conj": z.conj(), "neg": z.conj().imag, "both": z.t().conj()}
    found = save(state, max_elements=4).bytes_of
    for name, source in state.items():
        assert found[name] == raw_of(source)


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(1, 9), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_any_tensor_add_up_to_it(shape, most, random) -> None:
    tensor = torch.randn(shape)
    dims = list(range(len(shape)))
    random.shuffle(dims)
    tensor = tensor.permute(dims)
    assert save({"x": tensor}, max_elements=most).bytes_of["x"] == raw_of(tensor)


def test_parameters_that_require_grad_are_copied_without_a_graph() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    found = save({"m": model})
    assert found.bytes_of["m.weight"] == raw_of(before)
    assert model.weight.grad_fn is None


def test_p4_what_changes_after_copy_is_not_in_the_slot() -> None:
    tensor = torch.zeros(1000)
    found = save({"x": tensor}).bytes_of["x"]
    tensor.fill_(1)
    assert found == bytes(4000)


def test_a_destination_serves_many_saves_and_leaves_the_rest_of_the_slot_alone() -> None:
    tensor = torch.zeros(4)
    flat = flatten({"x": tensor})
    slot = bytearray(b"\xaa" * 64)
    pieces = [Piece(0, 0, 4, 8, Box((1,), (3,)))]
    destination = Destination(
        memoryview(slot), layout_of(flat).held, [ChunkPlan("float32", 16, 16)], pieces
    )
    for value in (1.0, 2.0):
        tensor.fill_(value)
        assert destination.copy(flat.leaves) == 8
        assert slot == b"\xaa" * 20 + raw_of(torch.full((2,), value)) + b"\xaa" * 36


def test_a_tensor_of_another_dtype_is_never_cast_into_the_slot() -> None:
    tensor = torch.ones(4)
    flat = flatten({"x": tensor})
    held = layout_of(flat).held
    pieces = [Piece(0, 0, 0, 16, Box((0,), (4,)))]
    with pytest.raises(ValueError, match="int32"):
        Destination(memoryview(bytearray(64)), held, [ChunkPlan("int32", 0, 16)], pieces)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, 0, 0, 20, Box((0,), (5,))),
        Piece(0, 0, 0, 12, Box((0,), (4,))),
        Piece(0, 0, 8192, 16, Box((0,), (4,))),
    ],
)
def test_a_piece_outside_of_tensor_or_slot_is_refused(piece) -> None:
    held = layout_of(flatten({"x": torch.ones(4)})).held
    with pytest.raises(ValueError):  # noqa: PT011 - torch words the last of them
        Destination(memoryview(bytearray(64)), held, [ChunkPlan("float32", 0, 16)], [piece])


def test_an_empty_plan_copies_nothing() -> None:
    assert Destination(memoryview(bytearray(8)), [], [], []).copy([]) == 0
    assert save({"x": torch.zeros(3, 0)}).bytes_of == {"x": b""}


def test_p4_memory_given_to_a_tensor_by_data_is_what_is_copied_next() -> None:
    """Views kept from the save before must not copy the memory that a tensor had then."""
    small = [torch.zeros(8), torch.zeros(8)]
    large = torch.zeros(4, 200_000)
    leaves = [
        Leaf(name, tensor, "parameter", True)
        for name, tensor in zip("abc", [*small, large], strict=True)
    ]
    held = [
        Held(Tensor(x.fqn, "float32", tuple(x.tensor.shape), "parameter", True, "cpu"),
             (Box.full(tuple(x.tensor.shape)),))
        for x in leaves
    ]  # fmt: skip
    half = Box((0, 0), (2, 200_000))
    pieces = [
        Piece(0, 0, 0, 32, Box.full((8,))),
        Piece(1, 0, 32, 32, Box.full((8,))),
        Piece(2, 1, 0, 1_600_000, half),
    ]
    slot = memoryview(bytearray(64 + 1_600_000))
    chunks = [ChunkSpan("float32", 0, 64), ChunkSpan("float32", 64, 1_600_000)]
    destination = Destination(slot, held, chunks, pieces)
    for value in (1.0, 2.0, 3.0):
        for tensor in (*small, large):
            tensor.data = torch.full(tuple(tensor.shape), value)
        destination.copy(leaves)
        assert set(np.frombuffer(slot, np.float32).tolist()) == {value}
    large.data = torch.arange(800_000.0).reshape(200_000, 4).T  # other strides, other memory
    small[0].data = torch.arange(8.0)
    destination.copy(leaves)
    found = np.frombuffer(slot, np.float32)
    assert found[:8].tolist() == list(range(8))
    assert (found[16:].reshape(2, -1) == large[:2].numpy()).all()
