"""What this rank holds, as the layout that ranks agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash

from ckptd.model.box import Box
from ckptd.model.tensor import REPLICATED_KINDS, Held, Layout, Tensor
from ckptd.trainer.flatten import Flat, Leaf, survey
from ckptd.trainer.optimizers import Predicted, predict_state
from ckptd.trainer.wrappers import DTYPE_NAMES

SAMPLES = 64


def layout_of(flat: Flat) -> Layout:
    """Return the layout of a flattened state; ``held[i]`` is ``flat.leaves[i]``.

    Make it anew only when `Flat.signature` has changed.
    """
    return Layout(tuple(map(_held, flat.leaves)), dict(flat.aliases))


def predicted_layout(state: Mapping[str, object], flat: Flat) -> Layout:
    """Return the layout that `state` will have after the first step of its optimizers.

    `flat` is the state as it is now, flattened.
    """
    now = layout_of(flat)
    surveyed = survey(state)
    coming = [
        tensor
        for part in surveyed.parts
        if part.role == "optimizer"
        for optimizer in part.live
        for tensor in predict_state(part.name, optimizer, surveyed.names)
    ]
    held = sorted((*now.held, *map(_coming, coming)), key=lambda h: h.tensor.fqn)
    return Layout(tuple(held), now.aliases)


def _held(leaf: Leaf) -> Held:
    tensor = leaf.tensor
    shape = tuple(tensor.shape)
    name = DTYPE_NAMES[tensor.dtype]
    row = Tensor(leaf.fqn, name, shape, leaf.kind, leaf.requires_grad, str(tensor.device))
    if leaf.shards is not None:
        return Held(row, *leaf.shards.about())
    return Held(row, (Box.full(shape),))


def _coming(tensor: Predicted) -> Held:
    name = DTYPE_NAMES[tensor.dtype]
    row = Tensor(tensor.fqn, name, tensor.shape, "optimizer", False, str(tensor.device))
    if tensor.shards is not None:
        return Held(row, *tensor.shards.about())
    return Held(row, (Box.full(tensor.shape),))


def fingerprints(leaves: Sequence[Leaf]) -> list[int]:
    """Return 64 bits for each leaf that are equal where replicas are, never 0; 0: not sampled.

    Parameters and optimizer tensors are sampled: the first and last element and about 64 between
    them, by place in row-major order, so that memory formats do not matter. Waits once for each
    device. What differs only between the samples is not seen.
    """
    found = [0] * len(leaves)
    with torch.no_grad():
        samples = {
            i: _sample_all(leaf.parts)
            for i, leaf in enumerate(leaves)
            if leaf.kind in REPLICATED_KINDS and _is_sampled(leaf)
        }
        by_device: dict[torch.device, list[int]] = {}
        for i, sample in samples.items():
            by_device.setdefault(sample.device, []).append(i)
        for places in by_device.values():
            sizes = [samples[i].numel() for i in places]
            packed = torch.cat([samples[i] for i in places]).cpu().numpy().tobytes()
            at = 0
            for i, size in zip(places, sizes, strict=True):
                found[i] = xxhash.xxh3_64_intdigest(packed[at : at + size]) or 1
                at += size
    return found


def _is_sampled(leaf: Leaf) -> bool:
    if leaf.shards is None:
        return leaf.tensor.numel() > 0
    return bool(leaf.shards.parts) and not leaf.shards.is_replicated


def fingerprint_bytes(leaves: Sequence[Leaf]) -> bytes:
    """Return `fingerprints` as they stand in a rank manifest: 8 bytes each, little-endian."""
    return np.array(fingerprints(leaves), "<u8").tobytes()


def _sample_all(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return _sample(parts[0]) if len(parts) == 1 else torch.cat([_sample(part) for part in parts])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    count = tensor.numel()
    stride = max(1, (count - 1) // (SAMPLES - 1)) if count > SAMPLES else 1
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        picked = torch.cat([flat[::stride], flat[-1:]])
    else:
        places = torch.arange(0, count, stride, device=tensor.device)
        places = torch.cat([places, places.new_full((1,), count - 1)])
        picked = tensor[torch.unravel_index(places, tensor.shape)]
    return picked.view(torch.uint8)
