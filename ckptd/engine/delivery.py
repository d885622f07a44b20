"""A handoff as a rank manifest."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ckptd.model.manifest import FORMAT, Chunk, RankManifest
from ckptd.wire.messages import Handoff, Recipe


class Author(NamedTuple):
    """Who took a snapshot."""

    attempt: int
    rank: int
    world_size: int


def rank_manifest_of(
    author: Author,
    handoff: Handoff,
    recipe: Recipe,
    values: dict[str, Any],
    chunks: tuple[Chunk, ...],
    *,
    previous: str | None,
) -> RankManifest:
    """Return what a rank wrote, or would write, of a step; `chunks` in the order of the recipe."""
    return RankManifest(
        format=FORMAT, step=handoff.step, attempt=author.attempt, rank=author.rank,
        world_size=author.world_size, sequence=handoff.sequence, plan=recipe.plan,
        layout=recipe.layout, previous=previous, parent=None,
        captured_at=handoff.captured_at,
        metrics={k: v if math.isfinite(v) else None for k, v in handoff.metrics.items()},
        tensors=recipe.tensors, aliases=recipe.aliases, chunks=chunks, pieces=recipe.pieces,
        fingerprints=handoff.fingerprints, values=values,
    )  # fmt: skip
