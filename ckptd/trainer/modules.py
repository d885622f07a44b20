"""What a module holds, by the names that its wrappers do not show in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import Parameter

from ckptd.trainer.wrappers import clean_name, clean_paths, unwrap


class ModuleState(NamedTuple):
    """The ``state_dict`` of an unwrapped module, with the live tensors in it.

    `keys` are as ``load_state_dict`` of `module` wants them, `fqns` the names in the checkpoint.
    What is not a tensor is extra state.
    """

    module: nn.Module
    prefix: str
    fqns: Sequence[str]
    keys: Sequence[str]
    values: Sequence[object]

    def live_ids(self) -> set[int]:
        """Return the ids of the parameters and buffers that can be written in place."""
        own = {id(p) for p in self.module.parameters()}
        return own | {id(b) for b in self.module.buffers()}


def module_state(module: nn.Module, prefix: str) -> ModuleState:
    """Return what `module` saves, names starting with `prefix`. No tensor is copied or detached.

    Raises:
        UnsupportedValueError: a part of it is sharded by a wrapper that is not supported.
    """
    inner = unwrap(module)
    paths = clean_paths(inner, prefix)
    held = inner.state_dict(prefix=prefix, keep_vars=True)
    fqns = list(held)
    keys = [name[len(prefix) :] for name in fqns]
    if paths is not None:
        fqns = [clean_name(name, paths) for name in fqns]
    return ModuleState(inner, prefix, fqns, keys, list(held.values()))


class Names:
    """The FQNs of parameters; a tied parameter goes by the first of its names in sorting order."""

    def __init__(self, states: Iterable[ModuleState]) -> None:
        self._states = list(states)
        self._by_id: dict[int, str] = {}
        self._has_all = False
        for state in self._states:
            self._note(zip(state.fqns, state.values, strict=True))

    def find(self, parameter: torch.Tensor) -> str | None:
        """Return the FQN of a live parameter, or None where no module of the state has it.

        Parameters that a module leaves out of its ``state_dict`` have names too, so that their
        optimizer state can be saved.
        """
        fqn = self._by_id.get(id(parameter))
        if fqn is None and not self._has_all:
            self._has_all = True
            for state in self._states:
                paths = clean_paths(state.module, state.prefix) or {}
                held = state.module.named_parameters(state.prefix[:-1], remove_duplicate=False)
                self._note((clean_name(name, paths), value) for name, value in held)
            fqn = self._by_id.get(id(parameter))
        return fqn

    def _note(self, named: Iterable[tuple[str, object]]) -> None:
        names = self._by_id
        for fqn, value in named:
            if is_parameter(value) and names.setdefault(id(value), fqn) > fqn:
                names[id(value)] = fqn


def is_parameter(value: object) -> bool:
    """Tell whether a tensor of a ``state_dict`` is a parameter rather than a buffer."""
    return type(value) is Parameter or isinstance(value, Parameter)
