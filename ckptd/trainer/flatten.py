"""From the state of a training job to named tensors and values.

Tensors are not touched here, only named; values are encoded at once, because the job may change them
as soon as `flatten` returns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ckptd.errors import ConfigError, LayoutError, UnsupportedValueError
from ckptd.model.manifest import Tree
from ckptd.model.tensor import MAX_FQN_CHARS, Kind
from ckptd.trainer import rng, tags
from ckptd.trainer.fsdp1 import FlatPiece, Holding
from ckptd.trainer.modules import ModuleState, Names, is_parameter, module_state
from ckptd.trainer.optimizers import check_hidden, collect, plain_optimizers
from ckptd.trainer.shards import Shards, is_sharded, meshes_of, shards_of
from ckptd.trainer.values import PerRank, encode_value
from ckptd.trainer.wrappers import check_tensor

Role = Literal["module", "optimizer", "object", "per_rank", "rng", "plain"]

INLINE_BYTES = 16 << 10
"""CPU tensors up to this size inside of objects (generator states, say) are stored as values, so
that ranks on which they differ each keep their own."""

_KIND_ORDER = {"parameter": 0, "optimizer": 1, "buffer": 2, "other": 3}


About = tuple[list[torch.dtype], list[torch.device], list[torch.Size], list[bool]]
Columns = tuple[
    list[str], list[Kind], list[tuple[str, str]],
    list[torch.dtype], list[torch.device], list[torch.Size], list[bool],
]  # fmt: skip


class Leaf(NamedTuple):
    """A live tensor of the state. `shards` is what this rank holds of it; None: all.

    `tensor` may be a `FlatPiece`, but only where there are `shards`.
    """

    fqn: str
    tensor: torch.Tensor
    kind: Kind
    requires_grad: bool
    shards: Shards | None = None

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The memory of it that is here, in the order of its boxes."""
        return (self.tensor,) if self.shards is None else self.shards.parts


class Part(NamedTuple):
    """An entry of the state and how it is treated; `live` are its modules or optimizers."""

    name: str
    role: Role
    value: Any
    live: list[Any]


class Flat(NamedTuple):
    """A flattened state. Holds the live tensors; valid until the job replaces one of them.

    `aliases` maps further names of a tensor (tied parameters) to the one that stands in `leaves`.
    `columns` go by all names in order, those of aliases too, and `sharded` by places in them. `raw` is
    the names and tensors in the order of the state, and the tensors in the order of their names.
    """

    leaves: list[Leaf]
    aliases: dict[str, str]
    values: dict[str, Tree]
    columns: Columns
    sharded: dict[int, Shards]
    raw: tuple[list[str], list[Any], list[Any]]

    def signature(self) -> object:
        """Return what is equal for two flattenings exactly if their layouts are."""
        return self.columns, [(i, shards.about()) for i, shards in self.sharded.items()]


class Survey(NamedTuple):
    """The entries of a state and the modules in it, before anything is named."""

    parts: list[Part]
    modules: dict[str, list[ModuleState]]
    names: Names


