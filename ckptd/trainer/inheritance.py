"""Which of the values that old ranks saved this rank goes on with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ckptd.errors import LayoutError
from ckptd.model.manifest import Manifest, RankManifest, Tree
from ckptd.trainer import rng
from ckptd.trainer.flatten import Survey, stream_of
from ckptd.trainer.fsdp1 import FlatPiece
from ckptd.trainer.merging import fqns_of, is_mergeable, merge_values
from ckptd.trainer.optimizers import is_elsewhere, named_groups
from ckptd.trainer.rng import RNGState
from ckptd.trainer.stored import is_module, is_optimizer
from ckptd.trainer.terms import Terms
from ckptd.trainer.values import InlineTensors, PerRank, decode_value, encode_value

log = logging.getLogger("ckptd.trainer")

ReadRanks = Callable[[Iterable[int]], list[RankManifest]]


class Heir(NamedTuple):
    """This rank: what it holds now, and what it may do with what was saved.

    `surveyed` is its state.
    """

    state: Mapping[str, object]
    surveyed: Survey
    rank: int
    world_size: int
    terms: Terms


class Inheritance:
    """Call `choose` once. `read` is asked only for records of ranks that are needed.

    Attributes:
        surplus: what ranks that there are no more kept for themselves, as ``name@rank``; the same on
            every rank. Generators that went by stream may live on under another rank.
    """

    def __init__(self, heir: Heir, manifest: Manifest, own: RankManifest, read: ReadRanks) -> None:
        self._heir = heir
        self._manifest = manifest
        self._own = own
        self._read = read
        self._everyone: list[RankManifest] = []
        self.surplus: tuple[str, ...] = ()

    def choose(self) -> dict[str, Tree]:
        """Return this rank's values: its own where it had some, the common ones otherwise.

        Raises:
            LayoutError: a value was another one on every rank, the world size is not what it was, and
                nothing says what that means for it.
        """
        heir, manifest, own = self._heir, self._manifest, self._own
        is_resized = manifest.world_size != heir.world_size
        first = own if own.rank == 0 or not is_resized else self._read([0])[0]
        # What is kept per rank is so even where all ranks happened to agree, or where there was one.
        kept = [
            name
            for name, live in heir.state.items()
            if isinstance(live, RNGState) or (is_resized and isinstance(live, PerRank))
        ]
        differing = {*manifest.differing, *(name for name in kept if name in first.values)}
        values = {name: tree for name, tree in first.values.items() if name not in differing}
        names = [name for name in heir.state if name in differing and self._is_wanted(name)]
        for name in names:
            self._choose_one(name, values, is_resized=is_resized)
        for name in () if is_resized else differing - heir.state.keys():
            if name in own.values:
                values[name] = own.values[name]
        return values

    def _is_wanted(self, name: str) -> bool:
        """Tell whether an entry is selected, as a whole or, of what follows parameters, in part."""
        is_whole = any(
            p.name == name and p.role in ("module", "optimizer") for p in self._heir.surveyed.parts
        )
        return is_whole or self._heir.terms.wants(name)

    def _choose_one(self, name: str, values: dict[str, Tree], *, is_resized: bool) -> None:
        live, own = self._heir.state[name], self._own.values.get(name)
        if isinstance(live, RNGState):
            self._leave(name)
            if (tree := self._generators(name, live)) is not None:
                values[name] = tree
        elif own is not None and is_mergeable(own):
            merged = None if self._suffices(name, own, is_resized) else self._merged(name)
            values[name] = own if merged is None else merged
        elif not isinstance(live, PerRank) and (is_resized or own is None):
            merged = self._merged(name)
            if merged is not None:
                values[name] = merged
            elif is_resized:
                self._refuse(name, "wrap it in ckptd.PerRank, which has a rule for that", values)
        elif isinstance(live, PerRank) and is_resized:
            self._inherit(name, live, values)
        elif name in self._own.values:
            values[name] = own

    def _generators(self, name: str, live: RNGState) -> Tree | None:
        """Return the state of this rank's stream of random numbers, or one derived for a new one."""
        heir, own = self._heir, self._own
        held = [v for ms in heir.surveyed.modules.values() for m in ms for v in m.values]
        stream = stream_of(live, held)
        if stream is None:
            stream = heir.rank
        saved = own.values.get(name)
        if saved is not None and rng.stream_of(saved, own.rank) == stream:
            return saved
        trees = [
            (rng.stream_of(record.values[name], record.rank), record.values[name])
            for record in self._all()
            if name in record.values
        ]
        if not trees:
            return None
        found = next((tree for number, tree in trees if number == stream), None)
        return found if found is not None else rng.derive(trees[0][1], stream)

    def _suffices(self, name: str, own: Tree, is_resized: bool) -> bool:  # noqa: FBT001
        """Tell whether this rank's own value has all of what its parameters had."""
        if name not in self._manifest.differing:
            return True
        heir = self._heir
        if is_module(own):
            extra = {
                fqn
                for held in heir.surveyed.modules.get(name, [])
                for fqn, value in zip(held.fqns, held.values, strict=True)
                if not isinstance(value, (torch.Tensor, FlatPiece))
            }
            is_there = heir.terms.rename is None and extra <= own["extra_state"].keys()
            return is_there and not is_resized
        if heir.terms.rename is not None or not is_optimizer(own):
            return False
        names = heir.surveyed.names
        live = {
            fqn
            for part in heir.surveyed.parts
            if part.name == name
            for optimizer in part.live
            for group, fqns in named_groups(name, optimizer, names)
            for fqn, parameter in zip(fqns, group["params"], strict=True)
            if not is_elsewhere(names.piece(parameter))
        }
        unsure = {
            fqn
            for group in own["groups"]
            for key in ("idle", "elsewhere")
            for fqn in group.get(key, [])
        }
        return live <= fqns_of(own) - unsure

    def _merged(self, name: str) -> Tree | None:
        trees = [record.values[name] for record in self._all() if name in record.values]
        if not trees or not all(is_mergeable(tree) for tree in trees):
            return None
        if len({is_optimizer(tree) for tree in trees}) != 1:
            return None
        return merge_values(name, trees)

    def _inherit(self, name: str, live: PerRank[Any], values: dict[str, Tree]) -> None:
        """Apply the rule of a value to a world of another size."""
        heir = self._heir
        if live.on_resize == "drop":
            self._keep_own(name, values)
        elif callable(live.on_resize):
            saved = [
                decode_value(record.values[name], tensors={}, trust_pickle=heir.terms.trust_pickle)
                for record in self._all()
                if name in record.values
            ]
            old = [value.value if isinstance(value, PerRank) else value for value in saved]
            try:
                new = live.on_resize(old, heir.rank, heir.world_size)
            except Exception as error:
                raise LayoutError(
                    f"{name}: on_resize failed for rank {heir.rank} of {heir.world_size}: {error!r}",
                    fqn=name,
                ) from error
            values[name] = encode_value(PerRank(new), path=name, tensors=InlineTensors())
        else:
            self._refuse(name, 'give its PerRank an on_resize: "drop", or a function', values)

    def _keep_own(self, name: str, values: dict[str, Tree]) -> None:
        self._leave(name)
        if self._heir.rank < self._manifest.world_size and name in self._own.values:
            values[name] = self._own.values[name]

    def _refuse(self, name: str, advice: str, values: dict[str, Tree]) -> None:
        """Refuse to guess what a value of each rank means on another world size.

        Not strict, ranks that there were keep their own.
        """
        message = (
            f"{name} was different on the ranks of the checkpoint, and the world size went from "
            f"{self._manifest.world_size} to {self._heir.world_size}: {advice}, or leave it out of "
            "the state"
        )
        if self._heir.terms.strict:
            raise LayoutError(message, fqn=name)
        log.warning("%s", message)
        self._keep_own(name, values)

    def _leave(self, name: str) -> None:
        """Note that what ranks that there are no more kept for themselves is nobody's now."""
        gone = range(self._heir.world_size, self._manifest.world_size)
        self.surplus += tuple(f"{name}@{old}" for old in gone)

    def _all(self) -> list[RankManifest]:
        if not self._everyone:
            self._everyone = self._read(range(self._manifest.world_size))
        return self._everyone
