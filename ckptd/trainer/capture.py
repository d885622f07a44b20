"""The copy that a training step waits for: from the tensors into a slot of shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ckptd.model.columns import Piece
from ckptd.model.tensor import Held
from ckptd.trainer.copies import Copies, Deferred, Part, Source
from ckptd.trainer.flatten import Leaf
from ckptd.trainer.wrappers import DTYPES


class PackedChunk(Protocol):
    """Where a chunk lies: `offset_bytes` from the start of the slot."""

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def offset_bytes(self) -> int: ...  # noqa: D102


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
        self._parts: list[Part] = []
        for piece in pieces:
            if not piece.length_bytes:
                continue
            chunk = chunks[piece.chunk]
            if chunk.dtype != held[piece.tensor].tensor.dtype:
                raise ValueError(f"{held[piece.tensor].tensor.fqn}: in a chunk of {chunk.dtype}")
            start = chunk.offset_bytes + piece.offset_bytes
            self._parts.append(
                Part(_source(piece, held[piece.tensor]), _place(slot, piece, chunk), start)
            )
            self.bytes += piece.length_bytes
        self._slot = slot
        self._copies: Copies | None = None

    def copy(self, leaves: Sequence[Leaf]) -> int:
        """Copy the pieces out of the live tensors; returns the number of bytes.

        On return the tensors may be changed. `leaves` are of the layout that this was built for.
        """
        if self._parts:
            with torch.no_grad():
                self._bind(leaves, defers=False).run()
        return self.bytes

    def begin(self, leaves: Sequence[Leaf]) -> Deferred | None:
        """Copy what cannot wait; returns the other copies, None if there are none.

        Parameters and optimizer tensors may be changed after `Deferred.wait`, all else at once.
        """
        if not self._parts:
            return None
        with torch.no_grad():
            return self._bind(leaves, defers=True).begin()

    def _bind(self, leaves: Sequence[Leaf], *, defers: bool) -> Copies:
        bound = self._copies
        if bound is None or bound.defers is not defers or not bound.holds(leaves):
            bound = self._copies = Copies(self._slot, self._parts, leaves, defers=defers)
        return bound


def _source(piece: Piece, held: Held) -> Source:
    for part, box in enumerate(held.boxes):
        if piece.box == box:
            return Source(piece.tensor, part, None)
        if box.intersect(piece.box) == piece.box:
            return Source(piece.tensor, part, piece.box.slices(box.start))
    raise ValueError(f"{held.tensor.fqn}: box {piece.box} is not held")


def _place(slot: memoryview, piece: Piece, chunk: PackedChunk) -> torch.Tensor:
    dtype = DTYPES[chunk.dtype]
    offset = chunk.offset_bytes + piece.offset_bytes
    if piece.box.volume * dtype.itemsize != piece.length_bytes:
        raise ValueError(f"a piece of {piece.length_bytes} bytes for box {piece.box} of {dtype}")
    view = torch.frombuffer(slot, dtype=dtype, count=piece.box.volume, offset=offset)
    return view.reshape(piece.box.shape)
