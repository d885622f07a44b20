"""Whether ranks that hold the same box also hold the same contents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from ckptd.errors import ReplicaMismatchError
from ckptd.model.box import Box
from ckptd.plan.holdings import Holdings, TensorNames, name_holdings
from ckptd.plan.table import join_ranks

Part = TypeVar("Part", Box, tuple[Box, ...], int)


def check_replicas(rows: Sequence[tuple[int, Mapping[tuple[str, Part], int]]]) -> None:
    """Compare the fingerprints that ranks give for what they hold, keyed by FQN and part.

    A part is a box, several, or a number that stands for them. Zero means "not sampled" and agrees
    with everything. Equal fingerprints are samples: they do not prove equal contents.

    Raises:
        ReplicaMismatchError: with the first FQN (as names sort) and the ranks that differ from the
            majority, or all of them where there is none.
    """
    first: dict[tuple[str, Part], int] = {}
    suspects: set[tuple[str, Part]] = set()
    for _, fingerprints in rows:
        for place, fingerprint in fingerprints.items():
            if fingerprint and first.setdefault(place, fingerprint) != fingerprint:
                suspects.add(place)
    if suspects:
        fqn, part = min(suspects, key=str)
        _refuse(fqn, _groups(rows, (fqn, part)), others=len({fqn for fqn, _ in suspects}) - 1)


def common_parts(rows: Sequence[tuple[Holdings, int]]) -> list[dict[int, tuple[str, int]]]:
    """Find what several ranks hold alike, and what nothing but samples can show to be equal.

    Each row is what some ranks hold, and how many they are. Returns for each row, by the place of a
    tensor, its FQN and a number that stands for the boxes of it: the keys of `check_replicas`.
    """
    of_tables: dict[int, TensorNames] = {}  # by the identity of a table, which ranks share
    named = []
    for held, _ in rows:
        if id(held.tensors) not in of_tables:
            of_tables[id(held.tensors)] = TensorNames.of(held.tensors)
        named.append(name_holdings(held, of_tables[id(held.tensors)]))
    weights = np.repeat([count for _, count in rows], [len(names) for names in named])
    found, place = np.unique(np.concatenate(named), return_inverse=True)
    ranks = np.bincount(place.reshape(-1), weights=weights)
    common = found[(ranks > 1) & (found != 0)]
    if not len(common):
        return [{} for _ in rows]
    return [
        {
            i: (held.tensors[i].fqn, int(names[i]))
            for i in np.flatnonzero(np.isin(names, common)).tolist()
        }
        for (held, _), names in zip(rows, named, strict=True)
    ]


def _groups(
    rows: Sequence[tuple[int, Mapping[tuple[str, Part], int]]], place: tuple[str, Part]
) -> list[list[int]]:
    """Return the ranks by what they hold, the largest group first."""
    groups: dict[int, list[int]] = {}
    for rank, fingerprints in rows:
        if fingerprint := fingerprints.get(place, 0):
            groups.setdefault(fingerprint, []).append(rank)
    return sorted((sorted(ranks) for ranks in groups.values()), key=lambda g: (-len(g), g))


def _refuse(fqn: str, groups: list[list[int]], *, others: int) -> None:
    has_majority = len(groups[0]) > len(groups[1])
    minority = sorted(rank for group in groups[has_majority:] for rank in group)
    text = "; ".join(join_ranks(group) for group in groups)
    more = f" ({others} more tensors differ too)" if others else ""
    raise ReplicaMismatchError(
        f"{fqn} differs between ranks that hold the same part of it: {text}{more}. Give it a DTensor "
        "placement if it is sharded, another name if it is not the same tensor",
        fqn=fqn,
        ranks=minority,
    )
