"""The pieces that a rank wrote, as columns of numbers.

A checkpoint has many thousands of pieces; columns of little-endian 64-bit numbers cost eight bytes
a field before compression, decode without a loop, and are checked as arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.model.box import Box

_U64 = np.dtype("<u8")


class Piece(NamedTuple):
    """One box of one tensor, stored as consecutive bytes of one chunk.

    `tensor` and `chunk` are places in the tables of the record that holds the piece; `offset_bytes`
    counts from the chunk's first raw byte. The elements lie in row-major order of the box.
    """

    tensor: int
    chunk: int
    offset_bytes: int
    length_bytes: int
    box: Box


class Columns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pieces by column. `box` holds, piece after piece, the starts and then the stops."""

    tensor: bytes = b""
    chunk: bytes = b""
    offset: bytes = b""
    length: bytes = b""
    box: bytes = b""

    @classmethod
    def pack(cls, pieces: Iterable[Piece]) -> Columns:
        """Put pieces into columns, keeping their order."""
        rows = list(pieces)
        return cls(
            tensor=_pack([p.tensor for p in rows]),
            chunk=_pack([p.chunk for p in rows]),
            offset=_pack([p.offset_bytes for p in rows]),
            length=_pack([p.length_bytes for p in rows]),
            box=_pack([n for p in rows for n in (*p.box.start, *p.box.stop)]),
        )

    @property
    def count(self) -> int:
        """The number of pieces."""
        return len(self.tensor) // 8

    def unpack(self, dims: list[int]) -> list[Piece]:
        """Return the pieces; `dims` is the number of dimensions of each tensor of the table.

        Raises:
            ValueError: if the columns do not fit each other or the table.
        """
        tensor, chunk, offset, length = (
            _unpack(column) for column in (self.tensor, self.chunk, self.offset, self.length)
        )
        numbers = _unpack(self.box).tolist()
        if not len(tensor) == len(chunk) == len(offset) == len(length):
            raise ValueError("columns of different lengths")
        if len(tensor) and int(tensor.max()) >= len(dims):
            raise ValueError("a piece of a tensor that is not in the table")
        pieces = []
        at = 0
        for t, c, o, n in zip(
            tensor.tolist(), chunk.tolist(), offset.tolist(), length.tolist(), strict=True
        ):
            d = dims[t]
            box = Box(tuple(numbers[at : at + d]), tuple(numbers[at + d : at + 2 * d]))
            at += 2 * d
            if len(box.stop) != d:
                raise ValueError("the box column ends early")
            pieces.append(Piece(t, c, o, n, box))
        if at != len(numbers):
            raise ValueError("the box column is too long")
        return pieces


def _pack(numbers: list[int]) -> bytes:
    return np.array(numbers, dtype=_U64).tobytes()


def _unpack(column: bytes) -> npt.NDArray[Any]:
    if len(column) % 8:
        raise ValueError("a column that is not a row of 64-bit numbers")
    return np.frombuffer(column, dtype=_U64)
