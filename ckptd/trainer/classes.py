"""Whether what one class of optimizer saved is state for another.

Moments of one class are no start for another, even where their shapes agree. So a class that is not
the one that saved must want the same options and keep its state under the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from torch.optim import Optimizer

from ckptd.model.manifest import Tree
from ckptd.trainer.optimizers import PROGRAM_OPTIONS, class_name, state_keys

# Schedulers leave these in the groups, whatever the class.
_OF_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})


class SavedGroup(NamedTuple):
    """A stored group: its options as they stand in the tree, None for a class that is not named."""

    class_name: str | None
    options: Mapping[str, Tree]


class Misfit(NamedTuple):
    """What a checkpoint `has` and a live optimizer has no use for, and what that `needs` instead."""

    saved_class: str | None
    live_class: str
    what: str
    has: list[str]
    needs: list[str]

    def __str__(self) -> str:
        saved = self.saved_class or "another optimizer"
        has = f" ({self.what}{', '.join(self.has)})" if self.has else ""
        needs = f", which needs {self.what}{', '.join(self.needs)}" if self.needs else ""
        return (
            f"the checkpoint was saved with {saved}{has}, this is {self.live_class}{needs}: "
            "make the same optimizer, or leave it out of the state"
        )


def misfit_of_state(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    saved: SavedGroup,
    keys: AbstractSet[str],
    held: AbstractSet[str],
) -> Misfit | None:
    """Compare the keys of one parameter's stored state with those that its optimizer would make.

    `held` are those of its live state, by which classes are judged that are not known; without any,
    everything fits.
    """
    options = {**group, **{k: v for k, v in saved.options.items() if type(v) in (bool, int, float)}}
    wanted = state_keys(optimizer, options)
    if wanted is None:
        wanted = sorted(held)
        if not wanted:
            return None
    needs = [key for key in wanted if key not in keys]
    # Without the name of a class nothing says that it was another one.
    has = sorted(keys - set(wanted)) if saved.class_name is not None or needs else []
    return _misfit(optimizer, saved, "", (has, needs))


def misfit_of_options(
    optimizer: Optimizer, group: Mapping[str, Any], saved: SavedGroup
) -> Misfit | None:
    """Compare the names of options. Values may differ: they are what a restore brings back."""
    defaults: Mapping[str, Any] = getattr(optimizer, "defaults", {})
    needs = sorted(defaults.keys() - saved.options.keys() - PROGRAM_OPTIONS)
    has = sorted(saved.options.keys() - group.keys() - PROGRAM_OPTIONS - _OF_SCHEDULERS)
    return _misfit(optimizer, saved, "options ", (has, needs))


def _misfit(
    optimizer: Optimizer, saved: SavedGroup, what: str, differing: tuple[list[str], list[str]]
) -> Misfit | None:
    if not any(differing):
        return None
    return Misfit(saved.class_name, class_name(optimizer), what, *differing)
