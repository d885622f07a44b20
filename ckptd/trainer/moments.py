"""Optimizer state from a checkpoint, set directly and in its saved dtype.

``Optimizer.load_state_dict`` would cast fp32 moments of bf16 parameters, and matches parameters by
their place in the groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from ckptd.errors import LayoutError
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Tensor
from ckptd.trainer.classes import Misfit, SavedGroup, misfit_of_options, misfit_of_state
from ckptd.trainer.fsdp1 import FlatPiece
from ckptd.trainer.modules import Names
from ckptd.trainer.optimizers import (
    PROGRAM_OPTIONS,
    class_name,
    is_elsewhere,
    named_groups,
    step_device,
)
from ckptd.trainer.shards import is_sharded
from ckptd.trainer.stored import Stored, check_optimizer, dtype_of, is_optimizer
from ckptd.trainer.targets import Targets
from ckptd.trainer.values import tensor_names

log = logging.getLogger("ckptd.trainer")


class _Live(NamedTuple):
    """A live group: where it stands, the names of its parameters here and in the checkpoint."""

    where: str
    optimizer: Optimizer
    group: dict[str, Any]
    fqns: list[str]
    owners: list[str | None]


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
    ) -> dict[str, torch.Tensor] | None:
        """Find state for each live parameter; returns the tensors that the values refer to.

        None if the entry is missing, or not strict and of a class that does not fit: then nothing of
        it is to be touched. `other_names` gives all live names of a tied parameter, its own first.

        Raises:
            LayoutError: parameters that are one group here had different options, or the class that
                saved the checkpoint has other options or state.
            ShapeMismatchError: state of another shape than the parameter or the live state.
            CorruptError: the stored value has not the form of an optimizer's.
        """
        tree = stored.values.get(self.name)
        names = (
            f"{self.name}/{self._names.find(p)}" for o in self._optimizers for p in params_of(o)
        )
        if not targets.terms.wants(self.name, *names):
            return None
        if not is_optimizer(tree):
            targets.missing.append(self.name)
            return None
        saved = _Saved(self.name, tree, stored)
        groups = list(self._find_owners(saved, stored, other_names))
        misfit = next((m for live in groups for m in _misfits(live, saved)), None)
        if misfit is not None:
            if targets.terms.strict:
                raise LayoutError(f"{self.name}: {misfit}", fqn=self.name)
            log.warning("%s is left as it is: %s", self.name, misfit)
            targets.missing.append(self.name)
            return None
        self._tell_of_classes(groups, saved)
        wants = targets.terms.wants
        for live in groups:
            self._plan_group(live, saved, targets)
            if any(wants(f"{self.name}/{fqn}", self.name) for fqn in live.fqns):
                self._plan_options(live, saved, targets)
        return targets.of_tree(tree, {})

    def _find_owners(
        self, saved: _Saved, stored: Stored, other_names: Callable[[str], list[str]]
    ) -> Iterator[_Live]:
        for optimizer in self._optimizers:
            for g, (group, fqns) in enumerate(named_groups(self.name, optimizer, self._names)):
                owners = [
                    saved.owner([n for f in other_names(fqn) for n in stored.other_names(f)])
                    for fqn in fqns
                ]
                yield _Live(f"{self.name}/groups.{g}", optimizer, group, fqns, owners)

    def _tell_of_classes(self, groups: list[_Live], saved: _Saved) -> None:
        pairs = {
            (saved.groups[i].class_name, class_name(live.optimizer))
            for live in groups
            for i in saved.places_of(live.owners)
        }
        for before, now in pairs:
            if before not in (None, now):
                log.warning(
                    "%s: saved with %s, goes on as %s, which has the same options and state",
                    self.name, before, now,
                )  # fmt: skip

    def _plan_group(self, live: _Live, saved: _Saved, targets: Targets) -> None:
        _, optimizer, group, fqns, owners = live
        has_state = any(owner is not None and saved.has_state(owner) for owner in owners)
        for fqn, owner, parameter in zip(fqns, owners, group["params"], strict=True):
            if not targets.terms.wants(f"{self.name}/{fqn}", self.name):
                continue
            piece = self._names.piece(parameter)
            if is_elsewhere(piece):
                continue
            is_known = owner is not None and (saved.has_state(owner) or owner in saved.idle)
            if owner is None or (not is_known and has_state):
                if parameter.requires_grad and has_state:
                    targets.missing.append(f"{self.name}/{fqn}")
                continue
            place = _Place(optimizer, group, parameter, piece)
            rows = {
                f"{self.name}/{owner}/{k}": row for k, row in saved.tensors.get(owner, {}).items()
            }
            if all(place.fits(name, row, targets) for name, row in rows.items()):
                tensors = {
                    name.rpartition("/")[2]: place.target(name, row, targets)
                    for name, row in rows.items()
                }
                self._matches.append(_Match(optimizer, parameter, owner, tensors))

    def _plan_options(self, live: _Live, saved: _Saved, targets: Targets) -> None:
        where, owners = live.where, live.owners
        found = saved.places_of(owners)
        if not found:
            if owners:
                targets.missing.append(where)
            return
        options = [saved.groups[i].options for i in found]
        if any(_shared_options(o) != _shared_options(options[0]) for o in options):
            raise LayoutError(
                f"{where}: its parameters were in groups with different options; group them as before",
                fqn=where,
            )
        owner = next(owner for owner in owners if owner in saved.places)
        self._groups.append(_GroupMatch(live.group, str(owner)))

    def finish(self, value: Any, live_name: Callable[[str], str]) -> None:
        """Set state and options. `value` is the decoded value of the entry, of a checked form.

        What the optimizer's own ``__setstate__`` raises is passed on.
        """
        values: dict[str, Any] = {live_name(f): v for f, v in value["state_values"].items()}
        for match in self._matches:
            state = {**match.tensors, **values.get(match.owner, {})}
            match.optimizer.state.pop(match.parameter, None)
            if state:
                match.optimizer.state[match.parameter] = state
        options = {live_name(f): g["options"] for g in value["groups"] for f in g["params"]}
        for group, owner in self._groups:
            _set_options(group, options.get(owner, {}))
        for optimizer in self._optimizers:
            _set_shared(optimizer, value.get("shared", {}), is_only=len(self._optimizers) == 1)
            # Classes mend here what older versions of them saved, and fill in options that are new.
            optimizer.__setstate__(
                {"state": optimizer.state, "param_groups": optimizer.param_groups}
            )


def params_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]


class _Saved:
    """The stored state of one optimizer entry by the live names of parameters."""

    def __init__(self, name: str, tree: Tree, stored: Stored) -> None:
        check_optimizer(name, tree)
        self.places: dict[str, int] = {}  # of parameters in `groups`
        self.idle: set[str] = set()
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for i, group in enumerate(tree["groups"]):
            self.places.update({stored.live_name(fqn): i for fqn in group["params"]})
            self.idle.update(stored.live_name(fqn) for fqn in group.get("idle", []))
        self.groups = [SavedGroup(g.get("class"), g["options"]) for g in tree["groups"]]
        self._values = {
            stored.live_name(f): held.keys() for f, held in tree["state_values"].items()
        }
        inside = set(tensor_names(tree))
        for live, fqn in stored.names.items():
            if live.startswith(f"{name}/") and fqn not in inside:
                owner, _, key = live[len(name) + 1 :].rpartition("/")
                row = stored.row(fqn)
                if row is not None:
                    self.tensors.setdefault(owner, {})[key] = row

    def has_state(self, owner: str) -> bool:
        return owner in self.tensors or owner in self._values

    def keys(self, owner: str) -> set[str]:
        """Return the keys of a parameter's state."""
        return {*self.tensors.get(owner, ()), *self._values.get(owner, ())}

    def owner(self, names: list[str]) -> str | None:
        """Return the first of the names of a live parameter that the checkpoint knows."""
        known = (n for n in names if n in self.places or self.has_state(n))
        return next(known, None)

    def places_of(self, owners: list[str | None]) -> list[int]:
        """Return which stored groups these parameters were in."""
        return sorted({self.places[owner] for owner in owners if owner in self.places})


