"""Boxes by the hundred thousand, as arrays.

A step of 1,024 ranks has millions of pieces. What is asked of all of them at once is asked of
arrays here; what is asked of the few that stand out is asked of `Box` values elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.model.box import Box
from ckptd.model.manifest import RankManifest
from ckptd.model.tensor import Tensor
from ckptd.plan.table import Ints, Table

_SAFE = 1 << 62


class Rows(NamedTuple):
    """Boxes of equally many dimensions, none of them empty.

    `tensor` is the place of the box's tensor in a table; `owner` and `item` are the caller's
    numbers, for pieces the place of the manifest and of the piece in it. `box` has a row of starts
    and then stops for each.
    """

    tensor: Ints
    owner: Ints
    item: Ints
    box: Ints

    @property
    def dims(self) -> int:
        """The number of dimensions."""
        return int(self.box.shape[1]) // 2

    @property
    def start(self) -> Ints:
        """The first index in each dimension."""
        return self.box[:, : self.dims]

    @property
    def stop(self) -> Ints:
        """One more than the last index in each dimension."""
        return self.box[:, self.dims :]

    @property
    def volume(self) -> Ints:
        """The number of elements of each."""
        volume = np.ones(len(self.tensor), np.int64)
        for d in range(self.dims):
            volume *= self.stop[:, d] - self.start[:, d]
        return volume

    def take(self, which: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Rows:
        """Return the rows of these places, or where this is true."""
        return Rows(self.tensor[which], self.owner[which], self.item[which], self.box[which])

    def at(self, row: int) -> Box:
        """Return one box as a value."""
        numbers = self.box[row].tolist()
        return Box(tuple(numbers[: self.dims]), tuple(numbers[self.dims :]))


def numbers(column: bytes) -> Ints:
    """Return a column of `ckptd.model.columns` as an array, without a copy."""
    return np.frombuffer(column, dtype="<u8").view(np.int64)


def piece_rows(manifests: Sequence[RankManifest], table: Table) -> Iterator[Rows]:
    """Give the pieces of all manifests, all of one number of dimensions at a time.

    The manifests have been checked (`RankManifest.check`).
    """
    dims_of = np.array([len(t.shape) for t in table.tensors], dtype=np.int64)
    parts = []
    for owner, (manifest, places) in enumerate(zip(manifests, table.places, strict=True)):
        tensor = places[numbers(manifest.pieces.tensor)]
        boxes = numbers(manifest.pieces.box)
        parts.append((owner, tensor, np.arange(len(tensor)), boxes))
    return column_rows(parts, dims_of)


def column_rows(
    parts: Iterable[tuple[int, Ints, Ints, Ints]], dims_of: Ints
) -> Iterator[Rows]:  # fmt: skip
    """Give boxes that lie end to end as rows, all of one number of dimensions at a time.

    Each part is an owner, the tensor and the item of each of its boxes, and the numbers of all of
    them: the starts of a box and then its stops. Empty boxes are left out.
    """
    found: dict[int, list[Rows]] = {}
    for owner, tensor, item, boxes in parts:
        dims = dims_of[tensor]
        if not len(dims):
            continue
        d = int(dims[0])
        if (dims == d).all():  # nearly always, and then nothing has to be looked for
            whole = np.broadcast_to(np.int64(owner), len(tensor))
            found.setdefault(d, []).append(
                Rows(tensor, whole, item, boxes.reshape(len(tensor), 2 * d))
            )
            continue
        first = np.cumsum(2 * dims) - 2 * dims
        for d in np.unique(dims).tolist():
            which = np.flatnonzero(dims == d)
            box = boxes[first[which][:, None] + np.arange(2 * d)]
            found.setdefault(d, []).append(
                Rows(tensor[which], np.full(len(which), owner, np.int64), item[which], box)
            )
    for kept in found.values():
        rows = Rows(*(np.concatenate(column) for column in zip(*kept, strict=True)))
        is_full = rows.volume != 0  # below zero is no box, for others to find
        yield rows if is_full.all() else rows.take(is_full)


def find_outside(rows: Rows, tensors: Sequence[Tensor]) -> int | None:
    """Return the first row that is no box of its tensor, or None."""
    shapes = np.zeros((len(tensors), rows.dims), np.int64)
    for place in np.flatnonzero(np.bincount(rows.tensor)).tolist():
        shapes[place] = tensors[place].shape
    is_inside = np.ones(len(rows.tensor), np.bool_)
    for d in range(rows.dims):  # a column at a time: a third of the memory
        start, stop = rows.start[:, d], rows.stop[:, d]
        is_inside &= (start >= 0) & (start <= stop) & (stop <= shapes[:, d][rows.tensor])
    return None if is_inside.all() else int(np.argmin(is_inside))


def same_as_last(rows: Rows) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Return the rows sorted by tensor and box, and where a row equals the one before it."""
    order = np.lexsort((*rows.box.T[::-1], rows.tensor))
    rows = rows.take(order)
    same = np.zeros(len(order), np.bool_)
    same[1:] = (rows.tensor[1:] == rows.tensor[:-1]) & np.all(rows.box[1:] == rows.box[:-1], axis=1)
    return rows, same


def find_crowded(rows: Rows) -> Ints:
    """Return the tensors whose boxes are not proven disjoint, without repeats, in rising order.

    Boxes are parted where a plane separates them, dimension after dimension, until nothing parts
    any more. All that sharding and splitting make falls into single boxes this way. Boxes that do
    not (a pinwheel) may still be disjoint: what is returned is to be looked at one by one.
    """
    rows, part = _drop_single(rows, rows.tensor)
    before = (-1, -1)
    while len(part) and before != (len(part), int(part.max())):
        before = (len(part), int(part.max()))
        for d in range(rows.dims):
            if len(part):
                part = _separate(part, rows.start[:, d], rows.stop[:, d])
                rows, part = _drop_single(rows, part)
    return np.unique(rows.tensor)


def _drop_single(rows: Rows, part: Ints) -> tuple[Rows, Ints]:
    """Leave out rows that are alone in their part; number the parts from 0 on."""
    is_kept = np.bincount(part) > 1 if len(part) else np.zeros(0, np.bool_)
    number = np.cumsum(is_kept) - 1
    is_shared = is_kept[part]
    if is_shared.all():  # a copy would be of millions of rows
        return rows, number[part]
    return rows.take(is_shared), number[part[is_shared]]


def _separate(part: Ints, start: Ints, stop: Ints) -> Ints:
    """Part further what lies apart along one dimension."""
    span = int(stop.max()) + 1
    if span * (int(part.max()) + 1) >= _SAFE:
        edges, places = np.unique(np.concatenate((start, stop)), return_inverse=True)
        start, stop = np.split(places.reshape(-1), 2)
        span = len(edges) + 1
    # Each part gets an interval of its own on one axis, so that one running maximum serves all.
    first = part * span + start
    order = np.argsort(first, kind="stable")  # quick where ranks stand in the order of their shards
    last = (part * span + stop)[order]
    reach = np.maximum.accumulate(last)
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = first[order[1:]] >= reach[:-1]
    parted = np.empty_like(part)
    parted[order] = np.cumsum(is_first) - 1
    return parted
