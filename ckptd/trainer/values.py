"""Python values as tagged JSON, without pickle.

None, bools, 64-bit integers, finite floats, strings, lists, and dicts whose keys are strings that do
not start with ``$`` stand for themselves. Everything else is an object with one key, the tag:
``{"$tuple": [...]}``; docs/format.md lists them. Types are matched exactly: what a subclass adds
would be lost, so a subclass is refused by name. Ranks compare values in this form, so equal values
have equal forms (sets are sorted). An object that is held twice is stored twice.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec
import torch

from ckptd.errors import ConfigError, CorruptError, UnsupportedValueError
from ckptd.model.manifest import Tree
from ckptd.trainer import tags

MAX_DEPTH = 90
MAX_NODES = 10_000_000
MAX_INLINE_BYTES = 1 << 20

T = TypeVar("T")

_FACTORIES: dict[str, Callable[[], object]] = {
    kind.__name__: kind for kind in (list, int, float, dict, set, str, bool, tuple)
}


class PerRank(Generic[T]):
    """A value, or an object with ``state_dict``, that is another one on every rank.

    Each rank saves its own and gets its own back; without this, ckptd notices that ranks differ and
    says so once. Tensors inside are stored with the values, so they must be small.

    `on_resize` says what happens when a checkpoint of another world size is restored: ``"error"``
    refuses it; ``"drop"`` gives ranks that there were their own, leaves new ranks what they have, and
    forgets the others' (they are named in `Resumed.surplus`); a function is called on each rank with
    the saved values of all old ranks in order, the rank and the world size, and returns the value of
    this rank. Of an object with ``state_dict`` the values are its state dicts.
    """

    def __init__(
        self,
        value: T,
        *,
        on_resize: Literal["error", "drop"] | Callable[[list[Any], int, int], Any] = "error",
    ) -> None:
        if on_resize not in ("error", "drop") and not callable(on_resize):
            raise ConfigError(f"on_resize={on_resize!r}: write 'error', 'drop' or a function")
        self.value = value
        self.on_resize = on_resize

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


class TensorSink(Protocol):
    """Takes the tensors that are found inside of a value."""

    def add(self, fqn: str, tensor: torch.Tensor) -> Tree:
        """Take a tensor and return what stands for it in the tree.

        Raises:
            LayoutError: this tensor cannot be stored under this name.
        """


class InlineTensors:
    """A sink that puts small tensors into the tree itself, where each rank has its own."""

    def add(self, fqn: str, tensor: torch.Tensor) -> Tree:
        """Return the tensor's bytes, tagged; waits for the device.

        Raises:
            UnsupportedValueError: the tensor is too large, or not a plain one.
        """
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UnsupportedValueError(f"{fqn}: not a plain tensor", fqn=fqn)
        if tensor.numel() * tensor.itemsize > MAX_INLINE_BYTES:
            raise UnsupportedValueError(
                f"{fqn}: a tensor of more than {MAX_INLINE_BYTES} bytes cannot be a per-rank value;"
                " put it into the state as a tensor",
                fqn=fqn,
            )
        return tags.encode_tensor(tensor)


def encode_value(
    value: object, *, path: str, tensors: TensorSink, allow_pickle: bool = False
) -> Tree:
    """Return the stored form of `value`; nothing of it is referred to later, tensors excepted.

    `path` names the value in errors, and the tensors in it: ``loader.states.0``.

    Raises:
        UnsupportedValueError: something in it has no safe form; the error names where and what.
    """
    return _Encoder(tensors, allow_pickle=allow_pickle).encode(value, path, 0)


def decode_value(
    tree: Tree, *, tensors: Mapping[str, torch.Tensor], trust_pickle: bool = False
) -> object:
    """Return the value of a stored form. `tensors` are those that `tensor_names` lists.

    The tree may be hostile: nothing runs, and no size is believed before it is checked.

    Raises:
        CorruptError: the tree is not in the form.
        UnsupportedValueError: it holds a pickle and `trust_pickle` is not set.
    """
    try:
        return _Decoder(tensors, trust_pickle=trust_pickle).decode(tree, 0)
    except tags.BAD_BODY as error:
        raise CorruptError(f"a stored value is not in the form of values ({error})") from error


def tensor_names(tree: Tree) -> Iterator[str]:
    """Yield the names of the tensors that a tree refers to, in no particular order."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if type(node) is list:
            todo += node
        elif type(node) is dict:
            if len(node) == 1 and type(node.get("$tensor")) is str:
                yield node["$tensor"]
            else:
                todo += node.values()


