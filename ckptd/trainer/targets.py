"""The tensors that a restore writes into, live ones and fresh ones."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ckptd.errors import LayoutError, ShapeMismatchError
from ckptd.model.box import Box
from ckptd.model.manifest import Tree
from ckptd.model.tensor import Tensor
from ckptd.trainer.shards import empty_like_meta, is_dtensor, is_sharded, shards_of
from ckptd.trainer.stored import Stored, check_row, dtype_of, place
from ckptd.trainer.terms import Terms
from ckptd.trainer.values import tensor_names
from ckptd.trainer.wrappers import DTYPES, check_tensor, is_lazy

Put = Callable[[int, npt.NDArray[np.uint8]], None]
"""Takes raw bytes from a place on; see `put_of`."""


class Target(NamedTuple):
    """Memory to fill, with the box `box` of what the checkpoint holds under `fqn`, in `dtype`."""

    fqn: str
    box: Box
    tensor: torch.Tensor
    dtype: torch.dtype

    def inner(self, box: Box) -> Box:
        """Return a box of the stored tensor as one of the memory."""
        return box.moved(self.box.start)


class Targets:
    """Collects targets while the layouts are compared; writes nothing.

    Attributes:
        rows: the targets.
        missing: live names that the checkpoint does not hold.
        used: stored names that something was found for.
    """

    def __init__(self, stored: Stored, terms: Terms) -> None:
        self.terms = terms
        self.rows: list[Target] = []
        self.missing: list[str] = []
        self.used: set[str] = set()
        self._stored = stored
        self._places: dict[str, torch.device] = {}

    def in_place(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Want live tensors filled. Names of one memory are one tensor: the first found fills it.

        Raises:
            ShapeMismatchError: one has another shape or dtype in the checkpoint, if strict.
            UnsupportedValueError: one is of a kind that cannot be filled.
        """
        groups: dict[object, list[tuple[str, torch.Tensor]]] = {}
        for fqn, tensor in named:
            if not is_sharded(tensor):
                check_tensor(fqn, tensor)
            groups.setdefault(_memory(tensor), []).append((fqn, tensor))
        for group in groups.values():
            found = [fqn for fqn, _ in group if self._stored.find(fqn) is not None]
            if not found:
                self.missing.append(group[0][0])
                continue
            tensor = group[0][1]
            row = self._stored.find(found[0])
            assert row is not None
            if not self.fits(found[0], row, tuple(tensor.shape), tensor.dtype):
                continue
            self.fill(row, tensor)

    def fits(self, live_name: str, row: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Tell whether a stored tensor fits a live one; if not, it is missing.

        Raises:
            ShapeMismatchError: it does not, and a restore is strict.
        """
        is_cast = self.terms.may_cast(DTYPES.get(row.dtype), dtype)
        try:
            check_row(live_name, row, shape, dtype_of(row) if is_cast else dtype)
        except ShapeMismatchError:
            if self.terms.strict:
                raise
            self.missing.append(live_name)
            return False
        return True

    def fill(self, row: Tensor, tensor: Any) -> None:
        """Want a tensor, or a `FlatPiece`, filled with the contents of `row`."""
        self.used.add(row.fqn)
        if is_sharded(tensor):
            shards = shards_of(row.fqn, tensor)
            for box, part in zip(shards.boxes, shards.parts, strict=True):
                check_tensor(row.fqn, part)
                self.rows.append(Target(row.fqn, box, part, dtype_of(row)))
        elif tensor.numel():
            whole = Box.full(tuple(tensor.shape))
            self.rows.append(Target(row.fqn, whole, tensor, dtype_of(row)))

    def fresh(
        self, row: Tensor, *, like: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Make a tensor for `row`, in its dtype unless another is given, and want it filled.

        It lies on the device of `like` and in its memory format if the shapes agree, else where
        `map_location` puts it.
        """
        dtype = dtype or dtype_of(row)
        if like is not None and tuple(like.shape) == row.shape:
            tensor = torch.empty_like(like, dtype=dtype, requires_grad=False)
        else:
            device = like.device if like is not None else self._place(row.device)
            tensor = torch.empty(row.shape, dtype=dtype, device=device)
        if tensor.is_meta:  # asked for, by `map_location`: shapes without contents
            self.used.add(row.fqn)
        else:
            self.fill(row, tensor)
        return tensor

    def materialise(self, row: Tensor, meta: torch.Tensor) -> torch.Tensor:
        """Make a tensor that takes the place of one on the meta device, and want it filled."""
        if is_dtensor(meta):
            made = empty_like_meta(meta)
        else:
            made = torch.empty(row.shape, dtype=meta.dtype, device=self._place(row.device))
        self.fill(row, made)
        return made

    @property
    def cuda_devices(self) -> set[torch.device]:
        """The GPUs on which targets lie."""
        return {target.tensor.device for target in self.rows if target.tensor.is_cuda}

    def write(self, i: int, box: Box, raw: memoryview | bytes | bytearray) -> None:
        """Copy verified bytes (row-major) into a box, which lies in that of target `i`.

        From any thread; boxes that are written at once must not overlap. `raw` is not kept.

        Raises:
            ValueError: the box is not in the tensor, or `raw` is not its bytes.
        """
        target = self.rows[i]
        write_box(target.tensor, target.inner(box), raw, target.dtype)

    def place(self, i: int, box: Box) -> Put | None:
        """Return what takes the bytes of a box of target `i` in parts; None: `write` takes them whole.

        The same rules as for `write`.
        """
        target = self.rows[i]
        if target.dtype is not target.tensor.dtype:
            return None
        return put_of(target.tensor, target.inner(box))

    def of_tree(self, tree: Tree, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a tensor for each that a stored value refers to: the live one, or a fresh one.

        Raises:
            LayoutError: the value refers to a tensor that the checkpoint does not hold.
        """
        found: dict[str, torch.Tensor] = {}
        for fqn in tensor_names(tree):
            name = self._stored.live_name(fqn)
            row = self._stored.row(fqn)
            if row is None:
                raise LayoutError(
                    f"{fqn}: a value refers to it, but it is not in the checkpoint", fqn=fqn
                )
            if name in live:
                found[fqn] = live[name]
            elif fqn not in found:
                found[fqn] = self.fresh(row)
        return found

    def _place(self, device: str) -> torch.device:
        if device not in self._places:
            self._places[device] = place(device, self.terms.map_location)
        return self._places[device]


def _memory(tensor: torch.Tensor) -> object:
    start = 0 if is_sharded(tensor) else tensor.data_ptr()
    if not start:
        return id(tensor)
    return (
        start, tensor.device, tensor.dtype, tensor.shape, tensor.stride(),
        tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def write_box(
    tensor: torch.Tensor,
    box: Box,
    raw: memoryview | bytes | bytearray,
    dtype: torch.dtype | None = None,
) -> None:
    """Copy the row-major bytes of a box into a tensor. Safe from several threads for disjoint boxes.

    `dtype` is that of the bytes if it is not the tensor's, which they are cast to then.

    Raises:
        ValueError: the box is not in the tensor, or `raw` is not its bytes.
    """
    if not box.is_within(tuple(tensor.shape)):
        raise ValueError(f"box {box} outside of shape {tuple(tensor.shape)}")
    count = math.prod(box.shape)
    dtype = dtype or tensor.dtype
    if memoryview(raw).nbytes != count * dtype.itemsize:
        raise ValueError(f"{memoryview(raw).nbytes} bytes for box {box} of {dtype}")
    if not count:
        return
    held = np.frombuffer(raw, dtype=np.uint8)
    # torch.frombuffer warns of memory that is read-only; it is only read here, and `held` keeps it.
    window = (ctypes.c_uint8 * held.nbytes).from_address(held.ctypes.data)
    with torch.no_grad():
        source = torch.frombuffer(window, dtype=dtype).reshape(box.shape)
        tensor[box.slices((0,) * len(box.start))].copy_(source)
    del source, window, held


def tensor_over(raw: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return a tensor over bytes, only to be read, as long as they are there.

    ``torch.from_numpy`` warns of memory that is read-only, as that of a daemon is.
    """
    window = (ctypes.c_uint8 * raw.nbytes).from_address(raw.ctypes.data)
    return torch.frombuffer(window, dtype=torch.uint8)


def put_of(tensor: torch.Tensor, box: Box) -> Put | None:
    """Return what puts bytes of `box` into a tensor, from a given one of them on.

    None where these bytes do not lie in one piece in the tensor's memory. Safe from several threads
    for disjoint bytes; begins and ends with whole elements.
    """
    start = _linear_start(box, tuple(tensor.shape))
    if start is None or not tensor.is_contiguous() or is_lazy(tensor):
        return None
    flat = tensor.detach().view(-1).view(torch.uint8)
    start *= tensor.itemsize
    part = flat[start : start + box.volume * tensor.itemsize]
    if tensor.device.type != "cpu":

        def put_away(at: int, raw: npt.NDArray[np.uint8]) -> None:
            part[at : at + len(raw)].copy_(tensor_over(raw))

        return put_away
    there = part.numpy()

    def put(at: int, raw: npt.NDArray[np.uint8]) -> None:
        np.copyto(there[at : at + len(raw)], raw)  # lets go of the interpreter lock

    return put


def _linear_start(box: Box, shape: tuple[int, ...]) -> int | None:
    """Return the place of the box's first element in row-major order; None if it has gaps there."""
    if not box.is_within(shape):
        raise ValueError(f"box {box} outside of shape {shape}")
    place, step, is_whole = 0, 1, True
    for start, count, extent in reversed(list(zip(box.start, box.shape, shape, strict=True))):
        if not is_whole and count != 1:
            return None
        is_whole = is_whole and count == extent
        place += start * step
        step *= extent
    return place
