"""What of a module cannot be written in place and goes through its ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import Parameter

from ckptd.errors import LayoutError
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Tensor
from ckptd.trainer.modules import ModuleState, is_parameter
from ckptd.trainer.stored import Stored
from ckptd.trainer.targets import Targets


class ModuleLoad:
    """The keys of one module that are no live tensors, and those that lie on the meta device.

    Attributes:
        fqns: by key, the names of extra state.
    """

    def __init__(self, held: ModuleState) -> None:
        self.name = held.prefix[:-1]
        self.fqns: dict[str, str] = {}
        self._held = held
        self._tensors: dict[str, torch.Tensor] = {}
        self._assigned: dict[str, torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {}  # by the id of what it takes the place of

    def compare(
        self, stored: Stored, targets: Targets, extra: Mapping[str, Tree]
    ) -> Iterator[tuple[str, Any]]:
        """Yield what can be written in place; find a source for all else.

        Raises:
            LayoutError: a buffer that is not saved would stay on the meta device.
        """
        check_hidden_buffers(self._held)
        live = self._held.live_ids()
        unfound: list[tuple[str, str, Any]] = []
        for fqn, key, value in zip(
            self._held.fqns, self._held.keys, self._held.values, strict=True
        ):
            if not targets.terms.wants(fqn, self.name):
                continue
            is_meta = isinstance(value, torch.Tensor) and value.is_meta
            if id(value) in live and not is_meta:
                yield fqn, value
                continue
            row = stored.find(fqn)
            if row is not None:
                self._add(fqn, key, value, row, targets)
            elif fqn in extra:
                self.fqns[key] = fqn
            else:
                unfound.append((fqn, key, value))
        for fqn, key, value in unfound:
            if id(value) in self._made:  # tied to one that was found
                self._assigned[key] = self._made[id(value)]
            else:
                targets.missing.append(fqn)

    def _add(self, fqn: str, key: str, value: Any, row: Tensor, targets: Targets) -> None:
        like = value.detach() if isinstance(value, torch.Tensor) else None
        if like is not None and not targets.fits(fqn, row, tuple(like.shape), like.dtype):
            return
        if like is None or not like.is_meta:
            self._tensors[key] = targets.fresh(row, like=like)
            return
        if id(value) not in self._made:
            made = targets.materialise(row, like)
            if is_parameter(value):
                made = Parameter(made, requires_grad=value.requires_grad)
            self._made[id(value)] = made
        self._assigned[key] = self._made[id(value)]

    def finish(self, extra: Mapping[str, Any]) -> None:
        """Set it all; `extra` is the decoded extra state by name."""
        found = {key: extra[fqn] for key, fqn in self.fqns.items() if fqn in extra}
        module = self._held.module
        if self._tensors or found:
            module.load_state_dict({**self._tensors, **found}, strict=False)
        if self._assigned:
            module.load_state_dict(self._assigned, strict=False, assign=True)

    def is_empty(self) -> bool:
        """Tell whether there is nothing to set."""
        return not (self._tensors or self._assigned or self.fqns)


def check_hidden_buffers(held: ModuleState) -> None:
    """Refuse buffers on the meta device that no checkpoint has, and so nothing would ever fill.

    Raises:
        LayoutError: naming one.
    """
    saved = {id(value) for value in held.values}
    for name, buffer in held.module.named_buffers():
        if buffer.is_meta and id(buffer) not in saved:
            raise LayoutError(
                f"{held.prefix}{name}: this buffer is not saved (persistent=False) and lies on the meta"
                " device: compute it on a device before restoring",
                fqn=f"{held.prefix}{name}",
            )


def check_meta_parameters(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of parameters that a restore will replace: it would train what is gone.

    Raises:
        LayoutError: naming the entry.
    """
    if any(p.is_meta for group in optimizer.param_groups for p in group["params"]):
        raise LayoutError(
            f"{name}: it holds parameters on the meta device, which are replaced when the module is"
            " restored: call module.to_empty(device=...) before making the optimizer, or restore the"
            " module first",
            fqn=name,
        )
