"""What a checkpoint holds, looked up by the names of a live state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch

from ckptd.errors import ConfigError, CorruptError, LayoutError, ShapeMismatchError
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Tensor
from ckptd.trainer.terms import MapLocation, Rename
from ckptd.trainer.wrappers import DTYPE_NAMES, DTYPES


class Stored:
    """The tensor table and the values of a checkpoint under the names that a live state uses."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        aliases: Mapping[str, str],
        values: Mapping[str, Tree],
        rename: Rename | None,
    ) -> None:
        self.tensors, self.values, self._aliases = tensors, values, aliases
        self._rename = _renamer(rename)
        self._optimizers = {name for name, tree in values.items() if is_optimizer(tree)}
        self.names: dict[str, str] = {}  # live name -> stored name
        for fqn in (*tensors, *aliases):
            live = self.live_name(fqn)
            if self.names.setdefault(live, fqn) != fqn:
                raise LayoutError(
                    f"rename gives two tensors of the checkpoint the name {live}", fqn=live
                )

    def live_name(self, fqn: str) -> str:
        """Return the name in the live state of a stored name."""
        head, slash, rest = fqn.partition("/")
        if slash and head in self._optimizers and "/" in rest:
            owner, _, key = rest.rpartition("/")
            return f"{head}/{self._rename(owner)}/{key}"
        return self._rename(fqn)

    def row(self, fqn: str) -> Tensor | None:
        """Return the row of a stored name, or of what it is an alias of."""
        return self.tensors.get(self._aliases.get(fqn, fqn))

    def find(self, live_name: str) -> Tensor | None:
        """Return the row that belongs to a live name."""
        fqn = self.names.get(live_name)
        return None if fqn is None else self.row(fqn)

    def other_names(self, live_name: str) -> list[str]:
        """Return a live name, and that of the tensor which it was tied to in the checkpoint."""
        fqn = self.names.get(live_name)
        target = self._aliases.get(fqn) if fqn is not None else None
        return [live_name] if target is None else [live_name, self.live_name(target)]

    def is_of_object(self, name: str) -> bool:
        """Tell whether an entry is a module or an optimizer, and not a value that looks like one."""
        tree = self.values[name]
        if is_module(tree):
            return any(fqn.startswith(f"{name}.") for fqn in (*self.tensors, *self._aliases))
        return is_optimizer(tree) and _is_optimizer_form(tree)

    def extra_states(self, values: Mapping[str, Tree]) -> dict[str, Tree]:
        """Return the extra state of all modules in `values` by live name."""
        found = {}
        for tree in values.values():
            if is_module(tree):
                for fqn, extra in tree["extra_state"].items():
                    found[self._rename(fqn)] = extra
        return found


def is_optimizer(tree: Tree) -> bool:
    """Tell whether a stored value is what is left of an optimizer without its tensors."""
    return type(tree) is dict and {"groups", "state_values"} <= tree.keys()


def check_optimizer(name: str, tree: Tree) -> None:
    """Check that a stored value has the form of an optimizer's, so that setting it cannot trip.

    Raises:
        CorruptError: it has not.
    """
    if not (is_optimizer(tree) and _is_optimizer_form(tree)):
        raise CorruptError(f"{name}: the stored value is not that of an optimizer")


def _is_optimizer_form(tree: Mapping[str, Any]) -> bool:
    return (
        type(tree["groups"]) is list
        and all(map(_is_group_form, tree["groups"]))
        and _is_object(tree["state_values"])
        and all(map(_is_object, tree["state_values"].values()))
        and _is_object(tree.get("shared", {}))
    )


def _is_group_form(group: Tree) -> bool:
    return (
        _is_object(group)
        and _is_object(group.get("options"))
        and all(_is_names(group.get(key, [])) for key in ("params", "idle", "elsewhere"))
        and "params" in group
        and type(group.get("class", "")) is str
    )


def _is_names(value: Tree) -> bool:
    return type(value) is list and all(type(name) is str for name in value)


def _is_object(value: Tree) -> TypeGuard[dict[str, Any]]:
    """Tell whether a stored value is a dict that stands for itself and is not a tag."""
    return type(value) is dict and not any(key[:1] == "$" for key in value)


def is_module(tree: Tree) -> bool:
    """Tell whether a stored value is what is left of a module without its tensors."""
    return (
        type(tree) is dict and list(tree) == ["extra_state"] and type(tree["extra_state"]) is dict
    )


def check_row(fqn: str, row: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check that a stored tensor fits a live one.

    Raises:
        ShapeMismatchError: naming both shapes, or both dtypes.
    """
    if row.shape != shape:
        raise ShapeMismatchError(
            f"{fqn} has shape {row.shape} in the checkpoint and {shape} in the state", fqn=fqn
        )
    if DTYPES.get(row.dtype) is not dtype:
        name = DTYPE_NAMES.get(dtype, dtype)
        raise ShapeMismatchError(
            f"{fqn} is {row.dtype} in the checkpoint and {name} in the state; dtype= casts",
            fqn=fqn,
        )


def dtype_of(row: Tensor) -> torch.dtype:
    """Return torch's dtype of a row.

    Raises:
        LayoutError: this torch has no such dtype; another one may.
    """
    dtype = DTYPES.get(row.dtype)
    if dtype is None:
        raise LayoutError(f"{row.fqn}: this torch has no dtype {row.dtype}", fqn=row.fqn)
    return dtype


def place(device: str, map_location: MapLocation) -> torch.device:
    """Return where a tensor that was on `device` goes now, as ``torch.load`` decides it.

    Without `map_location` it goes where it was if there is such a device here, else to the CPU.

    Raises:
        ConfigError: `map_location` gives something that is no device here.
    """
    try:
        if map_location is None:
            return _nearest(device)
        if isinstance(map_location, str | torch.device):
            return torch.device(map_location)
        if isinstance(map_location, Mapping):
            return torch.device(map_location.get(device, device))
        moved = map_location(torch.empty(0).untyped_storage(), device)
        return _nearest(device) if moved is None else torch.device(moved.device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"map_location gives no device for {device}: {error}") from error


def _nearest(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        return torch.device("cpu")
    return device


def _renamer(rename: Rename | None) -> Callable[[str], str]:
    if rename is None:
        return lambda fqn: fqn
    if callable(rename):
        return rename
    names = dict(rename)
    prefixes = sorted((name for name in names if name.endswith(".")), key=len, reverse=True)

    def renamed(fqn: str) -> str:
        if fqn in names:
            return names[fqn]
        for prefix in prefixes:
            if fqn.startswith(prefix):
                return names[prefix] + fqn[len(prefix) :]
        return fqn

    return renamed
