"""What to read: which bytes of which chunks hold the boxes that someone wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ckptd.errors import LayoutError, MissingTensorError, ShapeMismatchError
from ckptd.model.box import Box
from ckptd.model.keys import ChunkId
from ckptd.model.manifest import Chunk, RankManifest
from ckptd.model.tensor import REPLICATED_KINDS
from ckptd.plan.rows import Rows, numbers, piece_rows
from ckptd.plan.table import Ints, Table, merge_aliases, merge_tensors


class Wanted(NamedTuple):
    """A box of a tensor that someone wants to have, in global indices."""

    fqn: str
    box: Box


class Region(NamedTuple):
    """A part of something wanted, and where it lies in a chunk.

    `wanted` is the place in the list of what is wanted, `box` the part in global indices.
    `piece_box` is stored in row-major order from byte `offset_bytes` of the chunk on.
    """

    wanted: int
    box: Box
    piece_box: Box
    offset_bytes: int
    itemsize: int

    def span(self) -> tuple[int, int]:
        """Return the raw bytes of the chunk from the first to the last element, half open."""
        first = last = 0
        rows = zip(
            self.piece_box.shape, self.piece_box.start, self.box.start, self.box.stop, strict=True
        )
        for extent, origin, start, stop in rows:
            first = first * extent + start - origin
            last = last * extent + stop - 1 - origin
        return (
            self.offset_bytes + first * self.itemsize,
            self.offset_bytes + (last + 1) * self.itemsize,
        )


class ChunkRead(NamedTuple):
    """A chunk to read, and what of it is wanted."""

    chunk: Chunk
    regions: tuple[Region, ...]

    def spans(self) -> list[tuple[int, int]]:
        """Return the raw bytes that the regions need: half open, sorted, apart from each other."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(region.span() for region in self.regions):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return merged


def plan_reads(wanted: Sequence[Wanted], manifests: Sequence[RankManifest]) -> list[ChunkRead]:
    """Cover every wanted box from what is stored, no element twice.

    Where several ranks stored the same elements, buffers and other tensors come from the lowest
    rank, and parameters and optimizer tensors from the manifest that was given first: the caller
    puts its own first. A name that is an alias in the checkpoint stands for its target.

    Raises:
        MissingTensorError: no manifest has the tensor.
        ShapeMismatchError: a wanted box lies outside of the stored tensor.
        LayoutError: the manifests do not hold all of a wanted box, or disagree about a tensor.
    """
    table = merge_tensors(manifests)
    places = _resolve(wanted, table, merge_aliases(manifests, table.tensors))
    sources = _Sources(manifests, table, wanted, places)
    reads: dict[ChunkId, tuple[Chunk, list[Region]]] = {}
    for number, (want, place) in enumerate(zip(wanted, places, strict=True)):
        itemsize = table.tensors[place].itemsize
        for chunk, offset_bytes, piece_box, parts in sources.cover(want, place):
            regions = reads.setdefault(chunk.id, (chunk, []))[1]
            regions.extend(Region(number, box, piece_box, offset_bytes, itemsize) for box in parts)
    return [ChunkRead(chunk, tuple(regions)) for chunk, regions in reads.values()]


def may_suffice(
    wanted: Sequence[Wanted], manifests: Sequence[RankManifest], world_size: int
) -> bool:
    """Tell whether these may be planned with, though other ranks stored something too.

    Ranks with a plan stored nothing twice, so what these hold nobody else does. Where a rank wrote
    without one, buffers must come from the lowest that stored them, which only all records show.
    False also where nothing of some wanted tensor is among what these stored.
    """
    if len(manifests) == world_size:
        return True
    if any(m.plan is None for m in manifests) and [m.rank for m in manifests] != [0]:
        return False
    stored: set[str] = set()
    for manifest in manifests:
        places = np.unique(numbers(manifest.pieces.tensor)).tolist()
        stored.update(manifest.tensors[place].fqn for place in places)
    stored |= {alias for m in manifests for alias, name in m.aliases.items() if name in stored}
    return all(fqn in stored or not box.volume for fqn, box in wanted)


