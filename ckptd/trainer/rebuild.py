"""From a checkpoint back into a live state, in two phases: compare all, then write.

::

    plan = Restorer(state, terms).wanted(tensors, aliases, values)   # raises, or nothing will
    for i, target in enumerate(plan.targets):
        plan.write(i, box, raw)                                            # any thread, any order
    resumed_values = plan.finish()
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from ckptd.errors import (
    CorruptError,
    MissingTensorError,
    TornRestoreError,
    UnsupportedValueError,
)
from ckptd.model.box import Box
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Tensor
from ckptd.trainer import rng
from ckptd.trainer.flatten import Part, Survey, is_stateful, survey
from ckptd.trainer.fsdp1 import reshard
from ckptd.trainer.loads import ModuleLoad, check_meta_parameters
from ckptd.trainer.modules import ModuleState
from ckptd.trainer.moments import Moments
from ckptd.trainer.stored import Stored, check_optimizer
from ckptd.trainer.tags import BAD_BODY
from ckptd.trainer.targets import Target, Targets
from ckptd.trainer.terms import Terms
from ckptd.trainer.values import MAX_DEPTH, PerRank, decode_value, tensor_names


class Restorer:
    """Compares a live state with checkpoints. Changes nothing by itself.

    The state names what is wanted; what a checkpoint holds beyond it is unused.
    """

    def __init__(
        self,
        state: Mapping[str, object],
        terms: Terms | None = None,
        surveyed: Survey | None = None,
    ) -> None:
        """Take a state as for `flatten`; kept, and changed by `RestorePlan.finish` if mutable."""
        self._state = state
        self._terms = terms or Terms()
        self._surveyed = surveyed

    def wanted(
        self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], values: Mapping[str, Tree]
    ) -> RestorePlan:
        """Compare with a checkpoint: its tensor table, its aliases, and this rank's values.

        May be called again, for another checkpoint.

        Raises:
            MissingTensorError: something is not there, and `strict` is set.
            ShapeMismatchError: a tensor has another shape or dtype.
            LayoutError: the state and the checkpoint do not fit in another way.
            CorruptError: a value is not in the form of values.
        """
        stored = Stored(tensors, aliases, values, self._terms.rename)
        plan = RestorePlan(self._state, stored, Targets(stored, self._terms))
        plan.compare(self._surveyed or survey(self._state))
        if plan.missing and self._terms.strict:
            shown = ", ".join(plan.missing[:5])
            more = f" and {len(plan.missing) - 5} more" if len(plan.missing) > 5 else ""
            raise MissingTensorError(
                f"the checkpoint does not hold {shown}{more}; strict=False leaves them as they are",
                fqn=plan.missing[0],
            )
        return plan


class RestorePlan:
    """What to read, and where it goes. Made by `Restorer.wanted`.

    Attributes:
        missing: names of the state that the checkpoint does not hold; these are left as they are.
        unused: names of tensors and values of the checkpoint that the state does not want, each once.
    """

    def __init__(self, state: Mapping[str, object], stored: Stored, targets: Targets) -> None:
        self._state = state
        self._stored = stored
        self._values = stored.values
        self._targets = targets
        self._trust_pickle = targets.terms.trust_pickle
        self._parts: list[Part] = []
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}  # by entry, what its value refers to
        self._moments: dict[str, Moments] = {}
        self._loads: list[ModuleLoad] = []
        self._decoded: dict[str, Any] = {}
        self._extra: dict[str, Any] = {}
        self._unasked: dict[str, Any] = {}

    @property
    def fills(self) -> Targets:
        """All that is to be filled."""
        return self._targets

    @property
    def targets(self) -> list[Target]:
        """The memory to fill, by place."""
        return self._targets.rows

    @property
    def missing(self) -> list[str]:
        """Names of the state that the checkpoint does not hold."""
        return self._targets.missing

    @property
    def unused(self) -> list[str]:
        """Names of tensors and values of the checkpoint that the state does not want, each once."""
        values = self._stored.values.keys()
        names = self._stored.tensors.keys() - self._targets.used
        return sorted(names | (values - self._state.keys()) | (values & set(self.missing)))

    def write(self, i: int, box: Box, raw: memoryview | bytes | bytearray) -> None:
        """Copy verified bytes (row-major) into a box, which lies in that of target `i`.

        From any thread; boxes that are written at once must not overlap. `raw` is not kept.

        Raises:
            ValueError: the box is not in the tensor, or `raw` is not its bytes.
        """
        self._targets.write(i, box, raw)

    # --- comparing -------------------------------------------------------------------------

    def compare(self, surveyed: Survey) -> None:
        """Find a source for all that the state wants. Writes nothing; called by `Restorer` once."""
        self._parts = surveyed.parts
        for states in surveyed.modules.values():
            for held in states:
                reshard(held.module)
        wants = self._targets.terms.wants
        _check_meta(surveyed)
        named: list[tuple[str, torch.Tensor]] = []
        for part in surveyed.parts:
            if part.role == "module":
                for held in surveyed.modules[part.name]:
                    named += self._compare_module(held)
            elif part.role == "plain":
                named += self._compare_plain(part)
            elif part.role != "optimizer" and wants(part.name):
                self._compare_value(part.name, {})
        self._targets.in_place(named)
        names: dict[int, list[str]] = {}
        for fqn, tensor in named:
            names.setdefault(id(tensor), []).append(fqn)
        tied = {fqn: group for group in names.values() for fqn in group}
        for part in surveyed.parts:
            if part.role == "optimizer":
                moments = Moments(part.name, part.live, surveyed.names)
                tensors = moments.plan(
                    self._stored, self._targets, lambda fqn: [fqn, *tied.get(fqn, [])]
                )
                if tensors is not None:
                    self._moments[part.name] = moments
                    self._tensors[part.name] = tensors
        self._decode()

    @property
    def is_nothing_wanted(self) -> bool:
        """Whether the terms select nothing of this state; another rank's may have some of it."""
        return not (self._targets.used or self.missing or self._decoded)

    def _compare_module(self, held: ModuleState) -> Iterator[tuple[str, Any]]:
        extra = self._stored.extra_states(self._values)
        load = ModuleLoad(held)
        yield from load.compare(self._stored, self._targets, extra)
        for fqn in load.fqns.values():
            tensors = self._tensors.setdefault("", {})
            tensors.update(self._targets.of_tree(extra[fqn], {}))
        if not load.is_empty():
            self._loads.append(load)

    def _compare_plain(self, part: Part) -> Iterator[tuple[str, torch.Tensor]]:
        live = dict(_walk(part.value, part.name, 0))
        wants = self._targets.terms.wants
        yield from ((fqn, tensor) for fqn, tensor in live.items() if wants(fqn, part.name))
        if wants(part.name) and (part.name in self._stored.values or not live):
            self._compare_value(part.name, live)

    def _compare_value(self, name: str, live: Mapping[str, torch.Tensor]) -> None:
        tree = self._stored.values.get(name)
        if name not in self._stored.values or self._stored.is_of_object(name):
            if not live:
                self._targets.missing.append(name)
            return
        self._tensors[name] = self._targets.of_tree(tree, live)

    def _decode(self) -> None:
        values = self._values
        self._decoded = {
            name: decode_value(values[name], tensors=tensors, trust_pickle=self._trust_pickle)
            for name, tensors in self._tensors.items()
            if name in values
        }
        extra = self._stored.extra_states(values)
        self._extra = {
            fqn: decode_value(
                extra[fqn], tensors=self._tensors.get("", {}), trust_pickle=self._trust_pickle
            )
            for load in self._loads
            for fqn in load.fqns.values()
            if fqn in extra
        }
        self._unasked = dict(self._find_unasked())
        # Damage shows here, so that what goes wrong in `finish` is the live objects' doing.
        for name in self._moments.keys() & values.keys():
            check_optimizer(name, values[name])
        for part in self._parts:
            if part.role == "rng" and part.name in self._decoded:
                _check_generators(part.name, self._decoded[part.name])

    def _find_unasked(self) -> Iterator[tuple[str, Any]]:
        for name in self._values.keys() - self._state.keys():
            tree = self._values[name]
            if self._stored.is_of_object(name) or any(True for _ in tensor_names(tree)):
                continue
            try:
                value = decode_value(tree, tensors={}, trust_pickle=self._trust_pickle)
            except UnsupportedValueError:  # a pickle, which nobody asked for
                continue
            yield name, value.value if isinstance(value, PerRank) else value

    # --- writing ---------------------------------------------------------------------------

    def finish(self, values: Mapping[str, Tree] | None = None) -> dict[str, Any]:
        """Set all that is not written by `write`: call it once, after the last `write`.

        Modules come first, then optimizers, schedulers, everything else, and the generators last.
        Plain values are also assigned into the state if it is mutable. `values` are this rank's, in
        place of those that `Restorer.wanted` was given: entries that are not in them keep what they
        have.

        Returns:
            The plain values by name, those among them that the state did not ask for.

        Raises:
            CorruptError: `values` are not in the form of values; nothing was set.
            TornRestoreError: an object did not take its state; some have theirs, others not.
        """
        if values is not None:
            self._values = values
            self._decode()
        for load in self._loads:
            with _setting(load.name):
                load.finish(self._extra)
        for name, moments in self._moments.items():
            if name in self._decoded:
                with _setting(name):
                    moments.finish(self._decoded[name], self._stored.live_name)
        found = dict(self._unasked)
        for part in sorted(self._parts, key=_order):
            if part.name in self._decoded and part.role not in ("module", "optimizer"):
                with _setting(part.name):
                    self._finish_part(part, self._decoded[part.name], found)
        return found

    def _finish_part(self, part: Part, value: Any, found: dict[str, Any]) -> None:
        if part.role == "rng":
            rng.restore(self._values[part.name])
            return
        inner = value.value if isinstance(value, PerRank) else value
        target = part.value.value if part.role == "per_rank" else part.value
        if is_stateful(target):
            target.load_state_dict(inner)
            return
        found[part.name] = inner
        if isinstance(target, torch.Tensor) and inner is target:
            return
        if isinstance(target, dict) and isinstance(inner, dict):
            _merge(target, inner)
            found[part.name] = target
        elif isinstance(self._state, MutableMapping):
            self._state[part.name] = _again(part, inner)


