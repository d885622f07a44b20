"""What all ranks want alike is read once: each reads a part and passes it on to the others.

Over the job's own process group, and only after every rank has said, over the meeting, that it has read its
part: a collective that one rank does not enter hangs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import xxhash

from ckptd.trainer.targets import Target
from ckptd.trainer.wrappers import is_lazy

# Smaller tensors go together: a broadcast costs about as long as this many bytes take.
JOIN_BYTES = 256 << 10
BUCKET_BYTES = 8 << 20


def digest_of(targets: Sequence[Target]) -> str:
    """Return what is equal on ranks that want the same, in memory of one kind."""
    rows = [
        (t.fqn, t.box, str(t.dtype), str(t.tensor.dtype), t.tensor.device.type) for t in targets
    ]
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(rows))


def may_pass(targets: Sequence[Target], world_size: int) -> bool:
    """Tell whether the job's process group can carry these."""
    if not has_group(world_size):
        return False
    carried = carried_devices()
    return all(target.tensor.device.type in carried for target in targets)


def has_group(world_size: int) -> bool:
    """Tell whether the job has a process group of so many ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() == world_size


def carried_devices() -> set[str]:
    """Return the types of the devices whose tensors the job's process group carries."""
    return {name.partition(":")[0] for name in str(dist.get_backend_config()).split(",")}


class Passing:
    """The same targets on all ranks of a job. Every rank calls `run`, in the same order."""

    def __init__(self, targets: Sequence[Target], rank: int, world_size: int) -> None:
        self._targets = targets
        self._shares = list(_shares([t.tensor.nbytes for t in targets], world_size))
        self.own = self._shares[rank]

    def run(self) -> None:
        """Take what the others have read, and give them what this rank has."""
        with torch.no_grad():
            for owner, share in enumerate(self._shares):
                for bucket in _buckets([self._targets[i].tensor for i in share]):
                    _broadcast(bucket, owner)


def _shares(sizes: Sequence[int], world_size: int) -> Iterator[range]:
    """Cut places into runs of about equal bytes, one for each rank."""
    total, at, bounds = sum(sizes), 0, [0]
    for place, size in enumerate(sizes):
        while len(bounds) < world_size and (2 * at + size) * world_size > 2 * total * len(bounds):
            bounds.append(place)
        at += size
    bounds += [len(sizes)] * (world_size + 1 - len(bounds))
    return (range(first, last) for first, last in pairwise(bounds))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield large tensors by themselves and small ones of a kind together."""
    small: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes > JOIN_BYTES:
            yield [tensor]
            continue
        bucket = small.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(held.nbytes for held in bucket) > BUCKET_BYTES:
            yield small.pop((tensor.dtype, tensor.device))
    yield from small.values()


def _broadcast(bucket: list[torch.Tensor], owner: int) -> None:
    """Send tensors from `owner` to all, as bytes, since not every group knows every dtype."""
    is_direct = len(bucket) == 1 and bucket[0].is_contiguous() and not is_lazy(bucket[0])
    if is_direct:
        dist.broadcast(bucket[0].detach().view(-1).view(torch.uint8), owner)
        return
    flat = torch.cat([t.detach().resolve_conj().resolve_neg().reshape(-1) for t in bucket])
    dist.broadcast(flat.view(torch.uint8), owner)
    if dist.get_rank() != owner:
        for tensor, part in zip(
            bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True
        ):
            tensor.copy_(part.view(tensor.shape))
