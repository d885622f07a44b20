"""Saves a state into a slot of plain memory and restores from it, without daemon or store."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from ckptd.model.box import Box
from ckptd.model.columns import Piece
from ckptd.model.tensor import Tensor
from ckptd.trainer.capture import Destination
from ckptd.trainer.flatten import flatten
from ckptd.trainer.layouts import layout_of
from ckptd.trainer.rebuild import RestorePlan, Restorer
from ckptd.trainer.terms import Terms
from ckptd.wire.messages import ChunkPlan


class Saved(NamedTuple):
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    values: dict[str, Any]
    bytes_of: dict[str, bytes]


def save(state: dict[str, Any], *, max_elements: int = 50, **options: Any) -> Saved:
    """Capture through a slot, tensors cut into many pieces, with room between the chunks."""
    flat = flatten(state, **options)
    held = layout_of(flat).held
    chunks: list[ChunkPlan] = []
    pieces: list[Piece] = []
    at = 4096
    for i, row in enumerate(held):
        size = row.tensor.bytes
        offset = 0
        for box in row.boxes[0].cut(max_elements):
            length = box.volume * row.tensor.itemsize
            pieces.append(Piece(i, len(chunks), offset, length, box))
            offset += length
        assert offset == size
        chunks.append(ChunkPlan(row.tensor.dtype, at, size))
        at += -(-size // 64) * 64 + 64
    slot = bytearray(at)
    destination = Destination(memoryview(slot), held, chunks, pieces)
    assert destination.copy(flat.leaves) == sum(row.tensor.bytes for row in held)
    found = {
        row.tensor.fqn: bytes(slot[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes])
        for row, chunk in zip(held, chunks, strict=True)
    }
    values = msgspec.json.decode(msgspec.json.encode(flat.values))
    return Saved({h.tensor.fqn: h.tensor for h in held}, dict(flat.aliases), values, found)


def restore(
    saved: Saved, state: dict[str, Any], **options: Any
) -> tuple[dict[str, Any], RestorePlan]:
    """Write every target box by box, then finish."""
    plan = Restorer(state, Terms(**options)).wanted(saved.tensors, saved.aliases, saved.values)
    for i, target in enumerate(plan.targets):
        row = saved.tensors[target.fqn]
        raw = memoryview(saved.bytes_of[target.fqn])
        at = 0
        for box in Box.full(row.shape).cut(7):
            length = box.volume * row.itemsize
            plan.write(i, box, raw[at : at + length])
            at += length
    return plan.finish(saved.values), plan