# Brackets around a member in the stored form, at most: records hold `MAX_DEPTH` and a few.
_BRACKETS: dict[type, int] = {list: 1, dict: 3, tuple: 2, set: 2, frozenset: 2, deque: 3}


class _Encoder:
    def __init__(self, tensors: TensorSink, *, allow_pickle: bool) -> None:
        self._tensors = tensors
        self._allow_pickle = allow_pickle
        self._open: set[int] = set()
        self._nodes = 0

    def encode(self, value: Any, path: str, depth: int) -> Tree:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise UnsupportedValueError(
                f"{path}: more than {MAX_NODES} values; use a tensor or a numpy array", fqn=path
            )
        container = _CONTAINERS.get(type(value))
        if container is not None:
            return self._enter(container, value, path, depth)
        if isinstance(value, torch.Tensor):
            return self._tensors.add(path, value)
        try:
            return tags.encode(value)
        except ValueError as error:
            return self._pickle(value, path, str(error))

    def _enter(self, container: _Container, value: Any, path: str, depth: int) -> Tree:
        if id(value) in self._open:
            raise UnsupportedValueError(
                f"{path}: a {tags.type_name(value)} that holds itself", fqn=path
            )
        if depth >= MAX_DEPTH:
            raise UnsupportedValueError(
                f"{path[:200]}: nested too deeply to be stored; flatten it", fqn=path
            )
        self._open.add(id(value))
        tree = container(self, value, path, depth + _BRACKETS.get(type(value), 4))
        self._open.discard(id(value))
        return tree

    def _pickle(self, value: object, path: str, what: str) -> Tree:
        if not self._allow_pickle:
            raise UnsupportedValueError(
                f"{path}: {what} has no stored form; leave it out of the state, convert it, or make the"
                " Checkpointer with allow_pickle=True, which stores a pickle: opening one runs code",
                fqn=path,
            )
        try:
            raw = pickle.dumps(value)
        except Exception as error:  # __reduce__ is the value's own code
            raise UnsupportedValueError(
                f"{path}: {what} cannot be pickled ({error})", fqn=path
            ) from error
        return {"$pickle": base64.b64encode(raw).decode("ascii")}

    def items(self, values: Iterable[Any], path: str, depth: int) -> list[Tree]:
        return [self.encode(v, f"{path}.{i}", depth) for i, v in enumerate(values)]

    def pairs(self, value: Mapping[Any, Any], path: str, depth: int) -> list[Tree]:
        return [
            [self.encode(k, path, depth), self.encode(v, f"{path}.{k}", depth)]
            for k, v in value.items()
        ]

    def mapping(self, value: dict[Any, Any], path: str, depth: int) -> Tree:
        for key in value:
            if type(key) is not str or key[:1] == "$" or not _has_utf8(key):
                return {"$dict": self.pairs(value, path, depth)}
        return {k: self.encode(v, f"{path}.{k}", depth) for k, v in value.items()}

    def sorted(self, value: Iterable[Any], path: str, depth: int) -> list[Tree]:
        trees = [self.encode(v, path, depth) for v in value]
        return sorted(trees, key=msgspec.json.encode)

    def per_rank(self, value: PerRank[Any], path: str, depth: int) -> Tree:
        outer, self._tensors = self._tensors, InlineTensors()
        tree = {"$per_rank": self.encode(value.value, path, depth)}
        self._tensors = outer
        return tree

    def factory(self, value: defaultdict[Any, Any], path: str, depth: int) -> Tree:
        name = getattr(value.default_factory, "__name__", "")
        if value.default_factory is None:
            return {"$defaultdict": [None, self.pairs(value, path, depth)]}
        if _FACTORIES.get(name) is not value.default_factory:
            return self._pickle(value, path, f"a defaultdict of {value.default_factory!r}")
        return {"$defaultdict": [name, self.pairs(value, path, depth)]}


def _has_utf8(text: str) -> bool:
    return text.isascii() or type(tags.encode_text(text)) is str


_Container = Callable[[_Encoder, Any, str, int], Tree]

_CONTAINERS: dict[type, _Container] = {
    dict: _Encoder.mapping,
    list: _Encoder.items,
    tuple: lambda e, v, p, d: {"$tuple": e.items(v, p, d)},
    set: lambda e, v, p, d: {"$set": e.sorted(v, p, d)},
    frozenset: lambda e, v, p, d: {"$frozenset": e.sorted(v, p, d)},
    OrderedDict: lambda e, v, p, d: {"$ordered": e.pairs(v, p, d)},
    Counter: lambda e, v, p, d: {"$counter": e.pairs(v, p, d)},
    defaultdict: _Encoder.factory,
    deque: lambda e, v, p, d: {"$deque": [v.maxlen, e.items(v, p, d)]},
    slice: lambda e, v, p, d: {"$slice": e.items((v.start, v.stop, v.step), p, d)},
    PerRank: _Encoder.per_rank,
}


