"""What a rank holds, as arrays: a job of 1,024 ranks has layouts of millions of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.model.ready import make_ready
from ckptd.model.tensor import REPLICATED_KINDS, Layout, Tensor
from ckptd.plan.rows import Rows, column_rows
from ckptd.plan.table import Ints

Names = npt.NDArray[np.uint64]


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    digest: str
    counts: bytes
    boxes: bytes
    is_replicated: bytes


make_ready(_Wire, Tensor)


class Holdings(NamedTuple):
    """A layout without its devices and aliases.

    `counts` says how many boxes the rank holds of each of `tensors`; `boxes` has the starts and then
    the stops of each box, one after the other. Ranks whose tensors are the same share `tensors`.
    """

    digest: str
    tensors: tuple[Tensor, ...]
    counts: Ints
    boxes: Ints
    is_replicated: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, layout: Layout, rank: int = 0) -> Holdings:
        """Return the holdings of a layout; `rank` is for the message.

        Raises:
            LayoutError: a box has other dimensions than its tensor.
        """
        for held in layout.held:
            for box in held.boxes:
                if len(box.start) != len(held.tensor.shape):
                    refuse_outside(held.tensor, box, rank)
        flat = [n for h in layout.held for box in h.boxes for n in (*box.start, *box.stop)]
        return cls(
            layout.digest(),
            tuple(held.tensor for held in layout.held),
            np.array([len(held.boxes) for held in layout.held], np.int64),
            np.array(flat, np.int64),
            np.array([held.is_replicated for held in layout.held], np.bool_),
        )

    def table(self) -> bytes:
        """Return the tensors in a form for other ranks, who may be on other devices."""
        rows = [(t.fqn, t.dtype, t.shape, t.kind, t.requires_grad, "") for t in self.tensors]
        return msgspec.msgpack.encode(rows)

    def pack(self) -> bytes:
        """Return all but the tensors in a form for other ranks."""
        columns = (self.counts.astype("<i8"), self.boxes.astype("<i8"))
        packed = [column.tobytes() for column in columns]
        return msgspec.msgpack.encode(
            _Wire(self.digest, packed[0], packed[1], self.is_replicated.tobytes())
        )

    @classmethod
    def unpack(cls, data: bytes, table: TensorTable) -> Holdings:
        """Undo `pack`.

        Raises:
            ValueError: these are no holdings of these tensors.
        """
        wire = msgspec.msgpack.decode(data, type=_Wire)
        counts, boxes = (
            np.frombuffer(part, "<i8").astype(np.int64, copy=False)
            for part in (wire.counts, wire.boxes)
        )
        is_replicated = np.frombuffer(wire.is_replicated, np.bool_)
        if not len(table.dims) == len(counts) == len(is_replicated) or (counts < 0).any():
            raise ValueError("holdings of other tensors")
        if int((2 * table.dims * counts).sum()) != len(boxes):
            raise ValueError("holdings whose boxes do not fit their tensors")
        return cls(wire.digest, table.tensors, counts, boxes, is_replicated)


class TensorTable(NamedTuple):
    """Tensors that several ranks hold parts of; `dims` are their numbers of dimensions."""

    tensors: tuple[Tensor, ...]
    dims: Ints

    @classmethod
    def unpack(cls, data: bytes) -> TensorTable:
        """Undo `Holdings.table`.

        Raises:
            ValueError: it is none.
        """
        tensors = msgspec.msgpack.decode(data, type=tuple[Tensor, ...])
        return cls(tensors, np.array([len(t.shape) for t in tensors], np.int64))


def held_rows(holdings: Sequence[Holdings], places: Sequence[Ints], dims_of: Ints) -> list[Rows]:
    """Return all boxes that are not empty, of one number of dimensions at a time.

    `places` has the place of each tensor in a common table. A row's `owner` is the place of its
    holdings, its `item` that of the tensor in them.
    """
    parts = []
    for owner, (held, there) in enumerate(zip(holdings, places, strict=True)):
        item = np.repeat(np.arange(len(held.tensors)), held.counts)
        parts.append((owner, there[item], item, held.boxes))
    return list(column_rows(parts, dims_of))


def name_boxes(rows: Rows) -> Names:
    """Return 64 bits for each row that are equal for equal boxes of a tensor, and hardly else."""
    name = _mix(rows.tensor.astype(np.uint64))
    for column in rows.box.T:
        name = _mix(name ^ column.astype(np.uint64))
    return name


class TensorNames(NamedTuple):
    """What `name_holdings` needs to know of tensors, which many ranks share."""

    names: Names
    is_shared: npt.NDArray[np.bool_]
    dims: Ints

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> TensorNames:
        """Give each name of a tensor 64 bits."""
        return cls(
            np.array([xxhash.xxh3_64_intdigest(t.fqn.encode()) for t in tensors], np.uint64),
            np.array([t.kind in REPLICATED_KINDS for t in tensors], np.bool_),
            np.array([len(t.shape) for t in tensors], np.int64),
        )


def name_holdings(held: Holdings, tensors: TensorNames) -> Names:
    """Return 64 bits for each tensor that are equal where ranks hold the same boxes of it.

    0 for tensors whose contents need no comparing: a placement vouches for them, or nobody shares
    them out, or there are none.
    """
    is_compared = tensors.is_shared & ~held.is_replicated
    if not is_compared.any():
        return np.zeros(len(is_compared), np.uint64)
    names, dims = tensors.names.copy(), tensors.dims
    lengths = 2 * dims * held.counts
    numbers = np.repeat(np.arange(len(held.tensors)), lengths)
    elements = np.zeros(len(names), np.int64)
    for rows in held_rows([held], [np.arange(len(names))], dims):
        np.add.at(elements, rows.item, rows.volume)
    # A sum of what each number is mixed with its position: order matters, loops do not.
    position = np.arange(len(numbers)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    mixed = _mix(_mix(position.astype(np.uint64)) ^ held.boxes.astype(np.uint64))
    np.add.at(names, numbers, mixed)
    names = _mix(names) | np.uint64(1)
    names[~is_compared | (elements == 0)] = 0
    named: Names = names
    return named


def refuse_outside(tensor: Tensor, box: Box, rank: int) -> None:
    """Raise for a box that is none of its tensor.

    Raises:
        LayoutError: always.
    """
    raise LayoutError(
        f"{tensor.fqn}: box {box} of rank {rank} outside of shape {tensor.shape}",
        fqn=tensor.fqn,
        ranks=(rank,),
    )


def _mix(values: Names) -> Names:
    """Spread bits; the finisher of MurmurHash3 (public domain, Austin Appleby)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: Names = values ^ (values >> np.uint64(33))
    return mixed
