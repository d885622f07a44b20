from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.model.box import Box
from ckptd.model.columns import Columns, Piece

number = st.integers(0, 2**64 - 1)


@st.composite
def tables(draw) -> tuple[list[int], list[Piece]]:
    dims = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    pieces = []
    for _ in range(draw(st.integers(0, 6))):
        tensor = draw(st.integers(0, len(dims) - 1))
        start, stop = (tuple(draw(number) for _ in range(dims[tensor])) for _ in range(2))
        pieces.append(Piece(tensor, draw(number), draw(number), draw(number), Box(start, stop)))
    return dims, pieces


@given(tables())
def test_pieces_come_back_from_columns(table):
    dims, pieces = table
    columns = Columns.pack(iter(pieces))
    assert columns.count == len(pieces)
    assert columns.unpack(dims) == pieces
    copy = msgspec.json.decode(msgspec.json.encode(columns), type=Columns)
    assert copy.unpack(dims) == pieces


ONE = Columns.pack([Piece(0, 0, 0, 4, Box((0, 0), (1, 1)))])
EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("changes", "dims", "message"),
    [
        ({"tensor": EIGHT * 2}, [2], "different lengths"),
        ({"chunk": b""}, [2], "different lengths"),
        ({"length": b"\0" * 7}, [2], "64-bit"),
        ({"tensor": b"\1" + b"\0" * 7}, [2], "not in the table"),
        ({"tensor": b"\xff" * 8}, [2], "not in the table"),
        ({}, [], "not in the table"),
        ({}, [3], "ends early"),
        ({"box": EIGHT}, [2], "ends early"),
        ({}, [1], "too long"),
        ({"box": EIGHT * 5}, [2], "too long"),
    ],
)
def test_columns_that_do_not_fit_are_refused(changes, dims, message):
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(ONE, **changes).unpack(dims)


@given(st.builds(Columns, *[st.binary(max_size=40)] * 5), st.lists(st.integers(0, 3), max_size=3))
def test_any_bytes_are_pieces_or_a_value_error(columns, dims):
    try:
        pieces = columns.unpack(dims)
    except ValueError:
        return
    assert Columns.pack(pieces) == columns


def test_columns_are_little_endian_64_bit_numbers():
    assert Columns.pack([Piece(1, 2, 3, 4, Box((5,), (6,)))]).box == (
        np.array([5, 6], "<u8").tobytes()
    )
