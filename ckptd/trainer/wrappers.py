"""What stands around modules and tensors: unwrapped, or refused, by type.

Never by text: a module may well call a child ``module``. Types of parts of torch that were never
imported are not looked for, and importing them here would cost seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

from ckptd.errors import UnsupportedValueError
from ckptd.model import dtypes
from ckptd.trainer.fsdp1 import WRAPPED

_ATTRIBUTES = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", WRAPPED),
    # This one takes its name out of the keys of its state_dict by itself.
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)
_SHARDED_TENSORS = (("torch.distributed._shard.sharded_tensor", "ShardedTensor"),)
_LAZY = (UninitializedParameter, UninitializedBuffer)
_PLAIN = (torch.Tensor, Parameter)

DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in dtypes.BY_NAME if hasattr(torch, name)
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def _known(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


class Wrapping:
    """The wrapper types that this process has imported, and the name each gives to what it wraps."""

    def __init__(self) -> None:
        self._types: list[tuple[type, str]] = [
            (DataParallel, "module"),
            (DistributedDataParallel, "module"),
        ]
        for module, name, attribute in _ATTRIBUTES:
            kind = _known(module, name)
            if kind is not None:
                self._types.append((kind, attribute))
        self.types = tuple(kind for kind, _ in self._types)
        self.hidden = "_checkpoint_wrapped_module"

    def attribute(self, module: nn.Module) -> str | None:
        """Return the name under which a wrapper holds what it wraps; None for any other module."""
        if not isinstance(module, self.types):
            return None
        return next(name for kind, name in self._types if isinstance(module, kind))


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers around `module` itself."""
    wrapping = Wrapping()
    while (attribute := wrapping.attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


def clean_paths(root: nn.Module, prefix: str) -> dict[str, str] | None:
    """Return for each module path (as in the keys of a ``state_dict``) the one without wrappers.

    Paths end with a dot and start with `prefix`. None where no module in `root` is a wrapper.
    """
    wrapping = Wrapping()
    kinds = set(map(type, root.modules()))
    if not any(issubclass(kind, wrapping.types) for kind in kinds):
        return None
    paths = {}
    todo = [(root, prefix, prefix)]
    while todo:
        module, raw, clean = todo.pop()
        paths[raw] = clean
        wrapped = wrapping.attribute(module)
        for name, child in module.named_children():
            inner = clean if name == wrapped else f"{clean}{name}."
            todo.append(
                (child, raw if name == wrapped == wrapping.hidden else f"{raw}{name}.", inner)
            )
    return paths


def clean_modules(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in `root` that are no wrappers, by paths as `clean_paths` gives them."""
    wrapping = Wrapping()
    todo = [(root, prefix)]
    while todo:
        module, path = todo.pop()
        wrapped = wrapping.attribute(module)
        if wrapped is None:
            yield path, module
        children = module.named_children()
        todo += [(child, path if name == wrapped else f"{path}{name}.") for name, child in children]


def clean_name(key: str, paths: dict[str, str]) -> str:
    """Return a ``state_dict`` key without the names of wrappers, by the paths of `clean_paths`."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) >= 0:
        clean = paths.get(key[: end + 1])
        if clean is not None:
            return clean + key[end + 1 :]
    return key


def is_lazy(tensor: torch.Tensor) -> bool:
    """Tell whether the bytes in memory are not yet those of the elements."""
    return tensor.is_conj() or tensor.is_neg()


def check_tensor(fqn: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is plain memory on a device, of a dtype that has a stored form.

    Raises:
        UnsupportedValueError: naming the tensor and what it is.
    """
    what = _refused_kind(tensor)
    if what:
        raise UnsupportedValueError(f"{fqn}: {what}", fqn=fqn)


def _refused_kind(tensor: torch.Tensor) -> str:
    what = "" if type(tensor) in _PLAIN else _refused_type(tensor)
    if what:
        return what
    if tensor.is_nested:
        return "a nested tensor has no stored form; convert it"
    if tensor.is_meta:
        return "a tensor on the meta device has no contents"
    if tensor.is_quantized:
        return "a quantized tensor has no stored form; save its int_repr, scale and zero point"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout} has no stored form; convert it with to_dense()"
    return "" if tensor.dtype in DTYPE_NAMES else f"{tensor.dtype} has no stored form"


def _refused_type(tensor: torch.Tensor) -> str:
    kind = type(tensor)
    sharded = tuple(filter(None, (_known(*where) for where in _SHARDED_TENSORS)))
    if isinstance(tensor, sharded):
        return f"a {kind.__qualname__} is not supported yet"
    if isinstance(tensor, _LAZY):
        return "a lazy parameter has no contents yet; run a forward pass before saving"
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {kind.__module__}.{kind.__qualname__} is not plain memory; convert it"
    return ""
