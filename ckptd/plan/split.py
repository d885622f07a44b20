"""Who writes what: a pure function of what all ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, NoReturn

import msgspec
import xxhash

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.model.tensor import REPLICATED_KINDS, Layout, Tensor
from ckptd.plan.rows import box_rows, find_crowded, find_outside
from ckptd.plan.table import check_same
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
    """Ranks with equal layouts."""

    layout: Layout
    ranks: list[int]
    places: dict[str, int]


class _Part(NamedTuple):
    """A box, and which groups of alike ranks hold it, the one with the lowest rank first."""

    tensor: Tensor
    box: Box
    holders: tuple[int, ...]
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
    alike, digests = _alike_ranks(layouts)
    parts = _collect(alike)
    _check_disjoint(parts, alike)
    shares: list[list[tuple[str, Box]]] = [[] for _ in layouts]
    shared: dict[tuple[int, ...], list[_Part]] = {}
    for part in parts:
        if _is_replicated(part, alike):
            shared.setdefault(part.holders, []).append(part)
        else:
            shares[alike[part.holders[0]].ranks[0]].append((part.tensor.fqn, part.box))
    for holders, group in shared.items():
        ranks = sorted(rank for number in holders for rank in alike[number].ranks)
        _share_out(group, ranks, chunk_bytes, shares)
    places = {rank: group.places for group in alike for rank in group.ranks}
    return SplitPlan(
        digest=xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode((_RULES, chunk_bytes, digests))),
        shares=tuple(_in_order(rows, places[rank]) for rank, rows in enumerate(shares)),
    )


def _alike_ranks(layouts: Sequence[Layout]) -> tuple[list[_Alike], list[str]]:
    known: dict[int, str] = {}  # by identity: callers pass one object for equal layouts
    groups: dict[str, _Alike] = {}
    digests = []
    for rank, layout in enumerate(layouts):
        digest = known.get(id(layout)) or known.setdefault(id(layout), layout.digest())
        digests.append(digest)
        if digest in groups:
            groups[digest].ranks.append(rank)
        else:
            places = {held.tensor.fqn: place for place, held in enumerate(layout.held)}
            if len(places) < len(layout.held):
                raise LayoutError(f"rank {rank} holds two tensors of one name", ranks=(rank,))
            groups[digest] = _Alike(layout, [rank], places)
    return list(groups.values()), digests


def _collect(alike: Sequence[_Alike]) -> list[_Part]:
    """Return the distinct boxes of all tensors, by FQN and then by first element."""
    tensors: dict[str, tuple[Tensor, int, dict[Box, tuple[int, ...]]]] = {}
    for number, group in enumerate(alike):
        alone = (number,)  # one object for the many boxes that nobody else holds
        for held in group.layout.held:
            tensor, rank = held.tensor, group.ranks[0]
            first, first_rank, boxes = tensors.setdefault(tensor.fqn, (tensor, rank, {}))
            if first is not tensor:
                check_same(first, first_rank, tensor, rank)
            for box in held.boxes:
                holders = boxes.get(box, ())
                if len(box.start) != len(tensor.shape):
                    _refuse_outside(tensor, box, rank)
                if number in holders[-1:]:
                    _refuse(tensor.fqn, (box, rank), (box, rank))
                boxes[box] = (*holders, number) if holders else alone
    return [
        _Part(tensor, box, holders, size * tensor.itemsize)
        for _, (tensor, _, boxes) in sorted(tensors.items())
        for box, holders in sorted(boxes.items(), key=lambda item: item[0].start)
        if (size := box.volume)
    ]


def _refuse_outside(tensor: Tensor, box: Box, rank: int) -> NoReturn:
    raise LayoutError(
        f"{tensor.fqn}: box {box} of rank {rank} outside of shape {tensor.shape}",
        fqn=tensor.fqn,
        ranks=(rank,),
    )


def _check_disjoint(parts: Sequence[_Part], alike: Sequence[_Alike]) -> None:
    """Check that each box lies in its tensor and touches no other box of it."""
    by_tensor = [list(group) for _, group in groupby(parts, key=lambda part: part.tensor.fqn)]
    tensors = [group[0].tensor for group in by_tensor]
    boxes = [
        (number, part.holders[0], part.box)
        for number, group in enumerate(by_tensor)
        for part in group
    ]
    for rows in box_rows(boxes):
        if (row := find_outside(rows, tensors)) is not None:
            rank = alike[int(rows.owner[row])].ranks[0]
            _refuse_outside(tensors[int(rows.tensor[row])], rows.at(row), rank)
        for crowded in find_crowded(rows).tolist():
            _check_pairs(by_tensor[crowded], alike)


def _check_pairs(parts: Sequence[_Part], alike: Sequence[_Alike]) -> None:
    """Compare box with box, for the few tensors that planes do not part."""
    active: list[_Part] = []
    for part in parts:  # sorted by first element, so by first row
        active = [other for other in active if other.box.stop[0] > part.box.start[0]]
        for other in active:
            if other.box.intersect(part.box):
                one, two = ((p.box, alike[p.holders[0]].ranks[0]) for p in (other, part))
                _refuse(part.tensor.fqn, one, two)
        active.append(part)


def _refuse(fqn: str, one: tuple[Box, int], two: tuple[Box, int]) -> NoReturn:
    raise LayoutError(
        f"{fqn}: box {one[0]} of rank {one[1]} overlaps box {two[0]} of rank {two[1]}; "
        "ranks may hold equal boxes or boxes that do not touch",
        fqn=fqn,
        ranks=sorted({one[1], two[1]}),
    )


def _is_replicated(part: _Part, alike: Sequence[_Alike]) -> bool:
    if part.tensor.kind in REPLICATED_KINDS:
        return True
    groups = (alike[number] for number in part.holders)
    return all(g.layout.held[g.places[part.tensor.fqn]].is_replicated for g in groups)


def _share_out(
    parts: Sequence[_Part],
    ranks: Sequence[int],
    chunk_bytes: int,
    shares: list[list[tuple[str, Box]]],
) -> None:
    """Lay `parts` end to end and give each rank one range of about equal bytes."""
    if len(ranks) == 1:
        shares[ranks[0]].extend((part.tensor.fqn, part.box) for part in parts)
        return
    total = sum(part.bytes for part in parts)
    granule_bytes = _granule_bytes(total // len(ranks), chunk_bytes)
    at = 0
    for part in parts:
        end = at + part.bytes
        first, last = at * len(ranks) // total, (end * len(ranks) - 1) // total
        if first == last:
            shares[ranks[first]].append((part.tensor.fqn, part.box))
            at = end
            continue
        given: dict[int, list[Box]] = {}
        for box in part.box.cut(max(1, granule_bytes // part.tensor.itemsize)):
            size = box.volume * part.tensor.itemsize
            holder = (2 * at + size) * len(ranks) // (2 * total)
            given.setdefault(holder, []).append(box)
            at += size
        for holder, boxes in given.items():
            shares[ranks[holder]].extend((part.tensor.fqn, box) for box in merge_runs(boxes))


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


def _in_order(rows: Iterable[tuple[str, Box]], places: dict[str, int]) -> Share:
    numbered = [(places[fqn], box) for fqn, box in rows]
    return tuple(sorted(numbered, key=lambda row: (row[0], row[1].start)))