def _check_meta(surveyed: Survey) -> None:
    for part in surveyed.parts:
        for optimizer in part.live if part.role == "optimizer" else ():
            check_meta_parameters(part.name, optimizer)


@contextmanager
def _setting(name: str) -> Iterator[None]:
    """Name the entry that did not take its state.

    Whatever its own code raises, an error of a stored object too, is no damage of the checkpoint,
    for which an older one would be taken.
    """
    try:
        yield
    except Exception as error:
        raise TornRestoreError(
            f"{name} did not take its state ({error!r}), and the live objects are changed half: do "
            "not use them, mend it or leave it out of the state, and start the process again"
        ) from error


def _check_generators(name: str, value: Any) -> None:
    """Try the stored state of generators on fresh ones.

    Raises:
        CorruptError: they do not take it.
    """
    try:
        held = value.value
        version, numbers, gauss = held["python"]
        random.Random().setstate((version, tuple(numbers.tolist()), gauss))  # noqa: S311 - no secret
        torch.Generator().set_state(held["torch"])
        if "numpy" in held:
            np.random.RandomState().set_state(tuple(held["numpy"]))
    except BAD_BODY as error:
        raise CorruptError(f"{name}: not the state of random generators ({error})") from error


def _order(part: Part) -> int:
    if part.role == "rng":
        return 2
    return 0 if isinstance(part.value, LRScheduler) else 1


def _walk(value: object, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors inside of a plain value by the names that `flatten` gives them."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth < MAX_DEPTH:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from _walk(inner, f"{path}.{key}", depth + 1)
        elif isinstance(value, (list, tuple, deque)):
            for i, inner in enumerate(value):
                yield from _walk(inner, f"{path}.{i}", depth + 1)


def _again(part: Part, inner: Any) -> Any:
    return PerRank(inner, on_resize=part.value.on_resize) if part.role == "per_rank" else inner


def _merge(live: dict[Any, Any], value: dict[Any, Any]) -> None:
    for key, inner in value.items():
        held = live.get(key)
        if isinstance(held, dict) and isinstance(inner, dict):
            _merge(held, inner)
        else:
            live[key] = inner
