"""Optimizer state by parameter FQN, taken from the optimizer itself.

``Optimizer.state_dict`` numbers parameters by their place in the groups, so a checkpoint would fit
only the very same grouping. Here each tensor is ``<optimizer>/<FQN>/<key>``, and the options of a
group are found again through the parameters in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ckptd.errors import LayoutError, UnsupportedValueError
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Kind
from ckptd.trainer.fsdp1 import FlatPiece, Holding, is_flat
from ckptd.trainer.modules import Names
from ckptd.trainer.shards import Shards, is_sharded, shards_of
from ckptd.trainer.values import TensorSink, encode_value

# How the live program wants its kernels, not state: what was saved may not run on these devices.
PROGRAM_OPTIONS = frozenset({"foreach", "fused", "capturable", "differentiable"})
_NOT_OPTIONS = frozenset({"params", "param_names"})
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


class OptimizerSink(TensorSink, Protocol):
    """Takes tensors, and knows what kind each is."""

    def put(self, fqn: str, tensor: Holding, kind: Kind | Holding) -> None:
        """Take a tensor under its whole name; `kind` may be the parameter whose state it is."""


class Predicted(NamedTuple):
    """A tensor that an optimizer will hold after its next step; `shards` as of its parameter."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    shards: Shards | None = None


def plain_optimizers(value: object, path: str) -> list[Optimizer] | None:
    """Return the optimizers whose ``.state`` is the whole truth about `value`.

    None means that `value` is no optimizer of torch, or one whose own ``state_dict`` must be
    believed.

    Raises:
        UnsupportedValueError: `value` is sharded in a way that is not supported.
    """
    if not isinstance(value, Optimizer):
        return None
    zero = getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", None)
    if zero is not None and isinstance(value, zero):
        raise UnsupportedValueError(
            f"{path}: ZeroRedundancyOptimizer is not supported yet: each rank holds other moments",
            fqn=path,
        )
    if type(value).state_dict is Optimizer.state_dict:
        return [value]
    inner = _contained(value)
    if not inner or _has_own_state(value, inner):
        return None
    found = []
    for optimizer in inner:
        plain = plain_optimizers(optimizer, path)
        if plain is None:
            return None
        found += plain
    return found


def _contained(value: Optimizer) -> list[Optimizer]:
    for name in ("optimizers", "optimizer", "optim"):
        inner = getattr(value, name, None)
        found: list[Any] = list(inner) if isinstance(inner, (list, tuple)) else [inner]
        if all(isinstance(optimizer, Optimizer) for optimizer in found):
            return found
    return []


def _has_own_state(value: Optimizer, inner: list[Optimizer]) -> bool:
    state = getattr(value, "state", None)
    return bool(state) and not any(state is optimizer.state for optimizer in inner)


def check_hidden(path: str, optimizer: Optimizer, saved: set[int]) -> None:
    """Refuse an optimizer that keeps another one, with moments, which nothing in the state saves.

    `saved` are the ids of all optimizers that are saved.

    Raises:
        LayoutError: naming the attribute.
    """
    for name, inner in vars(optimizer).items():
        if not isinstance(inner, Optimizer) or id(inner) in saved or not inner.state:
            continue
        if inner.state is not optimizer.state:
            raise LayoutError(
                f"{path}: {type(optimizer).__qualname__} keeps a {type(inner).__qualname__} in"
                f" .{name} whose state would be lost; put that one into the state too",
                fqn=path,
            )


def collect(
    path: str, optimizers: list[Optimizer], names: Names, sink: OptimizerSink, *, allow_pickle: bool
) -> Tree:
    """Put all state tensors of one entry into `sink` and return what is not a tensor.

    The tree has ``groups`` (the FQNs and options of each, the ``class`` of its optimizer, and which of
    the FQNs are ``idle``: have no state, so that a restore can tell it from state that was lost, or
    ``elsewhere``: other ranks have all of them),
    ``state_values`` by FQN and key,
    and ``shared``: what an optimizer keeps under a name instead of a parameter. The last two and
    ``idle`` only where there is such a thing, ``state_values`` always.

    Raises:
        LayoutError: a parameter is in no module of the state.
        UnsupportedValueError: an option or a state value has no stored form.
    """
    tree: dict[str, Any] = {"groups": [], "state_values": {}}
    shared: dict[str, Tree] = {}

    def encode(where: str, value: object) -> Tree:
        return encode_value(value, path=where, tensors=sink, allow_pickle=allow_pickle)

    for optimizer in optimizers:
        held: dict[object, Any] = optimizer.state  # type: ignore[assignment]
        for group, params in named_groups(path, optimizer, names):
            where = f"{path}/groups.{len(tree['groups'])}"
            options = {
                k: encode(f"{where}.{k}", v) for k, v in group.items() if k not in _NOT_OPTIONS
            }
            tree["groups"].append(
                {"params": params, "options": options, "class": class_name(optimizer)}
            )
            pairs = list(zip(params, group["params"], strict=True))
            elsewhere = [f for f, p in pairs if is_elsewhere(names.piece(p))]
            if elsewhere:
                tree["groups"][-1]["elsewhere"] = elsewhere
            idle = [f for f, p in pairs if not held.get(p) and not is_elsewhere(names.piece(p))]
            if idle and held:
                tree["groups"][-1]["idle"] = idle
        for owner, state in held.items():
            if isinstance(owner, torch.Tensor):
                fqn = _named(path, owner, names, "its state")
                piece = names.piece(owner)
                parts = state if piece is None else parts_of(piece, state)
                odd = _collect_one(f"{path}/{fqn}/", piece or owner, parts, sink, encode)
                if odd:
                    tree["state_values"][fqn] = odd
            elif type(owner) is str:
                shared[owner] = encode(f"{path}/{owner}", state)
            else:
                raise UnsupportedValueError(f"{path}: state of {owner!r}", fqn=path)
    if shared:
        tree["shared"] = shared
    return tree


