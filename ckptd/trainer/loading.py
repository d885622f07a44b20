"""`ckptd.load`: a checkpoint as plain dicts of whole tensors, whatever wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ckptd.errors import LayoutError
from ckptd.model.manifest import Manifest, Tree
from ckptd.pipeline.catalog import find, read_manifest
from ckptd.store.base import Store
from ckptd.store.open import normalise_url, open_store
from ckptd.trainer.fetching import Fetch, Records, StoreRecords
from ckptd.trainer.merging import is_mergeable, merge_values
from ckptd.trainer.stored import Stored, dtype_of, is_module, is_optimizer
from ckptd.trainer.targets import Targets
from ckptd.trainer.terms import MapLocation, Terms
from ckptd.trainer.values import PerRank, decode_value, tensor_names


def load(  # noqa: PLR0913 - one keyword for each choice
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    select: str | Sequence[str] | None = None,
    map_location: MapLocation = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    storage_options: dict[str, object] | None = None,
) -> dict[str, Any]:
    """Return a checkpoint of the root `source` by the names of the state that was saved.

    In one process, without the classes, the wrappers, the ranks or the devices of the job: a module is
    a dict of whole tensors by FQN, for its ``load_state_dict``; an optimizer a dict with ``state``, by
    FQN and key, and ``groups``; an object what its ``state_dict`` returned. What was another value on
    each rank is rank 0's. A module entry with a dot in its name, ``a.b``, is found under ``a``. Tensors go where they were if there is such a device here, else to the CPU,
    or where `map_location` says; each call makes its own.

    Args:
        source: a root: a path or a URL.
        step: of the newest line; None: the newest.
        select: patterns as in ``fnmatch``; only tensors and values with such a name are read.
        map_location: as in ``torch.load``.
        dtype: floating tensors but those of optimizers are cast to it.
        trust_pickle: open stored pickles, which can run any code.
        storage_options: for the store.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptError: the checkpoint is damaged; no older one is taken.
        LayoutError: `select` fits nothing.
        StoreError: the store did not answer.
    """
    terms = Terms(False, None, map_location, trust_pickle, select, dtype)
    terms.check()
    url = normalise_url(os.fspath(source))
    store = open_store(url, storage_options or {})
    try:
        return _load(store, read_manifest(store, find(store, step).id), terms)
    finally:
        store.close()


def _load(store: Store, manifest: Manifest, terms: Terms) -> dict[str, Any]:
    records = StoreRecords(store, manifest)
    values = _values(records)
    stored = Stored({t.fqn: t for t in manifest.tensors}, manifest.aliases, values, None)
    targets = Targets(stored, terms)
    optimizers = [name for name, tree in values.items() if is_optimizer(tree)]
    own = {fqn for name in optimizers for fqn in tensor_names(values[name])}
    found = {}
    for fqn in (*stored.tensors, *manifest.aliases):
        row = stored.row(fqn)
        if row is not None and terms.wants(fqn, _entry(fqn, values)):
            if row.fqn not in found:
                is_cast = row.kind != "optimizer" and row.fqn not in own
                is_cast = is_cast and dtype_of(row).is_floating_point
                found[row.fqn] = targets.fresh(row, dtype=terms.dtype if is_cast else None)
            found[fqn] = found[row.fqn]
    Fetch(records, 0, 1, targets).run()
    loaded = _assemble(found, stored, terms)
    if not loaded and terms.select is not None:
        raise LayoutError(f"select={terms.select!r} fits no name in the checkpoint")
    return loaded


def _values(records: Records) -> dict[str, Tree]:
    manifest = records.manifest
    values = dict(records.of(0).values)
    for name in manifest.differing:
        trees = [
            record.values[name]
            for record in records.read(range(manifest.world_size))
            if name in record.values
        ]
        if all(map(is_mergeable, trees)) and len({is_module(tree) for tree in trees}) == 1:
            values[name] = merge_values(name, trees)
        else:
            values.setdefault(name, trees[0])
    return values


def _entry(fqn: str, values: Mapping[str, Tree]) -> str:
    """Return the entry of the state that a tensor is of.

    A module without extra state stands in no value: its entry is taken to end at the first dot.
    """
    known = [name for name in values if fqn == name or fqn.startswith((f"{name}.", f"{name}/"))]
    return max(known, key=len, default=fqn.partition("/")[0].partition(".")[0])


def _assemble(tensors: Mapping[str, torch.Tensor], stored: Stored, terms: Terms) -> dict[str, Any]:
    values = stored.values
    loaded: dict[str, Any] = {}
    inside = set()
    for name, tree in values.items():
        names = set(tensor_names(tree))
        if not terms.wants(name) and not names & tensors.keys():
            continue
        inside |= names
        if names <= tensors.keys():
            value = decode_value(tree, tensors=tensors, trust_pickle=terms.trust_pickle)
            loaded[name] = value.value if isinstance(value, PerRank) else value
            if not stored.is_of_object(name):  # a plain value may look like one
                continue
            if is_optimizer(tree):
                loaded[name] = _optimizer(loaded[name])
            else:
                loaded[name] = dict(loaded[name]["extra_state"])
                prefix = f"{name}."
                loaded[name] = {k.removeprefix(prefix): v for k, v in loaded[name].items()}
        else:  # a part of a value is selected: its tensors by name
            inside -= names
    for fqn in sorted(tensors.keys() - inside):
        entry = _entry(fqn, values)
        rest = fqn[len(entry) + 1 :]
        if not rest:
            loaded[entry] = tensors[fqn]
        elif fqn[len(entry)] == "/":
            owner, _, key = rest.rpartition("/")
            state = loaded.setdefault(entry, {}).setdefault("state", {})
            state.setdefault(owner, {})[key] = tensors[fqn]
        else:
            loaded.setdefault(entry, {})[rest] = tensors[fqn]
    return loaded


def _optimizer(value: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {**group["options"], "params": group["params"], "class": group.get("class")}
        for group in value["groups"]
    ]
    return {"state": dict(value["state_values"]), "groups": groups, **value.get("shared", {})}