class _Decoder:
    def __init__(self, tensors: Mapping[str, torch.Tensor], *, trust_pickle: bool) -> None:
        self._tensors = tensors
        self._trust_pickle = trust_pickle

    def decode(self, tree: Any, depth: int) -> Any:
        kind = type(tree)
        if kind is dict:
            return self._decode_dict(tree, depth + 1)
        if kind is list:
            return self.items(tree, depth + 1)
        if tree is None or kind is str or kind is bool:
            return tree
        if kind is int and tags.INT_MIN <= tree <= tags.INT_MAX:
            return tree
        if kind is float and tree - tree == 0:
            return tree
        raise ValueError(f"a bare {kind.__name__} that JSON does not have")

    def _decode_dict(self, tree: dict[Any, Any], depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"deeper than {MAX_DEPTH} levels")
        if len(tree) == 1:
            ((tag, body),) = tree.items()
            if type(tag) is str and tag[:1] == "$":
                return self._decode_tag(tag, body, depth)
        if any(type(key) is not str or key[:1] == "$" for key in tree):
            raise ValueError("a tag beside other keys")
        return {key: self.decode(value, depth) for key, value in tree.items()}

    def _decode_tag(self, tag: str, body: Any, depth: int) -> Any:
        leaf = tags.DECODERS.get(tag)
        if leaf is not None:
            return leaf(body)
        container = _OPENERS.get(tag)
        if container is None:
            raise ValueError(f"unknown tag {tag[:40]!r}")
        return container(self, body, depth)

    def items(self, body: Any, depth: int) -> list[Any]:
        if type(body) is not list:
            raise ValueError("a tag without a list")
        if depth > MAX_DEPTH:
            raise ValueError(f"deeper than {MAX_DEPTH} levels")
        return [self.decode(item, depth) for item in body]

    def pairs(self, body: Any, depth: int) -> dict[Any, Any]:
        if type(body) is not list:
            raise ValueError("a tag without a list")
        decoded = {}
        for key, value in body:
            decoded[self.decode(key, depth)] = self.decode(value, depth)
        if len(decoded) != len(body):
            raise ValueError("a key that stands twice")
        return decoded

    def factory(self, body: Any, depth: int) -> Any:
        name, pairs = body
        factory = None if name is None else _FACTORIES[name]
        return defaultdict(factory, self.pairs(pairs, depth))

    def deque(self, body: Any, depth: int) -> Any:
        limit, items = body
        if limit is not None and (type(limit) is not int or not 0 <= limit <= tags.INT_MAX):
            raise ValueError("a deque of a length that cannot be")
        return deque(self.items(items, depth), limit)

    def slice(self, body: Any, depth: int) -> Any:
        start, stop, step = self.items(body, depth)
        return slice(start, stop, step)

    def tensor(self, body: Any, _: int) -> torch.Tensor:
        if type(body) is not str or body not in self._tensors:
            raise ValueError(f"tensor {str(body)[:200]!r} is not there")
        return self._tensors[body]

    def unpickle(self, body: Any, _: int) -> Any:
        if not self._trust_pickle:
            raise UnsupportedValueError(
                "the checkpoint holds a pickle, which can run any code; pass trust_pickle=True"
                " if you trust whoever wrote it"
            )
        raw = base64.b64decode(body, validate=True)
        try:
            return pickle.Unpickler(io.BytesIO(raw)).load()  # noqa: S301 - asked for by trust_pickle
        except Exception as error:
            raise CorruptError(f"a stored pickle does not open ({error})") from error


_OPENERS: dict[str, Callable[[_Decoder, Any, int], Any]] = {
    "$tuple": lambda d, body, depth: tuple(d.items(body, depth)),
    "$set": lambda d, body, depth: set(d.items(body, depth)),
    "$frozenset": lambda d, body, depth: frozenset(d.items(body, depth)),
    "$dict": _Decoder.pairs,
    "$ordered": lambda d, body, depth: OrderedDict(d.pairs(body, depth)),
    "$counter": lambda d, body, depth: Counter(d.pairs(body, depth)),
    "$defaultdict": _Decoder.factory,
    "$deque": _Decoder.deque,
    "$slice": _Decoder.slice,
    "$per_rank": lambda d, body, depth: PerRank(d.decode(body, depth)),
    "$tensor": _Decoder.tensor,
    "$pickle": _Decoder.unpickle,
}
