"""What a rank holds of a tensor that is spread over ranks, as boxes and the memory of each.

The chunk lists of DTensors are torch's protocol for checkpoints (``__create_chunk_list__``). They
give one offset and one size, which is not all of the truth for the strided shards of FSDP2 with tensor
parallelism: whether the rows of such a shard follow each other is computed here from its placements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ckptd.errors import UnsupportedValueError
from ckptd.model.box import Box
from ckptd.trainer.fsdp1 import FlatPiece

_DTENSOR = "torch.distributed.tensor"


class Shards(NamedTuple):
    """The part of a tensor that this rank holds: `parts[i]` is the box `boxes[i]` of the whole.

    Empty boxes are left out. `is_replicated`: every other rank with the same box has the same
    contents. `witness` is what the rest follows from; see `is_of`.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    parts: tuple[torch.Tensor, ...]
    is_replicated: bool
    witness: tuple[Any, ...]

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Tell whether `shards_of` would say the same of this tensor."""
        if not is_dtensor(tensor) or not self.witness:
            return False
        local, mesh, placements = self.witness
        live: Any = tensor
        is_same: bool = live.device_mesh is mesh and live.placements == placements
        return is_same and local_of(tensor) is local

    def about(self) -> tuple[tuple[Box, ...], bool]:
        """Return what of this belongs to the layout."""
        return self.boxes, self.is_replicated


class Split(NamedTuple):
    """One dimension cut into `parts`, of which this rank has the one at `place`.

    With a `factor` it was cut into so many before, and each of these into `parts`.
    """

    parts: int
    place: int
    factor: int | None = None


def is_dtensor(tensor: object) -> bool:
    """Tell whether this is a DTensor; a process that has none never imports their module."""
    kind = getattr(sys.modules.get(_DTENSOR), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def is_sharded(tensor: object) -> bool:
    """Tell whether this is something that may be spread over ranks, for `shards_of`."""
    return isinstance(tensor, FlatPiece) or is_dtensor(tensor)


def meshes_of(tensors: Iterable[object]) -> list[Any]:
    """Return the meshes that DTensors among these lie on, each once."""
    kind = getattr(sys.modules.get(_DTENSOR), "DTensor", None)
    if kind is None:
        return []
    found: dict[int, Any] = {}
    for tensor in tensors:
        if isinstance(tensor, kind):
            found.setdefault(id(tensor.device_mesh), tensor.device_mesh)
    return list(found.values())


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a DTensor on this rank, the same object each time."""
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def empty_like_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor with memory for one that lies on the meta device."""
    meta: Any = tensor
    device, local = meta.device_mesh.device_type, local_of(tensor)
    made: torch.Tensor = type(meta).from_local(
        torch.empty_like(local, device=device), meta.device_mesh, meta.placements, run_check=False,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip
    return made


def shards_of(fqn: str, tensor: torch.Tensor | FlatPiece) -> Shards:
    """Return what this rank holds of a DTensor, or of a parameter in a flat one.

    Raises:
        UnsupportedValueError: its placements name no boxes, or not those that its memory has.
    """
    if isinstance(tensor, FlatPiece):
        return Shards(tuple(tensor.shape), tensor.boxes, tensor.parts, False, ())
    held: Any = tensor
    mesh, placements, local = held.device_mesh, held.placements, local_of(tensor)
    witness = (local, mesh, placements)
    shape = tuple(tensor.shape)
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedValueError(
            f"{fqn}: a DTensor with a Partial placement is a sum that is not added up; redistribute it",
            fqn=fqn,
        )
    box = _box(fqn, held) if mesh.get_coordinate() is not None else None
    if box is None or not box.volume:
        return Shards(shape, (), (), is_replicated=True, witness=witness)
    if tuple(local.shape) != box.shape:
        raise UnsupportedValueError(
            f"{fqn}: placements {placements} on {shape} give this rank a shard of {box.shape}, but it"
            f" holds {tuple(local.shape)}",
            fqn=fqn,
        )
    is_of_all = mesh.size() == dist.get_world_size()
    return Shards(shape, (box,), (local,), is_of_all, witness)


def _box(fqn: str, tensor: Any) -> Box:
    chunks = tensor.__create_chunk_list__()
    if len(chunks) != 1:
        raise UnsupportedValueError(f"{fqn}: a DTensor of {len(chunks)} chunks", fqn=fqn)
    start = tuple(chunks[0].offsets)
    box = Box(start, tuple(a + n for a, n in zip(start, chunks[0].sizes, strict=True)))
    if any(is_strided(placement) for placement in tensor.placements):
        _check_rows(fqn, tensor, box)
    return box


def is_strided(placement: object) -> bool:
    """Tell whether this is the placement of FSDP2 over tensor parallelism, which has no public name."""
    return hasattr(placement, "split_factor") and hasattr(placement, "dim")


def _check_rows(fqn: str, tensor: Any, box: Box) -> None:
    """Refuse a strided shard whose rows do not follow each other, or are not those of its chunk."""
    coordinate, sizes = tensor.device_mesh.get_coordinate(), tuple(tensor.device_mesh.shape)
    splits: dict[int, list[Split]] = {}
    for parts, place, placement in zip(sizes, coordinate, tensor.placements, strict=True):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            factor = int(placement.split_factor) if is_strided(placement) else None
            splits.setdefault(dim, []).append(Split(parts, place, factor))
    for dim, cuts in splits.items():
        rows = rows_of(tensor.shape[dim], tuple(cuts))
        first, last = box.start[dim], box.stop[dim]
        if not is_run(rows) or rows.tolist() != rows_inside(tensor.shape[dim], cuts).tolist():
            raise UnsupportedValueError(
                f"{fqn}: the rows of a strided shard ({tensor.placements} of {tuple(tensor.shape)}) do"
                f" not follow each other, or not as FSDP2 cuts them; make dimension {dim} divisible by"
                " the mesh",
                fqn=fqn,
            )
        if len(rows) != last - first or (len(rows) and rows[0] != first):
            raise UnsupportedValueError(
                f"{fqn}: torch puts its strided shard at rows {first} to {last}, its placements at"
                f" {rows.tolist()[:1]} and {len(rows)} of them",
                fqn=fqn,
            )


@lru_cache(maxsize=4096)
def rows_of(extent: int, splits: Sequence[Split]) -> npt.NDArray[np.int64]:
    """Return the indices of one dimension that a rank holds, as torch cuts it, from left to right.

    Parts are as ``torch.chunk`` makes them: the first ones are equal, the last ones may be empty.
    """
    rows = np.arange(extent)
    for parts, place, factor in splits:
        first = [rows] if factor is None else _chunks(rows, factor)
        rows = np.concatenate([_chunks(part, parts)[place] for part in first])
    return rows


def rows_inside(extent: int, splits: Sequence[Split]) -> npt.NDArray[np.int64]:
    """Return the same as FSDP2 really cuts: strided shards last, inside of what the others left.

    Where extents are uneven the two may differ by a row (7 rows on 3 times 2 ranks, say).
    """
    plain = [split for split in splits if split.factor is None]
    strided = [split._replace(factor=None) for split in splits if split.factor is not None]
    return rows_of(extent, (*plain, *strided))


def is_run(rows: npt.NDArray[np.int64]) -> bool:
    """Tell whether rows follow each other."""
    return not len(rows) or int(rows[-1] - rows[0]) + 1 == len(rows)


def _chunks(rows: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    size = -(-len(rows) // count)
    return [rows[i * size : (i + 1) * size] for i in range(count)]
