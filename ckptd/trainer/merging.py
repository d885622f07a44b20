"""Values that follow parameters, put together from ranks that hold different ones.

Pipeline stages have optimizers and modules of one name over different parameters: what a rank of
another layout needs of them stands in several ranks' values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptd.model.manifest import Tree
from ckptd.trainer.stored import check_optimizer, is_module, is_optimizer


def is_mergeable(tree: Tree) -> bool:
    """Tell whether a value is that of an optimizer or of modules, which go by parameters."""
    return is_optimizer(tree) or is_module(tree)


def fqns_of(tree: Tree) -> set[str]:
    """Return the names of the parameters that the value of an optimizer knows."""
    return {fqn for group in tree["groups"] for fqn in group["params"]}


def merge_values(name: str, trees: Sequence[Tree]) -> Tree:
    """Return the values of one entry from several ranks as one; where they differ the first counts.

    All are of one kind (see `is_mergeable`), `name` is for the message.

    Raises:
        CorruptError: one has not the form of an optimizer's.
    """
    if is_module(trees[0]):
        return {"extra_state": _first([tree["extra_state"] for tree in trees])}
    for tree in trees:
        check_optimizer(name, tree)
    merged: dict[str, Any] = {
        "groups": _merge_groups([tree["groups"] for tree in trees]),
        "state_values": _first([tree["state_values"] for tree in trees]),
    }
    if shared := _first([tree.get("shared", {}) for tree in trees]):
        merged["shared"] = shared
    return merged


def _merge_groups(lists: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    # A rank that holds nothing of a parameter says nothing of its state.
    busy = _named(lists, "params", but=("idle", "elsewhere"))
    quiet = _named(lists, "idle") - busy
    known: set[str] = set()
    found = []
    for groups in lists:
        for group in groups:
            params = [fqn for fqn in group["params"] if fqn not in known]
            if not params:
                continue
            known.update(params)
            kept = {k: v for k, v in group.items() if k not in ("idle", "elsewhere")}
            kept["params"] = params
            idle = [fqn for fqn in params if fqn in quiet]
            found.append(kept | {"idle": idle} if idle else kept)
    return found


def _named(lists: Sequence[list[dict[str, Any]]], key: str, *, but: Sequence[str] = ()) -> set[str]:
    found: set[str] = set()
    for groups in lists:
        for group in groups:
            without = {fqn for other in but for fqn in group.get(other, [])}
            found |= set(group.get(key, [])) - without
    return found


def _first(dicts: Sequence[dict[str, Tree]]) -> dict[str, Tree]:
    merged: dict[str, Tree] = {}
    for one in reversed(dicts):
        merged |= one
    return merged