def _resolve(wanted: Sequence[Wanted], table: Table, aliases: dict[str, str]) -> list[int]:
    """Return the place in the table of each wanted tensor."""
    known = {tensor.fqn: place for place, tensor in enumerate(table.tensors)}
    places = []
    for fqn, box in wanted:
        place = known.get(aliases.get(fqn, fqn))
        if place is None:
            raise MissingTensorError(f"the checkpoint does not hold {fqn}", fqn=fqn)
        shape = table.tensors[place].shape
        if not box.is_within(shape):
            message = f"{fqn}: box {box} is wanted of a tensor of shape {shape}"
            raise ShapeMismatchError(message, fqn=fqn)
        places.append(place)
    return places


class _Sources:
    """The pieces that may hold something wanted, by tensor, the preferred first."""

    def __init__(
        self,
        manifests: Sequence[RankManifest],
        table: Table,
        wanted: Sequence[Wanted],
        places: Sequence[int],
    ) -> None:
        self._manifests = manifests
        self._of: dict[int, tuple[Rows, range]] = {}
        ranks = np.array([m.rank for m in manifests], np.int64)
        is_any = np.array([t.kind in REPLICATED_KINDS for t in table.tensors], np.bool_)
        for every in piece_rows(manifests, table):
            found = every.take(_may_meet(every, wanted, places))
            preference = np.where(is_any[found.tensor], found.owner, ranks[found.owner])
            rows = found.take(np.lexsort((found.item, preference, found.tensor)))
            tensors, first = np.unique(rows.tensor, return_index=True)
            bounds = pairwise([*first.tolist(), len(rows.tensor)])
            for tensor, (a, b) in zip(tensors.tolist(), bounds, strict=True):
                self._of[tensor] = (rows, range(a, b))

    def cover(self, want: Wanted, place: int) -> Iterator[tuple[Chunk, int, Box, list[Box]]]:
        """Give chunk, offset, box of the piece, and the parts of it that are wanted."""
        rest = [want.box] if want.box.volume else []
        rows, candidates = self._of.get(place, (None, range(0)))
        for row in candidates:
            if rows is None or not rest:
                break
            piece_box = rows.at(row)
            if piece_box == want.box and rest == [want.box]:  # nearly always
                yield *self._where(rows, row), piece_box, [want.box]
                return
            parts = [common for box in rest if (common := box.intersect(piece_box))]
            if not parts:
                continue
            rest = [left for box in rest for left in box.subtract(piece_box)]
            yield *self._where(rows, row), piece_box, parts
        if rest:
            message = f"box {rest[0]} of {want.fqn} is in none of {len(self._manifests)} manifests"
            raise LayoutError(message, fqn=want.fqn)

    def _where(self, rows: Rows, row: int) -> tuple[Chunk, int]:
        """Return the chunk of a piece, and the piece's offset in it."""
        manifest, item = self._manifests[int(rows.owner[row])], int(rows.item[row])
        chunk = manifest.chunks[int(numbers(manifest.pieces.chunk)[item])]
        return chunk, int(numbers(manifest.pieces.offset)[item])


def _may_meet(rows: Rows, wanted: Sequence[Wanted], places: Sequence[int]) -> Ints:
    """Return the rows that meet the hull of all that is wanted of their tensor."""
    count = 1 + max(rows.tensor.max(initial=0), max(places, default=0))
    start = np.full((count, rows.dims), np.iinfo(np.int64).max)
    stop = np.full((count, rows.dims), -1)
    is_wanted = np.zeros(count, np.bool_)
    for (_, box), place in zip(wanted, places, strict=True):
        if len(box.start) == rows.dims:
            is_wanted[place] = True
            start[place] = np.minimum(start[place], box.start)
            stop[place] = np.maximum(stop[place], box.stop)
    meets = (rows.start < stop[rows.tensor]) & (rows.stop > start[rows.tensor])
    return np.flatnonzero(is_wanted[rows.tensor] & meets.all(axis=1))
