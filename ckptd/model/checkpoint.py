"""What a person or a program sees of a committed checkpoint."""

from __future__ import annotations

import msgspec

from ckptd.model.keys import StepId
from ckptd.model.manifest import Manifest
from ckptd.model.tensor import Tensor
from ckptd.units import format_bytes


class TensorSummary(msgspec.Struct, frozen=True):
    """A tensor of a checkpoint; `shape` is the global shape, `bytes` the raw bytes of the whole.

    `device` is where it was when it was captured: on the lowest rank that held it.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    requires_grad: bool
    bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSummary:
        """Return what a row of a manifest's table says."""
        return cls(
            fqn=tensor.fqn,
            shape=tensor.shape,
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
            bytes=tensor.bytes,
        )


class Checkpoint(msgspec.Struct, frozen=True):
    """A committed checkpoint.

    `committed_at` is the store's own time of the commit, in seconds since 1970. `bytes` are the raw
    bytes of all tensors, each counted once; `stored_bytes` those of the chunks that hold them.
    `aliases` maps second names of tied tensors to the names that stand in `tensors`; `differing`
    are the values that are not the same on all ranks.
    """

    step: int
    attempt: int
    committed_at: float
    world_size: int
    previous: str | None
    bytes: int
    stored_bytes: int
    metrics: dict[str, float]
    tensors: tuple[TensorSummary, ...]
    aliases: dict[str, str]
    differing: tuple[str, ...]

    def __repr__(self) -> str:
        """Say which one it is: a thousand tensors are nothing to read in a log."""
        size = f"{len(self.tensors)} tensors, {format_bytes(self.bytes)}"
        return (
            f"Checkpoint(step={self.step}, attempt={self.attempt}, {size}, metrics={self.metrics})"
        )

    @property
    def id(self) -> StepId:
        """Step and attempt."""
        return StepId(attempt=self.attempt, step=self.step)

    @classmethod
    def of(cls, manifest: Manifest, committed_at: float) -> Checkpoint:
        """Return what a manifest says."""
        return cls(
            step=manifest.step,
            attempt=manifest.attempt,
            committed_at=committed_at,
            world_size=manifest.world_size,
            previous=manifest.previous,
            bytes=manifest.raw_bytes,
            stored_bytes=manifest.stored_bytes,
            metrics=manifest.numbers,
            tensors=tuple(TensorSummary.of(tensor) for tensor in manifest.tensors),
            aliases=manifest.aliases,
            differing=manifest.differing,
        )
