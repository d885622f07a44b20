"""Who writes what: a pure function of what all ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.model.tensor import REPLICATED_KINDS, Layout, Tensor
from ckptd.plan.holdings import Holdings, held_rows, name_boxes, refuse_outside
from ckptd.plan.rows import Rows, find_crowded, find_outside
from ckptd.plan.table import Ints, check_same
from ckptd.units import KIB, MIB

Share = tuple[tuple[int, Box], ...]
"""What one rank writes: the place in its `Layout.held`, and a box of the global tensor."""

_RULES = 1  # part of the digest: ranks that split by other rules must not commit together
_GRANULES_PER_SHARE = 20  # a boundary moves by half a granule at most: shares are even to 5 %
_SMALLEST_GRANULE = 4 * KIB


class SplitPlan(msgspec.Struct, frozen=True):
    """What each rank writes, and the digest of all that this follows from."""

    digest: str
    shares: tuple[Share, ...]


class _Alike(NamedTuple):
    """Ranks with equal layouts; `places` are those of their tensors in the common table."""

    holdings: Holdings
    ranks: list[int]
    places: Ints


class _Part(NamedTuple):
    """A box of a tensor, which has the place `place` at its rank and `common` in all ranks' table."""

    place: int
    common: int
    tensor: Tensor
    box: Box
    bytes: int


def whole_share(layout: Layout) -> Share:
    """Return everything that a rank holds: what it writes where there is no plan."""
    return tuple(
        (place, box)
        for place, held in enumerate(layout.held)
        for box in dict.fromkeys(held.boxes)
        if box.volume
    )


def split(layouts: Sequence[Layout], chunk_bytes: int) -> SplitPlan:
    """Decide which rank writes what; `layouts` are those of all ranks, in rank order.

    Replicated contents are shared out between their holders in about equal bytes; anything else is
    written whole by the lowest rank that holds it. Equal arguments give equal plans on every rank.

    Raises:
        LayoutError: ranks disagree about a tensor, or hold boxes that overlap without being equal.
    """
    known: dict[int, Holdings] = {}  # by identity: callers pass one object for equal layouts
    for rank, layout in enumerate(layouts):
        if id(layout) not in known:
            known[id(layout)] = Holdings.of(layout, rank)
    splitter = Splitter([known[id(layout)] for layout in layouts], chunk_bytes)
    return SplitPlan(splitter.digest, tuple(map(splitter.share, range(len(layouts)))))


class Splitter:
    """The same, for a rank that wants its own share only. Takes memory for the boxes of all ranks.

    Attributes:
        digest: of all that the plan follows from.
    """

    def __init__(self, holdings: Sequence[Holdings], chunk_bytes: int) -> None:
        """Look at what all ranks hold, in rank order; equal ones should be one object.

        Raises:
            LayoutError: ranks disagree about a tensor, or hold boxes that overlap without being
                equal.
        """
        digests = [held.digest for held in holdings]
        self.digest = xxhash.xxh3_128_hexdigest(
            msgspec.msgpack.encode((_RULES, chunk_bytes, digests))
        )
        self._chunk_bytes = chunk_bytes
        self._alike, tensors = _alike_ranks(holdings)
        self._group_of = {rank: g for g, alike in enumerate(self._alike) for rank in alike.ranks}
        dims_of = np.array([len(t.shape) for t in tensors], np.int64)
        rows = held_rows(
            [alike.holdings for alike in self._alike], [a.places for a in self._alike], dims_of
        )
        self._boxes = [_Boxes(found, self._alike, tensors) for found in rows]

    def share(self, rank: int) -> Share:
        """Return what a rank writes."""
        group = self._group_of[rank]
        own: list[tuple[int, Box]] = []
        shared: dict[tuple[int, ...], list[_Part]] = {}
        for boxes in self._boxes:
            for part, holders in boxes.of(group):
                if boxes.is_replicated(part, holders, self._alike):
                    shared.setdefault(holders, []).append(part)
                elif rank == self._alike[holders[0]].ranks[0]:
                    own.append((part.place, part.box))
        for holders, parts in shared.items():
            ranks = sorted(r for number in holders for r in self._alike[number].ranks)
            parts.sort(key=lambda part: (part.tensor.fqn, part.box.start))
            own += _share_of(parts, len(ranks), ranks.index(rank), self._chunk_bytes)
        return tuple(sorted(own, key=lambda row: (row[0], row[1].start)))


