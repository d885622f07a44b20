"""Did a tensor change while it was being copied? A few elements of it know."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ckptd.trainer.pinning import side_stream

STRIDE = 8192
"""One element in so many is remembered: 4 KiB of 32 MiB of float32."""

# Not the global generator: its state belongs to the job.
_dice = random.Random()  # noqa: S311 - no secret


class Copied(NamedTuple):
    """A tensor, or a part of one, and the place in the slot that it is copied to."""

    fqn: str
    source: torch.Tensor
    place: torch.Tensor


class Guard:
    """Elements of live tensors as they were when a save began.

    Every `STRIDE`-th element of each tensor, from a random offset that is another one each time. A
    write that reaches none of them is not seen. Version counters are no help: fused optimizers,
    foreach under FSDP2 and writes through ``.data`` leave them unchanged.
    """

    def __init__(self, copies: Sequence[Copied]) -> None:
        """Take the elements now. Does not wait for devices."""
        offset = _dice.randrange(STRIDE)
        groups: dict[tuple[torch.dtype, torch.device], list[Copied]] = {}
        for copied in copies:
            key = copied.source.dtype, copied.source.device
            groups.setdefault(key, []).append(copied)
        self._offset = offset
        self._taken = [
            (group, torch.cat([_pick(copied.source, offset) for copied in group]))
            for group in groups.values()
        ]

    def changed(self) -> list[str]:
        """Return the names of tensors whose copy shows another element than was there at first.

        Call it when all copies are done, from any thread.
        """
        found: list[str] = []
        for group, before in self._taken:
            after = torch.cat([_pick(copied.place, self._offset) for copied in group])
            here = _fetch(before)
            if not _is_same(here, after):
                found += _differing(group, here, after, self._offset)
        return sorted(set(found))


def _fetch(taken: torch.Tensor) -> torch.Tensor:
    """Bring elements to main memory; not behind what the job has its GPU do meanwhile."""
    if not taken.is_cuda:
        return taken
    with torch.cuda.stream(side_stream(taken.device)):
        return taken.cpu()


def _pick(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """Return one element in `STRIDE`, in row-major order, at least one."""
    count = tensor.numel()
    offset %= min(STRIDE, count)
    picked = (count - offset - 1) // STRIDE + 1
    if tensor.is_contiguous():
        return tensor.as_strided((picked,), (STRIDE,), tensor.storage_offset() + offset)
    places = torch.arange(offset, count, STRIDE, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # bits: NaNs are equal


def _differing(
    group: Sequence[Copied], before: torch.Tensor, after: torch.Tensor, offset: int
) -> list[str]:
    sizes = [_pick(copied.place, offset).numel() for copied in group]
    parts = zip(group, torch.split(before, sizes), torch.split(after, sizes), strict=True)
    return [copied.fqn for copied, one, other in parts if not _is_same(one, other)]