def check_state(state: object) -> None:
    """Check that a state is a mapping, and that the names in it can be names.

    Raises:
        ConfigError: saying what it is instead.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(
            'state is a mapping from names to what they hold, such as {"model": model};'
            f" this is a {type(state).__name__}"
        )
    for name in state:
        if type(name) is not str or not name or "/" in name or not name.isprintable():
            raise ConfigError(
                f"{name!r} cannot be the name of an entry of the state: names are non-empty strings"
                " without slashes, of printable characters"
            )


def survey(state: Mapping[str, object]) -> Survey:
    """Tell what each entry of a state is.

    Raises:
        ConfigError: this is no mapping, or an entry's name cannot be one.
        UnsupportedValueError: an entry is of a type that is refused.
    """
    check_state(state)
    parts = [_part(name, value) for name, value in state.items()]
    modules = {
        part.name: [module_state(module, f"{part.name}.") for module in part.live]
        for part in parts
        if part.role == "module"
    }
    names = Names(held for states in modules.values() for held in states)
    optimizers = [(part, o) for part in parts if part.role == "optimizer" for o in part.live]
    saved = {id(optimizer) for _, optimizer in optimizers}
    for part, optimizer in optimizers:
        check_hidden(part.name, optimizer, saved)
    return Survey(parts, modules, names)


def flatten(
    state: Mapping[str, object], *, allow_pickle: bool = False, previous: Flat | None = None
) -> Flat:
    """Name every tensor of a state and encode every value.

    Call it on the thread that trains. `previous` is the last result for this job: tensors that have
    not changed their type since are not checked again. The state of generators is taken last.

    Raises:
        ConfigError: this is no mapping, or an entry's name cannot be one.
        LayoutError: two tensors have one name, or a parameter of an optimizer has none.
        UnsupportedValueError: a tensor or value has no stored form; the error names it.
    """
    surveyed = survey(state)
    sink = Collector()
    values: dict[str, Tree] = dict.fromkeys(state)
    for part in sorted(surveyed.parts, key=lambda part: part.role == "rng"):
        if part.role == "module":
            values[part.name] = _flatten_modules(surveyed.modules[part.name], sink, allow_pickle)
        elif part.role == "optimizer":
            values[part.name] = collect(
                part.name, part.live, surveyed.names, sink, allow_pickle=allow_pickle
            )
        else:
            values[part.name] = _flatten_other(part, sink, allow_pickle)
    empty = {
        part.name for part in surveyed.parts if part.role == "module" and not values[part.name]
    }
    return sink.freeze({k: tree for k, tree in values.items() if k not in empty}, previous)


def _part(name: str, value: object) -> Part:
    items: list[Any] = list(value) if isinstance(value, (list, tuple)) and value else [value]
    if all(isinstance(item, nn.Module) for item in items):
        return Part(name, "module", value, items)
    if items[0] is not value and all(isinstance(item, Optimizer) for item in items):
        return Part(name, "optimizer", value, _plain_list(name, items))
    optimizers = plain_optimizers(value, name)
    if optimizers is not None:
        return Part(name, "optimizer", value, optimizers)
    return Part(name, _role(value), value, [])


def _role(value: object) -> Role:
    if isinstance(value, rng.RNGState):
        return "rng"
    if isinstance(value, PerRank):
        return "per_rank"
    return "object" if is_stateful(value) else "plain"


def _plain_list(name: str, items: list[object]) -> list[Optimizer]:
    found: list[Optimizer] = []
    for i, item in enumerate(items):
        plain = plain_optimizers(item, f"{name}.{i}")
        if plain is None:
            raise UnsupportedValueError(
                f"{name}.{i}: {tags.type_name(item)} has a state_dict of its own; give it a name of"
                " its own in the state",
                fqn=f"{name}.{i}",
            )
        found += plain
    return found


def stream_of(live: rng.RNGState, tensors: Iterable[object]) -> int | None:
    """Return the stream of this rank's generators if it says so, or `tensors` of its state do."""
    if live.stream is not None:
        return live.stream
    meshes = meshes_of(tensors)
    return rng.stream_of_meshes(meshes, dist.get_world_size()) if meshes else None


