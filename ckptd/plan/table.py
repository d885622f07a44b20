"""One tensor table out of many: what the ranks of a step, taken together, say that they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.errors import LayoutError
from ckptd.model.manifest import RankManifest
from ckptd.model.tensor import Tensor

Ints = npt.NDArray[np.int64]


class Table(NamedTuple):
    """The tensors of all ranks, each once, as its lowest holder among the ranks describes it.

    `places[m][t]` is the place in `tensors` of tensor `t` of the m-th manifest that was merged.
    """

    tensors: tuple[Tensor, ...]
    places: tuple[Ints, ...]

    def holders(self, place: int, manifests: Sequence[RankManifest]) -> list[int]:
        """Return the ranks whose tables have this tensor, lowest first."""
        has = zip(self.places, manifests, strict=True)
        return sorted(m.rank for places, m in has if place in places)


def merge_tensors(manifests: Sequence[RankManifest]) -> Table:
    """Merge tensor tables in the order given; rows stand in the order in which they first appear.

    Raises:
        LayoutError: two ranks give one tensor another dtype, shape or kind.
    """
    merged: dict[str, tuple[int, int, Tensor]] = {}
    places: list[Ints] = []
    last: tuple[list[Any], ...] | None = None
    known: dict[int, Ints] = {}  # by the table's identity; `RankReader` makes equal ones one
    for manifest in manifests:
        found = known.get(id(manifest.tensors))
        if found is None:
            columns = _columns(manifest.tensors)
            # Ranks mostly hold the same names: comparing columns costs a tenth of looking up rows.
            found = _add(merged, manifest) if columns != last else places[-1]
            last = columns
            known[id(manifest.tensors)] = found
        else:
            last = None
        places.append(found)
    return Table(tuple(tensor for _, _, tensor in merged.values()), tuple(places))


def merge_aliases(
    manifests: Sequence[RankManifest], tensors: Iterable[Tensor] = ()
) -> dict[str, str]:
    """Merge the alias tables of all ranks; `tensors` are those of all ranks.

    Raises:
        LayoutError: two ranks give one alias another target, or an alias is another rank's tensor.
    """
    merged: dict[str, str] = {}
    said_by: dict[str, int] = {}
    for manifest in manifests:
        for alias, target in manifest.aliases.items():
            first = merged.setdefault(alias, target)
            said_by.setdefault(alias, manifest.rank)
            if first != target:
                ranks = (said_by[alias], manifest.rank)
                raise LayoutError(
                    f"{alias} is tied to {first} on rank {ranks[0]}, to {target} on rank {ranks[1]}",
                    fqn=alias,
                    ranks=ranks,
                )
    names = {tensor.fqn for tensor in tensors} if merged else set()
    for alias, target in merged.items():
        if alias in names:
            raise LayoutError(
                f"{alias} is a second name of {target} on rank {said_by[alias]}, "
                "and a tensor of its own on another rank",
                fqn=alias,
                ranks=(said_by[alias],),
            )
    return merged


def check_same(first: Tensor, first_rank: int, other: Tensor, other_rank: int) -> None:
    """Check that two ranks mean the same tensor by one FQN.

    Raises:
        LayoutError: naming FQN, ranks and what differs.
    """
    for field in ("dtype", "shape", "kind"):
        mine, theirs = getattr(first, field), getattr(other, field)
        if mine != theirs:
            raise LayoutError(
                f"{first.fqn}: {field} is {mine} on rank {first_rank} "
                f"and {theirs} on rank {other_rank}",
                fqn=first.fqn,
                ranks=(first_rank, other_rank),
            )


def join_ranks(ranks: Iterable[int], *, most: int = 8) -> str:
    """Write ranks for people: ``rank 3``, ``ranks 0, 1, 2 and 29 more``."""
    rows = list(ranks)
    text = ", ".join(map(str, rows[:most]))
    if len(rows) > most:
        text += f" and {len(rows) - most} more"
    return f"rank {text}" if len(rows) == 1 else f"ranks {text}"


def group_ranks(values: Mapping[int, object]) -> str:
    """Write who says what: ``7 (ranks 0, 1), 8 (rank 2)``."""
    groups: dict[object, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    return ", ".join(f"{value} ({join_ranks(ranks)})" for value, ranks in groups.items())


def _columns(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    return (
        [t.fqn for t in tensors],
        [t.shape for t in tensors],
        [t.dtype for t in tensors],
        [t.kind for t in tensors],
    )


def _add(merged: dict[str, tuple[int, int, Tensor]], manifest: RankManifest) -> Ints:
    places = []
    for tensor in manifest.tensors:
        place, rank, first = merged.setdefault(tensor.fqn, (len(merged), manifest.rank, tensor))
        if first is not tensor:
            check_same(first, rank, tensor, manifest.rank)
        places.append(place)
    return np.array(places, dtype=np.int64)
