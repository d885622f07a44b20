"""Optimizer state from a checkpoint, set directly and in its saved dtype.

``Optimizer.load_state_dict`` would cast fp32 moments of bf16 parameters, and matches parameters by
their place in the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from ckptd.errors import CorruptError, LayoutError
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Tensor
from ckptd.trainer.modules import Names
from ckptd.trainer.optimizers import PROGRAM_OPTIONS, named_groups, step_device
from ckptd.trainer.stored import Stored, dtype_of, is_optimizer
from ckptd.trainer.targets import Targets
from ckptd.trainer.values import tensor_names


class _Match(NamedTuple):
    """A live parameter and what the checkpoint has for it; `owner` is its name there."""

    optimizer: Optimizer
    parameter: torch.Tensor
    owner: str
    tensors: dict[str, torch.Tensor]


class _GroupMatch(NamedTuple):
    group: dict[str, Any]
    owner: str


class Moments:
    """One optimizer entry of a state: compared with a checkpoint by `plan`, set by `finish`."""

    def __init__(self, name: str, optimizers: list[Optimizer], names: Names) -> None:
        self.name = name
        self._optimizers = optimizers
        self._names = names
        self._matches: list[_Match] = []
        self._groups: list[_GroupMatch] = []

    def plan(
        self, stored: Stored, targets: Targets, other_names: Callable[[str], list[str]]
    ) -> dict[str, torch.Tensor]:
        """Find state for each live parameter; returns the tensors that the values refer to.

        `other_names` gives all live names of a tied parameter, its own first.

        Raises:
            LayoutError: parameters that are one group here had different options.
            ShapeMismatchError: state of another shape than the parameter or the live state.
        """
        tree = stored.values.get(self.name)
        if not is_optimizer(tree):
            targets.missing.append(self.name)
            return {}
        saved = _Saved(self.name, tree, stored)
        for optimizer in self._optimizers:
            for g, (group, fqns) in enumerate(named_groups(self.name, optimizer, self._names)):
                owners = [
                    saved.owner([n for f in other_names(fqn) for n in stored.other_names(f)])
                    for fqn in fqns
                ]
                self._plan_group(optimizer, (group, fqns, owners), saved, targets)
                self._plan_options(f"{self.name}/groups.{g}", group, owners, saved, targets)
        return targets.of_tree(tree, {})

    def _plan_group(
        self,
        optimizer: Optimizer,
        live: tuple[dict[str, Any], list[str], list[str | None]],
        saved: _Saved,
        targets: Targets,
    ) -> None:
        group, fqns, owners = live
        has_state = any(owner is not None and saved.has_state(owner) for owner in owners)
        for fqn, owner, parameter in zip(fqns, owners, group["params"], strict=True):
            is_known = owner is not None and (saved.has_state(owner) or owner in saved.idle)
            if owner is None or (not is_known and has_state):
                if parameter.requires_grad and has_state:
                    targets.missing.append(f"{self.name}/{fqn}")
                continue
            place = _Place(optimizer, group, parameter)
            rows = {
                f"{self.name}/{owner}/{k}": row for k, row in saved.tensors.get(owner, {}).items()
            }
            if all(place.fits(name, row, targets) for name, row in rows.items()):
                tensors = {
                    name.rpartition("/")[2]: place.target(name, row, targets)
                    for name, row in rows.items()
                }
                self._matches.append(_Match(optimizer, parameter, owner, tensors))

    def _plan_options(
        self,
        where: str,
        group: dict[str, Any],
        owners: list[str | None],
        saved: _Saved,
        targets: Targets,
    ) -> None:
        found = sorted({saved.groups[owner] for owner in owners if owner in saved.groups})
        if not found:
            if owners:
                targets.missing.append(where)
            return
        options = [saved.options[i] for i in found]
        if any(_shared_options(o) != _shared_options(options[0]) for o in options):
            raise LayoutError(
                f"{where}: its parameters were in groups with different options; group them as before",
                fqn=where,
            )
        owner = next(owner for owner in owners if owner in saved.groups)
        self._groups.append(_GroupMatch(group, str(owner)))

    def finish(self, value: Any, live_name: Callable[[str], str]) -> None:
        """Set state and options. `value` is the decoded value of the entry.

        Raises:
            CorruptError: the value is not that of an optimizer.
        """
        values: dict[str, Any] = {live_name(f): v for f, v in value["state_values"].items()}
        for match in self._matches:
            state = {**match.tensors, **values.get(match.owner, {})}
            match.optimizer.state.pop(match.parameter, None)
            if state:
                match.optimizer.state[match.parameter] = state
        options = {live_name(f): g["options"] for g in value["groups"] for f in g["params"]}
        for group, owner in self._groups:
            _set_options(group, options[owner])
        for optimizer in self._optimizers:
            _set_shared(optimizer, value.get("shared", {}), is_only=len(self._optimizers) == 1)
            # Classes mend here what older versions of them saved, and fill in options that are new.
            optimizer.__setstate__(
                {"state": optimizer.state, "param_groups": optimizer.param_groups}
            )


class _Saved:
    """The stored state of one optimizer entry by the live names of parameters."""

    def __init__(self, name: str, tree: Tree, stored: Stored) -> None:
        self.groups: dict[str, int] = {}
        self.idle: set[str] = set()
        self.tensors: dict[str, dict[str, Tensor]] = {}
        try:
            for i, group in enumerate(tree["groups"]):
                self.groups.update({stored.live_name(fqn): i for fqn in group["params"]})
                self.idle.update(stored.live_name(fqn) for fqn in group.get("idle", []))
            self.options = [dict(group["options"]) for group in tree["groups"]]
            self._values = {stored.live_name(fqn) for fqn in tree["state_values"]}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptError(f"{name}: the stored value is not that of an optimizer") from error
        inside = set(tensor_names(tree))
        for live, fqn in stored.names.items():
            if live.startswith(f"{name}/") and fqn not in inside:
                owner, _, key = live[len(name) + 1 :].rpartition("/")
                row = stored.row(fqn)
                if row is not None:
                    self.tensors.setdefault(owner, {})[key] = row

    def has_state(self, owner: str) -> bool:
        return owner in self.tensors or owner in self._values

    def owner(self, names: list[str]) -> str | None:
        """Return the first of the names of a live parameter that the checkpoint knows."""
        known = (n for n in names if n in self.groups or self.has_state(n))
        return next(known, None)


class _Place(NamedTuple):
    """Where the state of one live parameter goes."""

    optimizer: Optimizer
    group: dict[str, Any]
    parameter: torch.Tensor

    def _held(self, live_name: str) -> torch.Tensor | None:
        held = self.optimizer.state.get(self.parameter, {}).get(live_name.rpartition("/")[2])
        return held if isinstance(held, torch.Tensor) else None

    def fits(self, live_name: str, row: Tensor, targets: Targets) -> bool:
        """Tell whether a stored tensor has the shape of the live state, or of the parameter."""
        held = self._held(live_name)
        shape = row.shape
        if held is not None:
            shape = tuple(held.shape)
        elif row.kind == "optimizer" and row.shape:
            shape = tuple(self.parameter.shape)
        return targets.fits(live_name, row, shape, dtype_of(row))

    def target(self, live_name: str, row: Tensor, targets: Targets) -> torch.Tensor:
        """Want a stored tensor: in the live state if that is of its dtype, else in a fresh one."""
        held = self._held(live_name)
        device = self._device(live_name.rpartition("/")[2], row)
        if held is not None and held.dtype is dtype_of(row) and held.device == device:
            return targets.fill(row, held)
        like = self.parameter.detach() if row.shape else torch.empty((), device=device)
        return targets.fresh(row, like=like)

    def _device(self, key: str, row: Tensor) -> torch.device:
        if row.shape:
            return self.parameter.device
        if key == "step" and ("capturable" in self.group or "fused" in self.group):
            return step_device(self.parameter, self.group)
        return torch.device("cpu") if row.device == "cpu" else self.parameter.device


def _shared_options(options: Mapping[str, Tree]) -> dict[str, Tree]:
    # Tensors (of a learning rate, say) have another name in each group.
    return {
        key: tree
        for key, tree in options.items()
        if key not in PROGRAM_OPTIONS and not any(True for _ in tensor_names(tree))
    }


def _set_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if key in PROGRAM_OPTIONS and key in group:
            continue
        live = group.get(key)
        if isinstance(live, torch.Tensor) and isinstance(value, (torch.Tensor, float, int)):
            with torch.no_grad():
                live.copy_(torch.as_tensor(value))  # captured graphs read this very tensor
        elif type(live) is float and isinstance(value, torch.Tensor):
            group[key] = value.item()
        else:
            group[key] = value


def _set_shared(optimizer: Optimizer, shared: Mapping[str, Any], *, is_only: bool) -> None:
    state: dict[object, Any] = optimizer.state  # type: ignore[assignment]
    for key, value in shared.items():
        if is_only or key in state:
            state[key] = value
