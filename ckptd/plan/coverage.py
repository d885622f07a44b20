"""The proof that a commit rests on: the pieces of all ranks are exactly the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from ckptd.errors import LayoutError
from ckptd.model.box import Box
from ckptd.model.manifest import RankManifest
from ckptd.model.tensor import Tensor
from ckptd.plan.rows import Rows, find_crowded, find_outside, piece_rows, same_as_last
from ckptd.plan.table import Table, join_ranks, merge_aliases, merge_tensors


class _Written(NamedTuple):
    box: Box
    rank: int
    is_planned: bool


class _Suspect(NamedTuple):
    """A tensor that the arrays did not prove, and who holds it."""

    tensor: Tensor
    holders: list[int]


def prove_coverage(manifests: Sequence[RankManifest]) -> None:
    """Prove that the pieces of every tensor are exactly the tensor.

    Pieces may overlap where all but one of them are of ranks that wrote without a plan. The
    manifests have been checked (`RankManifest.check`). Takes near-linear time for anything that
    sharding and `split` make, quadratic time for a tensor whose ranks overlap at will.

    Raises:
        LayoutError: a hole, an overlap of two planned ranks, or ranks that disagree about a tensor
            or an alias; with FQN, ranks and box.
    """
    manifests = sorted(manifests, key=lambda m: m.rank)
    table = merge_tensors(manifests)
    merge_aliases(manifests, table.tensors)
    is_planned = np.array([m.plan is not None for m in manifests], np.bool_)
    unproven = {place for place, tensor in enumerate(table.tensors) if tensor.elements}
    suspects: list[tuple[int, Rows | None]] = []
    for rows in piece_rows(manifests, table):
        _check_inside(rows, table)
        proven, doubtful = _sift(rows, is_planned, table)
        unproven.difference_update(proven, doubtful)
        suspects.extend(_by_tensor(rows, doubtful))
    suspects.extend((place, None) for place in unproven)
    for place, found in sorted(suspects, key=lambda pair: pair[0]):
        written = _written(found, manifests) if found else []
        suspect = _Suspect(table.tensors[place], table.holders(place, manifests))
        _prove(suspect, Box.full(suspect.tensor.shape), written, 0)


def _by_tensor(rows: Rows, places: Sequence[int]) -> Iterator[tuple[int, Rows]]:
    order = np.argsort(rows.tensor, kind="stable")
    ordered = rows.tensor[order]
    first, last = (np.searchsorted(ordered, places, side=side) for side in ("left", "right"))
    for place, a, b in zip(places, first.tolist(), last.tolist(), strict=True):
        yield place, rows.take(order[a:b])


def _written(rows: Rows, manifests: Sequence[RankManifest]) -> list[_Written]:
    owners = [manifests[owner] for owner in rows.owner.tolist()]
    return [_Written(rows.at(i), m.rank, m.plan is not None) for i, m in enumerate(owners)]


def _check_inside(rows: Rows, table: Table) -> None:
    if (row := find_outside(rows, table.tensors)) is not None:
        tensor = table.tensors[int(rows.tensor[row])]
        message = f"{tensor.fqn}: box {rows.at(row)} outside of shape {tensor.shape}"
        raise LayoutError(message, fqn=tensor.fqn)


def _sift(
    rows: Rows, is_planned: npt.NDArray[np.bool_], table: Table
) -> tuple[list[int], list[int]]:
    """Return the tensors whose distinct boxes are disjoint and add up, and those in doubt."""
    rows, same = same_as_last(rows)
    planned = is_planned[rows.owner]
    # Equal boxes stand side by side: two of them planned means that this tensor is not in order.
    run = np.cumsum(~same) - 1
    writers = np.bincount(run, weights=planned)
    doubtful = set(rows.tensor[writers[run] > 1].tolist())
    rows = rows.take(~same)
    doubtful.update(find_crowded(rows).tolist())
    elements = np.zeros(len(table.tensors), np.int64)
    np.add.at(elements, rows.tensor, rows.volume)
    seen = np.unique(rows.tensor).tolist()
    doubtful.update(p for p in seen if int(elements[p]) != table.tensors[p].elements)
    return [place for place in seen if place not in doubtful], sorted(doubtful)


def _prove(suspect: _Suspect, region: Box, written: list[_Written], dim: int) -> None:
    """Prove one region of one tensor; all of `written` span it in the dimensions before `dim`."""
    planned = [w for w in written if w.is_planned]
    if not written:
        _refuse_hole(suspect, region)
    if len(planned) <= 1 and any(_spans(w.box, region, dim) for w in written):
        return
    if dim == len(region.start):
        _refuse_overlap(suspect, region, planned)
    pending = sorted(written, key=lambda w: w.box.start[dim], reverse=True)
    edges = {region.start[dim], region.stop[dim]}
    edges.update(n for w in written for n in (w.box.start[dim], w.box.stop[dim]))
    active: list[_Written] = []
    for a, b in pairwise(sorted(edges)):
        active = [w for w in active if w.box.stop[dim] > a]
        while pending and pending[-1].box.start[dim] <= a:
            active.append(pending.pop())
        start = (*region.start[:dim], a, *region.start[dim + 1 :])
        stop = (*region.stop[:dim], b, *region.stop[dim + 1 :])
        _prove(suspect, Box(start, stop), active, dim + 1)


def _spans(box: Box, region: Box, dim: int) -> bool:
    return box.start[dim:] == region.start[dim:] and box.stop[dim:] == region.stop[dim:]


def _refuse_hole(suspect: _Suspect, hole: Box) -> NoReturn:
    fqn = suspect.tensor.fqn
    raise LayoutError(
        f"box {hole} of {fqn} was written by no rank; {join_ranks(suspect.holders)} "
        f"hold{'s' if len(suspect.holders) == 1 else ''} parts of {fqn}",
        fqn=fqn,
        ranks=suspect.holders,
    )


def _refuse_overlap(suspect: _Suspect, region: Box, planned: list[_Written]) -> NoReturn:
    fqn = suspect.tensor.fqn
    ranks = sorted({w.rank for w in planned})
    raise LayoutError(
        f"box {region} of {fqn} was written more than once by plan: {join_ranks(ranks)}",
        fqn=fqn,
        ranks=ranks,
    )