class _Boxes:
    """All boxes of one number of dimensions: which are equal, and who holds them."""

    def __init__(self, rows: Rows, alike: Sequence[_Alike], tensors: Sequence[Tensor]) -> None:
        self._rows = rows
        self._alike = alike
        self._first = np.searchsorted(rows.owner, np.arange(len(alike) + 1))
        self._order, is_new = _sort_equal(rows)
        self._starts = np.flatnonzero(np.append(is_new, True))
        self._number = np.empty(len(is_new), np.int64)
        self._number[self._order] = np.cumsum(is_new) - 1
        self._check_twice(tensors, is_new)
        self._check_disjoint(tensors)

    def of(self, group: int) -> list[tuple[_Part, tuple[int, ...]]]:
        """Return the boxes of a group of ranks, and of each the groups that hold it."""
        first, last = self._first[group], self._first[group + 1]
        tensors = self._alike[group].holdings.tensors
        sizes = self._rows.volume[first:last].tolist()
        numbers = self._number[first:last]
        begins, ends = self._starts[numbers].tolist(), self._starts[numbers + 1].tolist()
        alone: tuple[int, ...] = (group,)
        found = []
        for row, place, size, a, b in zip(
            range(first, last), self._rows.item[first:last].tolist(), sizes, begins, ends,
            strict=True,
        ):  # fmt: skip
            holders = alone
            if b - a > 1:
                holders = tuple(self._rows.owner[self._order[a:b]].tolist())
            tensor = tensors[place]
            common = int(self._rows.tensor[row])
            part = _Part(place, common, tensor, self._rows.at(row), size * tensor.itemsize)
            found.append((part, holders))
        return found

    def is_replicated(
        self, part: _Part, holders: tuple[int, ...], alike: Sequence[_Alike]
    ) -> bool:  # fmt: skip
        """Tell whether all holders of a box have the same contents."""
        if part.tensor.kind in REPLICATED_KINDS:
            return True
        return all(
            bool(alike[g].holdings.is_replicated[alike[g].places == part.common].all())
            for g in holders
        )

    def _check_twice(self, tensors: Sequence[Tensor], is_new: npt.NDArray[np.bool_]) -> None:
        """Refuse a rank that holds a box twice."""
        owner = self._rows.owner[self._order]
        twice = np.flatnonzero(~is_new[1:] & (owner[1:] == owner[:-1]))
        if len(twice):
            row = int(self._order[twice[0]])
            one = (self._rows.at(row), self._alike[int(self._rows.owner[row])].ranks[0])
            _refuse(tensors[int(self._rows.tensor[row])].fqn, one, one)

    def _check_disjoint(self, tensors: Sequence[Tensor]) -> None:
        """Check that each box lies in its tensor and touches no other box of it."""
        rows = self._rows
        if len(self._starts) - 1 < len(self._order):
            rows = rows.take(np.sort(self._order[self._starts[:-1]]))
        if (row := find_outside(rows, tensors)) is not None:
            rank = self._alike[int(rows.owner[row])].ranks[0]
            refuse_outside(tensors[int(rows.tensor[row])], rows.at(row), rank)
        for crowded in find_crowded(rows).tolist():
            held = rows.take(rows.tensor == crowded)
            _check_pairs(tensors[crowded].fqn, held, self._alike)


