"""Pieces against the tables that they refer to: all at once, since there are many thousands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckptd.model import dtypes
from ckptd.model.columns import Columns
from ckptd.model.tensor import Tensor

Ints = npt.NDArray[np.int64]
Span = tuple[str, int]
"""Element type and raw length of a chunk."""

_MOST = 1 << 50  # more than any number that is meant


class PieceCheck:
    """Checks pieces of one table of tensors, which has been checked itself."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._item = np.array([t.itemsize for t in tensors], np.int64)
        self._dtype = np.array([dtypes.BY_NAME[t.dtype].code for t in tensors], np.int64)
        self._dims = np.array([len(t.shape) for t in tensors], np.int64)
        self._shapes: dict[int, Ints] = {}
        for d in np.unique(self._dims).tolist():
            self._shapes[d] = np.zeros((self._count, d), np.int64)
            for place in np.flatnonzero(self._dims == d).tolist():
                self._shapes[d][place] = tensors[place].shape

    def are_in_order(self, columns: Columns, chunks: Sequence[Span]) -> bool:
        """Tell whether each piece is a box of its tensor, of that length, and lies in its chunk.

        False says only that something is wrong; `Columns.unpack` finds what.
        """
        parts = [
            _numbers(column)
            for column in (
                columns.tensor, columns.chunk, columns.offset, columns.length, columns.box
            )
        ]  # fmt: skip
        if any(part is None for part in parts):
            return False
        tensor, chunk, offset, length, boxes = (part for part in parts if part is not None)
        if not len(tensor) == len(chunk) == len(offset) == len(length):
            return False
        if not len(tensor):
            return not len(boxes)
        if tensor.max() >= self._count or chunk.max() >= len(chunks):
            return False
        elements = self._elements(tensor, boxes)
        if elements is None:
            return False
        item = self._item[tensor]
        dtype = np.array([dtypes.BY_NAME[name].code for name, _ in chunks], np.int64)[chunk]
        raw_bytes = np.array([count for _, count in chunks], np.int64)[chunk]
        is_right = (
            (length == elements * item)
            & (dtype == self._dtype[tensor])
            & (offset + length <= raw_bytes)
            & (offset % item == 0)
        )
        return bool(is_right.all())

    def _elements(self, tensor: Ints, boxes: Ints) -> Ints | None:
        """Return the number of elements of each box; None if one is no box of its tensor."""
        dims = self._dims[tensor]
        ends = np.cumsum(2 * dims)
        if ends[-1] != len(boxes):
            return None
        elements = np.ones(len(tensor), np.int64)
        for d in np.unique(dims).tolist():
            rows = np.flatnonzero(dims == d)
            box = boxes[(ends[rows] - 2 * d)[:, None] + np.arange(2 * d)]
            start, stop = box[:, :d], box[:, d:]
            if not ((start <= stop) & (stop <= self._shapes[d][tensor[rows]])).all():
                return None
            elements[rows] = np.prod(stop - start, axis=1, dtype=np.int64)
        return elements


def _numbers(column: bytes) -> Ints | None:
    """Return a column as numbers; None if it is none, or has one that nobody means."""
    if len(column) % 8:
        return None
    found = np.frombuffer(column, "<u8")
    return None if len(found) and int(found.max()) >= _MOST else found.astype(np.int64)
