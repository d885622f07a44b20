"""What a rank holds: tensors, the boxes of them, and the layout they add up to."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import msgspec
import xxhash

from ckptd.model import dtypes
from ckptd.model.box import Box

MAX_DIMS = 64
MAX_ELEMENTS = 1 << 48
MAX_FQN_CHARS = 1024

Kind = Literal["parameter", "optimizer", "buffer", "other"]
REPLICATED_KINDS: frozenset[Kind] = frozenset({"parameter", "optimizer"})


class Tensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor of the state, as the whole job sees it. `shape` is the global shape."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    requires_grad: bool
    device: str

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return dtypes.BY_NAME[self.dtype].itemsize

    @property
    def elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Raw bytes of the whole tensor."""
        return self.elements * self.itemsize

    def check(self) -> None:
        """Check what types cannot say.

        Raises:
            ValueError: naming the field.
        """
        if not self.fqn or len(self.fqn) > MAX_FQN_CHARS or not self.fqn.isprintable():
            raise ValueError(f"bad tensor name {self.fqn[:80]!r}")
        if self.dtype not in dtypes.BY_NAME:
            raise ValueError(f"{self.fqn}: unknown dtype {self.dtype[:40]!r}")
        if len(self.shape) > MAX_DIMS or any(not 0 <= n < MAX_ELEMENTS for n in self.shape):
            raise ValueError(f"{self.fqn}: bad shape")
        if self.elements > MAX_ELEMENTS:
            raise ValueError(f"{self.fqn}: more than {MAX_ELEMENTS} elements")


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor and the boxes of it that one rank holds.

    `is_replicated` is True where a placement says that other holders of the same box have the same
    contents; otherwise the ranks' fingerprints decide.
    """

    tensor: Tensor
    boxes: tuple[Box, ...]
    is_replicated: bool = False


class Layout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """Everything that one rank holds, in FQN order, and the other names of tied tensors.

    `aliases` maps a second name of a tensor to the name under which it stands in `held`.
    """

    held: tuple[Held, ...]
    aliases: dict[str, str] = {}

    def digest(self) -> str:
        """Return 32 hex digits that are equal for equal layouts (the tensors' devices left out).

        Computed once: nobody changes `aliases` after that.
        """
        return self._digest

    @cached_property  # in the instance's dict, which is no part of its value nor of its bytes
    def _digest(self) -> str:
        rows = [
            (h.tensor.fqn, h.tensor.dtype, h.tensor.shape, h.tensor.kind, h.tensor.requires_grad,
             h.boxes, h.is_replicated)
            for h in self.held
        ]  # fmt: skip
        return xxhash.xxh3_128_hexdigest(
            msgspec.msgpack.encode((rows, sorted(self.aliases.items())))
        )
