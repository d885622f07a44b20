"""How what a rank writes lies in a slot: which box in which chunk, at which byte."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ckptd.model.box import Box
from ckptd.model.columns import Piece
from ckptd.model.tensor import Layout, Tensor
from ckptd.plan.split import Share
from ckptd.units import MIB

PAGE_BYTES = 4096
OWN_CHUNK_BYTES = MIB  # a box this large has chunks of its own; smaller ones share


class ChunkSpan(NamedTuple):
    """A chunk as it lies in a slot: `offset_bytes` from the start of the slot, header included."""

    dtype: str
    offset_bytes: int
    raw_bytes: int


class Packed(msgspec.Struct, frozen=True):
    """A share, laid out. `pieces` refer to `tensors` and `chunks` by place.

    `tensors` are all that the rank holds, whether it writes any of it or not. Chunks start on
    pages; between them lie bytes that mean nothing. `slot_bytes` counts the header too.
    """

    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    chunks: tuple[ChunkSpan, ...]
    pieces: tuple[Piece, ...]
    slot_bytes: int


def pack(layout: Layout, share: Share, *, chunk_bytes: int, header_bytes: int) -> Packed:
    """Lay out a share of a layout behind a header of `header_bytes`.

    Equal shares of equal tensors are laid out equally on every rank, so that ranks that write the
    same contents make the same chunks.
    """
    chunks = _Chunks(chunk_bytes)
    pieces = []
    for place, whole in share:
        tensor = layout.held[place].tensor
        for box in _cut(whole, tensor.itemsize, chunk_bytes):
            size = box.volume * tensor.itemsize
            chunk, offset_bytes = chunks.place(tensor, size)
            pieces.append(Piece(place, chunk, offset_bytes, size, box))
    spans = []
    at = _page_up(header_bytes)
    for dtype, raw_bytes in chunks.sizes:
        spans.append(ChunkSpan(dtype, at, raw_bytes))
        at = _page_up(at + raw_bytes)
    return Packed(
        tensors=tuple(held.tensor for held in layout.held),
        aliases=dict(layout.aliases),
        chunks=tuple(spans),
        pieces=tuple(pieces),
        slot_bytes=at,
    )


class _Chunks:
    """The chunks so far. Of each dtype two are open for small pieces.

    Frozen parameters are apart from what changes at each step (trainable parameters, optimizer
    tensors and buffers), so that their chunks can be borrowed from the checkpoint before.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self.sizes: list[tuple[str, int]] = []
        self._chunk_bytes = chunk_bytes
        self._open: dict[tuple[str, bool], int] = {}

    def place(self, tensor: Tensor, size: int) -> tuple[int, int]:
        """Find room for a piece of `size` bytes; return the chunk and the offset in it."""
        if size >= min(OWN_CHUNK_BYTES, self._chunk_bytes):
            self.sizes.append((tensor.dtype, size))
            return len(self.sizes) - 1, 0
        is_frozen = tensor.kind == "parameter" and not tensor.requires_grad
        kind = (tensor.dtype, is_frozen)
        chunk = self._open.get(kind)
        if chunk is None or self.sizes[chunk][1] + size > self._chunk_bytes:
            chunk = self._open[kind] = len(self.sizes)
            self.sizes.append((tensor.dtype, 0))
        offset_bytes = self.sizes[chunk][1]
        self.sizes[chunk] = (tensor.dtype, offset_bytes + size)
        return chunk, offset_bytes


def _cut(box: Box, itemsize: int, chunk_bytes: int) -> list[Box]:
    """Cut where a box is larger than a chunk, into parts about equally large."""
    if not box.volume:
        return []
    most = max(1, chunk_bytes // itemsize)
    if box.volume <= most:
        return [box]
    # The same dimension is cut for any smaller number of elements that is still whole rows of it.
    inner = 1
    for extent in reversed(box.shape):
        if inner * extent > most:
            cuts = -(-extent // (most // inner))
            return box.cut(-(-extent // cuts) * inner)
        inner *= extent
    raise AssertionError("unreachable: the volume is larger than `most`")


def _page_up(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES
