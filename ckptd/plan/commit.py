"""From the rank manifests of a step to its manifest: all that a commit cross-checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from ckptd.errors import IncompleteError, SaveFailedError
from ckptd.model.box import Box
from ckptd.model.manifest import FORMAT, Manifest, RankEntry, RankManifest, Tree
from ckptd.plan.coverage import prove_coverage
from ckptd.plan.replicas import check_replicas
from ckptd.plan.table import group_ranks, join_ranks, merge_aliases, merge_tensors

# A checked rank manifest, the length of its stored bytes, and their xxh3-128.
CommitPart = tuple[RankManifest, int, str]


def manifest_of(parts: Sequence[CommitPart], *, is_layout_proven: bool = False) -> Manifest:
    """Make the manifest of a step from the manifests of all its ranks, in any order.

    The result depends on nothing else: whoever commits makes the same bytes. With
    `is_layout_proven` (see `layout_key`) the coverage is not proven again.

    Raises:
        IncompleteError: some ranks are not there.
        SaveFailedError: steps, attempts, world sizes, sequence numbers or plans are mixed, or a
            rank stands there twice.
        LayoutError: coverage has a hole or an overlap, ranks disagree about a tensor, or replicas
            differ (`ReplicaMismatchError`).
    """
    if not parts:
        raise ValueError("a commit of no rank manifests")
    parts = sorted(parts, key=lambda part: part[0].rank)
    records = [record for record, _, _ in parts]
    _check_one_save(records)
    check_replicas([(m.rank, _fingerprints(m)) for m in records if m.fingerprints])
    if not is_layout_proven:
        prove_coverage(records)
    first = records[0]
    tensors = merge_tensors(records).tensors
    return Manifest(
        format=FORMAT,
        step=first.step,
        attempt=first.attempt,
        world_size=first.world_size,
        sequence=first.sequence,
        previous=first.previous,
        captured_at=first.captured_at,
        metrics=first.metrics,
        raw_bytes=sum(tensor.bytes for tensor in tensors),
        stored_bytes=_stored_bytes(records),
        tensors=tensors,
        aliases=merge_aliases(records, tensors),
        differing=_differing(records),
        ranks=tuple(RankEntry(record.rank, length, hash_) for record, length, hash_ in parts),
    )


def layout_key(parts: Sequence[CommitPart]) -> str:
    """Return 32 hex digits under which a proof of coverage may be kept.

    Equal for steps whose ranks held the same and wrote the same boxes of it.
    """
    rows = [
        (m.rank, m.world_size, m.layout, m.plan, m.pieces.tensor, m.pieces.box)
        for m in sorted((part[0] for part in parts), key=lambda m: m.rank)
    ]
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(msgspec.msgpack.encode(row))
    return digest.hexdigest()


def _check_one_save(records: Sequence[RankManifest]) -> None:
    step = records[0].step
    for field in ("step", "attempt", "world_size", "sequence"):
        said = {m.rank: getattr(m, field) for m in records}
        if len(set(said.values())) > 1:
            raise SaveFailedError(f"ranks differ in {field}: {group_ranks(said)}", step=step)
    plans = {m.rank: m.plan for m in records if m.plan is not None}
    if len(set(plans.values())) > 1:
        message = f"ranks followed different split plans: {group_ranks(plans)}"
        raise SaveFailedError(message, step=step)
    ranks = Counter(m.rank for m in records)
    expected = range(records[0].world_size)
    if odd := sorted(r for r, count in ranks.items() if r not in expected or count > 1):
        message = f"{join_ranks(odd)} of {len(expected)}: twice, or out of range"
        raise SaveFailedError(message, step=step)
    if missing := sorted(set(expected) - set(ranks)):
        message = f"no rank manifest of {join_ranks(missing)} of {len(expected)}"
        raise IncompleteError(message, step=step, missing_ranks=missing)


def _fingerprints(manifest: RankManifest) -> dict[tuple[str, tuple[Box, ...]], int]:
    """Return the fingerprints by what they are of: the boxes of a tensor as the rank wrote them."""
    if manifest.plan is not None:
        return {}
    boxes: dict[int, list[Box]] = {}
    for piece in manifest.unpack():
        boxes.setdefault(piece.tensor, []).append(piece.box)
    samples = np.frombuffer(manifest.fingerprints, dtype="<u8").tolist()
    return {
        (manifest.tensors[place].fqn, tuple(boxes.get(place, ()))): sample
        for place, sample in enumerate(samples)
        if sample
    }


def _stored_bytes(records: Sequence[RankManifest]) -> int:
    sizes = {(c.hash, c.birth): c.stored_bytes for m in records for c in m.chunks}
    return sum(sizes.values())


def _differing(records: Sequence[RankManifest]) -> tuple[str, ...]:
    """Return the names of values that are not the same on all ranks, or that some ranks lack."""
    first = records[0].values
    encoded = {name: _encoded(value) for name, value in first.items()}
    differing: set[str] = set()
    for record in records[1:]:
        differing |= first.keys() ^ record.values.keys()
        for name in first.keys() - differing:
            mine, theirs = first[name], record.values[name]
            # `RankReader` makes equal ones one.
            if mine is not theirs and encoded[name] != _encoded(theirs):
                differing.add(name)
    return tuple(sorted(differing))


def _encoded(value: Tree) -> bytes:
    return msgspec.json.encode(value, order="sorted")
