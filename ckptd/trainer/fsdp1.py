"""Parameters inside of the flat ones of ``FullyShardedDataParallel``.

Its public state dicts are collectives at every save, and gather. What a rank holds is written in the
flat parameter itself. These names are private to torch and used in this file only: ``_handle``,
``_local_shard``, ``_params``, ``_shared_params``, ``_param_infos``, ``_shared_param_infos``, ``_shapes``,
``_contiguities``, ``_shard_param_infos``, ``_full_param_padded``, ``uses_sharded_strategy``,
``needs_unshard``, ``reshard``, ``post_reshard``.
Seen in torch 2.6 to 2.13.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ckptd.errors import UnsupportedValueError
from ckptd.model.box import Box

_MODULE = "torch.distributed.fsdp"
WRAPPED = "_fsdp_wrapped_module"


class FlatPiece:
    """The part of one parameter that this rank holds: `count` elements in row-major order from `first`.

    `memory` has them. Looks like a tensor of the parameter's own shape where that is asked for.
    """

    def __init__(self, shape: tuple[int, ...], first: int, memory: torch.Tensor) -> None:
        self.shape = torch.Size(shape)
        self.first = first
        self.count = memory.numel()
        self.dtype = memory.dtype
        self.device = memory.device
        self.requires_grad = memory.requires_grad
        self.boxes = tuple(boxes_of_run(shape, first, first + self.count))
        flat = memory.detach().view(-1)
        at = 0
        parts = []
        for box in self.boxes:
            parts.append(flat[at : at + box.volume].view(box.shape))
            at += box.volume
        self.parts = tuple(parts)

    def of(self, memory: torch.Tensor) -> FlatPiece:
        """Return the same part of something else, such as a moment, that has this memory here."""
        return FlatPiece(tuple(self.shape), self.first, memory)


Holding = torch.Tensor | FlatPiece
"""What may stand for a tensor of a state."""


class Inside(NamedTuple):
    """A parameter in a flat one: where it is an attribute, its own object if it has one, its part."""

    module: nn.Module
    name: str
    parameter: torch.Tensor | None
    piece: FlatPiece


def wrappers_in(root: nn.Module) -> list[Any]:
    """Return FSDP1's wrappers in `root`; a process that never imported them has none."""
    kind = getattr(sys.modules.get(_MODULE), "FullyShardedDataParallel", None)
    return [] if kind is None else [m for m in root.modules() if isinstance(m, kind)]


def is_flat(parameter: object) -> bool:
    """Tell whether this is a flat parameter itself."""
    return hasattr(parameter, "_shard_param_infos")


def reshard(root: nn.Module) -> None:
    """Let go of gathered parameters in `root`, which writes to what this rank holds would not reach."""
    for wrapper in wrappers_in(root):
        handle = wrapper._handle
        # The memory for gathered parameters comes with the first forward pass.
        if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):
            continue
        if handle.uses_sharded_strategy and not handle.needs_unshard():
            handle.reshard(free_unsharded_flat_param=True)
            handle.post_reshard()


def flat_parameters(root: nn.Module) -> list[Any]:
    """Return the flat parameters in `root`."""
    handles = (wrapper._handle for wrapper in wrappers_in(root))
    return [handle.flat_param for handle in handles if handle is not None]


def inside(path: str, flat: Any) -> Iterator[Inside]:
    """Yield the parameters in a flat one, tied ones too, which share their `piece`.

    Raises:
        UnsupportedValueError: a parameter is not contiguous, so that its elements have another order.
    """
    local = getattr(flat, "_local_shard", flat.data)  # the same before the first forward pass
    own = flat._params or [None] * len(flat._shapes)
    pieces: dict[tuple[int, str], FlatPiece] = {}
    rows = zip(
        flat._param_infos, flat._shapes, flat._contiguities, flat._shard_param_infos, own,
        strict=True,
    )  # fmt: skip
    for info, shape, is_contiguous, shard, parameter in rows:
        if not is_contiguous:
            raise UnsupportedValueError(
                f"{path}{info.param_name}: FSDP keeps this parameter, which is not contiguous, in"
                " another order; make it contiguous or use fully_shard",
                fqn=path + info.param_name,
            )
        start, count = (shard.offset_in_shard, shard.numel_in_shard) if shard.in_shard else (0, 0)
        memory = local[start : start + count].detach()
        memory.requires_grad_((parameter if parameter is not None else flat).requires_grad)
        first = shard.intra_param_start_idx if shard.in_shard else 0
        piece = pieces[id(info.module), info.param_name] = FlatPiece(tuple(shape), first, memory)
        yield Inside(info.module, info.param_name, parameter, piece)
    shared = flat._shared_params or [None] * len(flat._shared_param_infos)
    for tied, parameter in zip(flat._shared_param_infos, shared, strict=True):
        piece = pieces[id(tied.prim_module), tied.prim_param_name]
        yield Inside(tied.module, tied.param_name, parameter, piece)


def boxes_of_run(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Yield the boxes that elements `first` to `last` (half open, row-major) of a tensor are, in order.

    At most 2n - 1 for n dimensions: a ragged head and tail of each but the last.
    """
    if first >= last:
        return
    if not shape:
        yield Box((), ())
        return
    row = 1
    for extent in shape[1:]:
        row *= extent
    top, bottom = -(-first // row), last // row  # whole rows from top to bottom
    if top > bottom:  # all in one row
        yield from _in_row(shape, bottom, first - bottom * row, last - bottom * row)
        return
    if first < top * row:
        yield from _in_row(shape, top - 1, first - (top - 1) * row, row)
    if top < bottom:
        yield Box((top, *(0 for _ in shape[1:])), (bottom, *shape[1:]))
    if bottom * row < last:
        yield from _in_row(shape, bottom, 0, last - bottom * row)


def _in_row(shape: tuple[int, ...], index: int, first: int, last: int) -> Iterator[Box]:
    for box in boxes_of_run(shape[1:], first, last):
        yield Box((index, *box.start), (index + 1, *box.stop))
