"""What a module holds, by the names that its wrappers do not show in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import Parameter

from ckptd.errors import UnsupportedValueError
from ckptd.trainer.fsdp1 import FlatPiece, flat_parameters, inside, is_flat, wrappers_in
from ckptd.trainer.wrappers import clean_modules, clean_name, clean_paths, unwrap


class ModuleState(NamedTuple):
    """The ``state_dict`` of an unwrapped module, with the live tensors in it.

    `keys` are as ``load_state_dict`` of `module` wants them, `fqns` the names in the checkpoint.
    What is neither a tensor nor a `FlatPiece` is extra state. `originals` are the parameters that have
    an object of their own beside a piece.
    """

    module: nn.Module
    prefix: str
    fqns: Sequence[str]
    keys: Sequence[str]
    values: Sequence[object]
    originals: Sequence[tuple[str, torch.Tensor, FlatPiece]] = ()

    def live_ids(self) -> set[int]:
        """Return the ids of the parameters and buffers that can be written in place."""
        own = {id(p) for p in self.module.parameters()}
        own |= {id(value) for value in self.values if isinstance(value, FlatPiece)}
        return own | {id(b) for b in self.module.buffers()}


def module_state(module: nn.Module, prefix: str) -> ModuleState:
    """Return what `module` saves, names starting with `prefix`. No tensor is copied or detached.

    Parameters that FSDP2 has gathered, for an evaluation say, are let go of, by a hook of ``state_dict``.

    Raises:
        UnsupportedValueError: FSDP1 keeps something of it in a form that has no stored one.
    """
    if wrappers_in(module):
        return _flat_state(module, prefix)
    inner = unwrap(module)
    paths = clean_paths(inner, prefix)
    held = inner.state_dict(prefix=prefix, keep_vars=True)
    fqns = list(held)
    keys = [name[len(prefix) :] for name in fqns]
    if paths is not None:
        fqns = [clean_name(name, paths) for name in fqns]
    return ModuleState(inner, prefix, fqns, keys, list(held.values()))


def _flat_state(root: nn.Module, prefix: str) -> ModuleState:
    """Return the same where FSDP1 is in `root`, whose ``state_dict`` would gather or refuse."""
    inner = {
        (id(found.module), found.name): found
        for flat in flat_parameters(root)
        for found in inside(prefix, flat)
    }
    named: dict[str, object] = {}
    originals = []
    for path, module in clean_modules(root, prefix):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedValueError(
                f"{path}_extra_state: extra state of a module inside of FullyShardedDataParallel is"
                " not supported; use fully_shard",
                fqn=f"{path}_extra_state",
            )
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (id(module), name) not in inner and not is_flat(parameter):
                named[path + name] = parameter
        skipped = module._non_persistent_buffers_set  # noqa: SLF001 - it has no public name
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in skipped:
                named[path + name] = buffer
        for found in inner.values():
            if found.module is module:
                named[path + found.name] = found.piece
                if found.parameter is not None:
                    originals.append((path + found.name, found.parameter, found.piece))
    keys = [fqn[len(prefix) :] for fqn in named]
    return ModuleState(root, prefix, list(named), keys, list(named.values()), originals)


class Names:
    """The FQNs of parameters; a tied parameter goes by the first of its names in sorting order."""

    def __init__(self, states: Iterable[ModuleState]) -> None:
        self._states = list(states)
        self._by_id: dict[int, str] = {}
        self._pieces: dict[int, FlatPiece] = {}
        self._has_all = False
        for state in self._states:
            self._note(zip(state.fqns, state.values, strict=True))
            for fqn, parameter, piece in state.originals:
                self._pieces[id(parameter)] = piece
                self._note([(fqn, parameter)])

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
                self._note((clean_name(name, paths), p) for name, p in held if not is_flat(p))
            fqn = self._by_id.get(id(parameter))
        return fqn

    def piece(self, parameter: torch.Tensor) -> FlatPiece | None:
        """Return what a parameter of FSDP1 is a part of; None for any other."""
        return self._pieces.get(id(parameter))

    def _note(self, named: Iterable[tuple[str, object]]) -> None:
        names = self._by_id
        for fqn, value in named:
            if is_parameter(value) and names.setdefault(id(value), fqn) > fqn:
                names[id(value)] = fqn


def is_parameter(value: object) -> bool:
    """Tell whether a tensor of a ``state_dict`` is a parameter rather than a buffer."""
    return type(value) is Parameter or isinstance(value, (Parameter, FlatPiece))