def _sort_equal(rows: Rows) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return an order in which equal boxes stand side by side, by owner, and where new ones begin."""
    count = len(rows.tensor)
    # A name and a place in one number: numbers sort six times as fast as places by names.
    mask = np.uint64((1 << max(1, count.bit_length())) - 1)
    keys = (name_boxes(rows) & ~mask) | np.arange(count, dtype=np.uint64)
    keys.sort()
    order = (keys & mask).astype(np.int64)
    keys &= ~mask
    is_new = np.ones(count, np.bool_)
    is_new[1:] = keys[1:] != keys[:-1]
    again = np.flatnonzero(~is_new)
    differs = ~_are_equal(rows, order[again], order[again - 1])
    if differs.any():  # different boxes of one name, of which a part is all that was sorted by
        run = np.cumsum(is_new)
        mixed = np.flatnonzero(np.isin(run, run[again[differs]]))
        part = rows.take(order[mixed])
        order[mixed] = order[mixed][
            np.lexsort((part.owner, *part.box.T[::-1], part.tensor, run[mixed]))
        ]
        is_new[mixed] = ~_are_equal(rows, order[mixed], order[mixed - 1])
    return order, is_new


def _are_equal(rows: Rows, one: Ints, other: Ints) -> npt.NDArray[np.bool_]:
    is_same: npt.NDArray[np.bool_] = (rows.box[one] == rows.box[other]).all(axis=1)
    is_same &= rows.tensor[one] == rows.tensor[other]
    return is_same


def _alike_ranks(holdings: Sequence[Holdings]) -> tuple[list[_Alike], list[Tensor]]:
    """Group ranks by what they hold, and merge their tables of tensors."""
    groups: dict[str, _Alike] = {}
    merged: dict[str, tuple[int, int, Tensor]] = {}
    places: dict[int, Ints] = {}  # by the identity of a table, which ranks share
    for rank, held in enumerate(holdings):
        if held.digest in groups:
            groups[held.digest].ranks.append(rank)
            continue
        if id(held.tensors) not in places:
            places[id(held.tensors)] = _merge(merged, held.tensors, rank)
        groups[held.digest] = _Alike(held, [rank], places[id(held.tensors)])
    return list(groups.values()), [tensor for _, _, tensor in merged.values()]


def _merge(
    merged: dict[str, tuple[int, int, Tensor]], tensors: Sequence[Tensor], rank: int
) -> Ints:
    if len({tensor.fqn for tensor in tensors}) < len(tensors):
        raise LayoutError(f"rank {rank} holds two tensors of one name", ranks=(rank,))
    places = []
    for tensor in tensors:
        place, first_rank, first = merged.setdefault(tensor.fqn, (len(merged), rank, tensor))
        if first is not tensor:
            check_same(first, first_rank, tensor, rank)
        places.append(place)
    return np.array(places, np.int64)


def _check_pairs(fqn: str, rows: Rows, alike: Sequence[_Alike]) -> None:
    """Compare box with box, for the few tensors that planes do not part."""
    found = [(rows.at(i), alike[int(owner)].ranks[0]) for i, owner in enumerate(rows.owner)]
    active: list[tuple[Box, int]] = []
    for box, rank in sorted(found, key=lambda row: row[0].start):
        active = [other for other in active if other[0].stop[0] > box.start[0]]
        for other in active:
            if other[0].intersect(box):
                _refuse(fqn, other, (box, rank))
        active.append((box, rank))


def _refuse(fqn: str, one: tuple[Box, int], two: tuple[Box, int]) -> NoReturn:
    raise LayoutError(
        f"{fqn}: box {one[0]} of rank {one[1]} overlaps box {two[0]} of rank {two[1]}; "
        "ranks may hold equal boxes or boxes that do not touch",
        fqn=fqn,
        ranks=sorted({one[1], two[1]}),
    )


def _share_of(
    parts: Sequence[_Part], holders: int, number: int, chunk_bytes: int
) -> list[tuple[int, Box]]:
    """Lay `parts` end to end, give each holder one range of about equal bytes, return one's."""
    if holders == 1:
        return [(part.place, part.box) for part in parts]
    total = sum(part.bytes for part in parts)
    granule_bytes = _granule_bytes(total // holders, chunk_bytes)
    mine: list[tuple[int, Box]] = []
    at = 0
    for part in parts:
        end = at + part.bytes
        first, last = at * holders // total, (end * holders - 1) // total
        if first == last == number:
            mine.append((part.place, part.box))
        elif first != last and first <= number <= last:
            boxes = []
            begin = at
            for box in part.box.cut(max(1, granule_bytes // part.tensor.itemsize)):
                size = box.volume * part.tensor.itemsize
                if (2 * begin + size) * holders // (2 * total) == number:
                    boxes.append(box)
                begin += size
            mine += [(part.place, box) for box in merge_runs(boxes)]
        at = end
    return mine


def _granule_bytes(share_bytes: int, chunk_bytes: int) -> int:
    if share_bytes >= _GRANULES_PER_SHARE * chunk_bytes:
        return chunk_bytes
    granule_bytes = MIB
    while granule_bytes > _SMALLEST_GRANULE and share_bytes < _GRANULES_PER_SHARE * granule_bytes:
        granule_bytes //= 2
    return min(granule_bytes, chunk_bytes)


def merge_runs(boxes: Iterable[Box]) -> list[Box]:
    """Merge neighbours of a run of boxes in row-major order where their union is a box again."""
    merged: list[Box] = []
    for box in boxes:
        merged.append(box)
        while len(merged) > 1 and (union := _union(merged[-2], merged[-1])):
            merged[-2:] = [union]
    return merged


def _union(one: Box, two: Box) -> Box | None:
    differs = [
        d for d in range(len(one.start))
        if one.start[d] != two.start[d] or one.stop[d] != two.stop[d]
    ]  # fmt: skip
    if len(differs) == 1 and one.stop[differs[0]] == two.start[differs[0]]:
        return Box(one.start, two.stop)
    return None