def _misfits(live: _Live, saved: _Saved) -> Iterator[Misfit]:
    """Yield why state that another class saved, or one that is not named, is none for this one."""
    own = class_name(live.optimizer)
    others = {i for i in saved.places_of(live.owners) if saved.groups[i].class_name != own}
    if not others:
        return
    for owner, parameter in zip(live.owners, live.group["params"], strict=True):
        if owner is None or saved.places.get(owner) not in others or not saved.has_state(owner):
            continue
        group = saved.groups[saved.places[owner]]
        held = live.optimizer.state.get(parameter, {}).keys()
        misfit = misfit_of_state(live.optimizer, live.group, group, saved.keys(owner), held)
        if misfit is not None:
            yield misfit
    for i in sorted(others):
        if saved.groups[i].class_name is not None:
            misfit = misfit_of_options(live.optimizer, live.group, saved.groups[i])
            if misfit is not None:
                yield misfit


class _Place(NamedTuple):
    """Where the state of one live parameter goes."""

    optimizer: Optimizer
    group: dict[str, Any]
    parameter: torch.Tensor
    piece: FlatPiece | None

    def _held(self, live_name: str) -> torch.Tensor | None:
        held = self.optimizer.state.get(self.parameter, {}).get(live_name.rpartition("/")[2])
        return held if isinstance(held, torch.Tensor) else None

    def fits(self, live_name: str, row: Tensor, targets: Targets) -> bool:
        """Tell whether a stored tensor has the shape of the live state, or of the parameter."""
        held = self._held(live_name)
        shape, owner = row.shape, self.piece or self.parameter
        if held is not None and not (self.piece and held.dim()):
            shape = tuple(held.shape)
        elif row.shape and (row.kind == "optimizer" or is_sharded(owner)):
            shape = tuple(owner.shape)
        return targets.fits(live_name, row, shape, dtype_of(row))

    def target(self, live_name: str, row: Tensor, targets: Targets) -> torch.Tensor:
        """Want a stored tensor: in the live state if that is of its dtype, else in a fresh one."""
        held = self._held(live_name)
        device = self._device(live_name.rpartition("/")[2], row)
        if self.piece is not None and row.shape:
            is_fit = held is not None and held.dtype is dtype_of(row) and held.device == device
            memory = held if is_fit else None
            if memory is None:
                memory = torch.empty_like(self.parameter.detach(), dtype=dtype_of(row))
            targets.fill(row, self.piece.of(memory))
            return memory
        if held is not None and held.dtype is dtype_of(row) and held.device == device:
            targets.fill(row, held)
            return held
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