def is_stateful(value: object) -> bool:
    """Tell whether an object saves and loads itself."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _flatten_modules(states: list[ModuleState], sink: Collector, allow_pickle: bool) -> Tree:  # noqa: FBT001
    extra = {}
    for held in states:
        for fqn, value in zip(held.fqns, held.values, strict=True):
            if isinstance(value, (torch.Tensor, FlatPiece)):
                sink.put(fqn, value, "parameter" if is_parameter(value) else "buffer")
            elif fqn in extra:
                raise LayoutError(f"{fqn} stands twice in the state", fqn=fqn)
            else:
                extra[fqn] = encode_value(value, path=fqn, tensors=sink, allow_pickle=allow_pickle)
    return {"extra_state": extra} if extra else None


def _flatten_other(part: Part, sink: Collector, allow_pickle: bool) -> Tree:  # noqa: FBT001
    value = part.value
    if part.role == "rng":
        return rng.capture(stream_of(value, sink.tensors))
    if part.role == "per_rank" and is_stateful(value.value):
        value = PerRank(value.value.state_dict())
    if part.role == "object":
        value = value.state_dict()
        small = _InlineSmall(sink)
        return encode_value(value, path=part.name, tensors=small, allow_pickle=allow_pickle)
    return encode_value(value, path=part.name, tensors=sink, allow_pickle=allow_pickle)


class Collector:
    """Takes named tensors, column by column: a state has tens of thousands, at every save.

    Attributes:
        fqns: the names, in the order in which tensors came.
        tensors: the tensors.
        kinds: of each its kind, or the parameter whose optimizer state it is.
    """

    def __init__(self) -> None:
        self.fqns: list[str] = []
        self.tensors: list[Any] = []  # of `Holding`, all of which have what is asked for here
        self.kinds: list[Kind | Holding] = []

    def put(self, fqn: str, tensor: Holding, kind: Kind | Holding) -> None:
        """Take a tensor under its whole name."""
        self.fqns.append(fqn)
        self.tensors.append(tensor)
        self.kinds.append(kind)

    def add(self, fqn: str, tensor: torch.Tensor) -> Tree:
        """Take a tensor that was found inside of a value."""
        self.put(fqn, tensor, "other")
        return {"$tensor": fqn}

    def freeze(self, values: dict[str, Tree], previous: Flat | None) -> Flat:
        """Return all that was taken; most of it from `previous` if nothing has changed since.

        Raises:
            LayoutError: two tensors have one name.
            UnsupportedValueError: a tensor has no stored form.
        """
        if previous is not None and self._is_as(previous):
            return previous._replace(values=values)
        order = sorted(range(len(self.fqns)), key=self.fqns.__getitem__)
        fqns = [self.fqns[i] for i in order]
        tensors = [self.tensors[i] for i in order]
        _check_unique(fqns)
        # First: asking anything else of an odd tensor may raise.
        sharded = _check_all(fqns, tensors)
        kinds = [_kind(self.kinds[i], self.tensors[i]) for i in order]
        aliases = _aliases(fqns, kinds, tensors, sharded)
        about = _about(tensors)
        leaves = list(map(Leaf, fqns, tensors, kinds, about[3]))
        for i, shards in sharded.items():
            leaves[i] = leaves[i]._replace(shards=shards)
        if aliases:
            leaves = [leaf for leaf in leaves if leaf.fqn not in aliases]
        columns = (fqns, kinds, sorted(aliases.items()), *about)
        raw = (self.fqns, self.tensors, tensors)
        return Flat(leaves, aliases, values, columns, sharded, raw)

    def _is_as(self, previous: Flat) -> bool:
        fqns, tensors, in_order = previous.raw
        # Many thousands of new tuples would cost more, and wake the garbage collector.
        return (
            self.fqns == fqns
            and len(self.tensors) == len(tensors)
            and all(map(operator.is_, self.tensors, tensors))
            and _is_about(in_order, previous.columns)
            and all(shards.is_of(in_order[i]) for i, shards in previous.sharded.items())
            and (
                not previous.aliases
                or previous.aliases == _aliases(*previous.columns[:2], in_order, previous.sharded)
            )
        )


def _about(tensors: list[Any]) -> About:
    return (
        [t.dtype for t in tensors],
        [t.device for t in tensors],
        [t.shape for t in tensors],
        [t.requires_grad for t in tensors],
    )


def _is_about(tensors: list[Any], columns: Columns) -> bool:
    # One pass: what costs is to fetch each tensor into the processor's cache.
    for tensor, dtype, device, shape, grad in zip(tensors, *columns[3:], strict=True):
        if tensor.shape != shape or tensor.dtype is not dtype:
            return False
        if tensor.device != device or tensor.requires_grad is not grad:
            return False
    return True


def _kind(kind: Kind | Holding, tensor: Holding) -> Kind:
    if not isinstance(kind, str):
        return "optimizer" if not tensor.shape or tensor.shape == kind.shape else "other"
    return kind


class _InlineSmall:
    def __init__(self, sink: Collector) -> None:
        self._sink = sink

    def add(self, fqn: str, tensor: torch.Tensor) -> Tree:
        check_tensor(fqn, tensor)
        if tensor.device.type == "cpu" and tensor.numel() * tensor.itemsize <= INLINE_BYTES:
            return tags.encode_tensor(tensor)
        return self._sink.add(fqn, tensor)


def _check_unique(fqns: list[str]) -> None:
    if len(set(fqns)) != len(fqns):
        twice = next(a for a, b in pairwise(fqns) if a == b)
        raise LayoutError(f"{twice} stands twice in the state", fqn=twice)


def _check_all(fqns: list[str], tensors: list[Any]) -> dict[int, Shards]:
    """Check all tensors; return what is here of those that are spread over ranks, by their places."""
    sharded = {}
    for i, (fqn, tensor) in enumerate(zip(fqns, tensors, strict=True)):
        if len(fqn) > MAX_FQN_CHARS or not fqn.isprintable():
            raise UnsupportedValueError(f"{fqn[:200]!r} cannot be the name of a tensor", fqn=fqn)
        if is_sharded(tensor):
            sharded[i] = shards_of(fqn, tensor)
            for part in sharded[i].parts:
                check_tensor(fqn, part)
        else:
            check_tensor(fqn, tensor)
    return sharded


def _aliases(
    fqns: list[str], kinds: list[Kind], tensors: list[Any], sharded: dict[int, Shards]
) -> dict[str, str]:
    # Of a tensor that is spread over ranks some hold no memory: all must find the same aliases.
    starts = [id(t) if i in sharded else t.data_ptr() for i, t in enumerate(tensors)]
    if len(set(starts)) == len(starts):
        return {}
    first: dict[object, int] = {}
    aliases: dict[str, str] = {}
    order = sorted(range(len(fqns)), key=lambda i: (_KIND_ORDER[kinds[i]], i))
    for i in order:
        tensor = tensors[i]
        if not starts[i]:
            continue
        # The bits say how the same memory is read: a conjugated view is another tensor.
        memory: object = starts[i]
        if i not in sharded:
            memory = (starts[i], tensor.device, tensor.dtype, tensor.shape, tensor.stride(),
                      tensor.is_conj(), tensor.is_neg())  # fmt: skip
        kept = first.setdefault(memory, i)
        if kept != i:
            aliases[fqns[i]] = fqns[kept]
    return aliases
