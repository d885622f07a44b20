"""The copy that a training step waits for: from the tensors into a slot of shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ckptd.model.columns import Piece
from ckptd.model.tensor import Held
from ckptd.trainer.flatten import Leaf
from ckptd.trainer.wrappers import DTYPES


class PackedChunk(Protocol):
    """Where a chunk lies: `offset_bytes` from the start of the slot."""

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def offset_bytes(self) -> int: ...  # noqa: D102


class _Source(NamedTuple):
    leaf: int
    cut: tuple[slice, ...] | None  # None: the whole tensor


class Destination:
    """The places in one slot that the pieces of a plan go to. Built once per plan and slot.

    Keeps views of the slot's memory: drop it before the memory is unmapped.
    """

    def __init__(
        self,
        slot: memoryview,
        held: Sequence[Held],
        chunks: Sequence[PackedChunk],
        pieces: Sequence[Piece],
    ) -> None:
        """Lay tensors over `slot`, which must be writable.

        Args:
            slot: the memory of the whole slot.
            held: the layout's rows; ``piece.tensor`` is a place in them.
            chunks: where each chunk lies in the slot.
            pieces: what to copy; each box lies in one that this rank holds.

        Raises:
            ValueError: a piece leaves the slot or what is held.
        """
        self.bytes = 0
        self._places: list[torch.Tensor] = []
        self._sources: list[_Source] = []
        for piece in pieces:
            if not piece.length_bytes:
                continue
            chunk = chunks[piece.chunk]
            self._sources.append(_source(piece, held[piece.tensor]))
            self._places.append(_place(slot, piece, chunk))
            self.bytes += piece.length_bytes

    def copy(self, leaves: Sequence[Leaf]) -> int:
        """Copy the pieces out of the live tensors; returns the number of bytes.

        On return the tensors may be changed. `leaves` are of the layout that this was built for.
        """
        if not self._places:
            return 0
        with torch.no_grad():
            sources = [
                leaves[leaf].tensor if cut is None else leaves[leaf].tensor[cut]
                for leaf, cut in self._sources
            ]
            torch._foreach_copy_(self._places, sources)
        return self.bytes


def _source(piece: Piece, held: Held) -> _Source:
    boxes = held.boxes
    if len(boxes) != 1 or boxes[0].intersect(piece.box) != piece.box:
        raise ValueError(f"{held.tensor.fqn}: box {piece.box} is not held")
    if piece.box == boxes[0]:
        return _Source(piece.tensor, None)
    return _Source(piece.tensor, piece.box.slices(boxes[0].start))


def _place(slot: memoryview, piece: Piece, chunk: PackedChunk) -> torch.Tensor:
    dtype = DTYPES[chunk.dtype]
    offset = chunk.offset_bytes + piece.offset_bytes
    if piece.box.volume * dtype.itemsize != piece.length_bytes:
        raise ValueError(f"a piece of {piece.length_bytes} bytes for box {piece.box} of {dtype}")
    view = torch.frombuffer(slot, dtype=dtype, count=piece.box.volume, offset=offset)
    return view.reshape(piece.box.shape)