def is_elsewhere(piece: FlatPiece | None) -> bool:
    """Tell whether other ranks have all of a parameter, and its state."""
    return piece is not None and not piece.count


def parts_of(piece: FlatPiece, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter of FSDP1, its tensors as the parts that they are."""
    return {
        key: piece.of(value)
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() == piece.count
        else value
        for key, value in state.items()
    }


def class_name(optimizer: Optimizer) -> str:
    """Return the name of an optimizer's class as it stands in checkpoints."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _collect_one(
    base: str,
    owner: torch.Tensor | FlatPiece,
    state: Mapping[str, object],
    sink: OptimizerSink,
    encode: Callable[[str, object], Tree],
) -> dict[str, Tree]:
    odd = {}
    for key, value in state.items():
        if "/" in key:
            raise UnsupportedValueError(f"{base}{key}: a key with a slash", fqn=base + key)
        if isinstance(value, (torch.Tensor, FlatPiece)):
            if is_sharded(owner) and not is_sharded(value) and len(value.shape):
                raise UnsupportedValueError(
                    f"{base}{key}: state of shape {tuple(value.shape)} of a sharded parameter that is"
                    " neither a DTensor nor an element for each of the parameter's here: nothing tells"
                    " what it is on other ranks",
                    fqn=base + key,
                )
            sink.put(base + key, value, owner)
        else:
            odd[key] = encode(base + key, value)
    return odd


def named_groups(
    path: str, optimizer: Optimizer, names: Names
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield the live groups, each with the FQNs of its parameters.

    Raises:
        LayoutError: a parameter is in no module of the state.
    """
    for g, group in enumerate(optimizer.param_groups):
        yield (
            group,
            [
                names.find(p) or _named(path, p, names, f"parameter {i} of group {g}")
                for i, p in enumerate(group["params"])
            ],
        )


def _named(path: str, parameter: torch.Tensor, names: Names, what: str) -> str:
    fqn = names.find(parameter)
    if fqn is None and is_flat(parameter):
        raise UnsupportedValueError(
            f"{path}: {what} is a flat parameter of FullyShardedDataParallel, whose optimizer state has"
            " no names; make the wrapper with use_orig_params=True",
            fqn=path,
        )
    if fqn is None:
        raise LayoutError(
            f"{path}: {what} (shape {tuple(parameter.shape)}) is in no module of the state;"
            " put the module that owns it into the state",
            fqn=path,
        )
    return fqn


def predict_state(path: str, optimizer: Optimizer, names: Names) -> list[Predicted]:
    """Return the tensors that are not there yet but will be after the first step.

    Only the classes of torch themselves are known; for any other nothing is predicted, and its
    tensors appear in the layout when they exist.
    """
    predicted = []
    for group, fqns in named_groups(path, optimizer, names):
        keys = state_keys(optimizer, group) or []
        for fqn, parameter in zip(fqns, group["params"], strict=True):
            piece = names.piece(parameter)
            is_new = parameter.requires_grad and not optimizer.state.get(parameter)
            if is_new and not is_elsewhere(piece):
                predicted += [
                    _predict(f"{path}/{fqn}/{key}", key, piece or parameter, group) for key in keys
                ]
    return predicted


def state_keys(optimizer: Optimizer, options: Mapping[str, Any]) -> list[str] | None:
    """Return the keys of a parameter's state under these options of its group.

    None where the class is not one of torch that is known here.
    """
    keys = _KEYS.get(type(optimizer))
    return None if keys is None else keys(options)


def _predict(fqn: str, key: str, parameter: Holding, group: dict[str, Any]) -> Predicted:
    if key != "step":
        shards = shards_of(fqn, parameter) if is_sharded(parameter) else None
        return Predicted(fqn, tuple(parameter.shape), parameter.dtype, parameter.device, shards)
    # As torch.optim.optimizer._get_scalar_dtype.
    wide = not group.get("fused") and torch.get_default_dtype() == torch.float64
    return Predicted(
        fqn, (), torch.float64 if wide else torch.float32, step_device(parameter, group)
    )


def step_device(parameter: Holding, group: dict[str, Any]) -> torch.device:
    """Return where a group's step counters live: with the parameter only where kernels read them."""
    is_read = group.get("capturable") or group.get("fused")
    return parameter.device if is_read else torch.device("cpu")


def _adam_keys(group: Mapping[str, Any]) -> list[str]:
    return ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])


def _rmsprop_keys(group: Mapping[str, Any]) -> list[str]:
    momentum = ["momentum_buffer"] * (group["momentum"] > 0)
    return ["step", "square_avg", *momentum] + ["grad_avg"] * bool(group["centered"])


_KEYS: dict[type, Callable[[Mapping[str, Any]], list[str]]] = {
    Adam: _adam_keys,
    AdamW: _adam_keys,
    SGD: lambda group: ["momentum_buffer"] * (group["momentum"] != 0),
    Adagrad: lambda _: ["step", "sum"],
    RMSprop: _rmsprop_keys,
}
