"""The copy that a training step waits for: from the tensors into a slot of shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from ckptd.model.columns import Piece
from ckptd.model.tensor import Held
from ckptd.trainer.flatten import Leaf
from ckptd.trainer.wrappers import DTYPES


class PackedChunk(Protocol):
    """Where a chunk lies: `offset_bytes` from the start of the slot."""

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def offset_bytes(self) -> int: ...  # noqa: D102


# Above this a copy of its own is as fast, and the memory of a replaced tensor is worth giving back.
JOIN_BYTES = 256 << 10


class _Source(NamedTuple):
    leaf: int
    cut: tuple[slice, ...] | None  # None: the whole tensor


class Destination:
    """The places in one slot that the pieces of a plan go to. Built once per plan and slot.

    Keeps views of the slot's memory: drop it before the memory is unmapped.
    """

    def __init__(
        self,
        slot: memoryview,
        held: Sequence[Held],
        chunks: Sequence[PackedChunk],
        pieces: Sequence[Piece],
    ) -> None:
        """Lay tensors over `slot`, which must be writable.

        Args:
            slot: the memory of the whole slot.
            held: the layout's rows; ``piece.tensor`` is a place in them.
            chunks: where each chunk lies in the slot.
            pieces: what to copy; each box lies in one that this rank holds.

        Raises:
            ValueError: a piece leaves the slot or what is held.
        """
        self.bytes = 0
        self._pieces: list[_Part] = []
        for piece in pieces:
            if not piece.length_bytes:
                continue
            chunk = chunks[piece.chunk]
            if chunk.dtype != held[piece.tensor].tensor.dtype:
                raise ValueError(f"{held[piece.tensor].tensor.fqn}: in a chunk of {chunk.dtype}")
            start = chunk.offset_bytes + piece.offset_bytes
            self._pieces.append(
                _Part(_source(piece, held[piece.tensor]), _place(slot, piece, chunk), start)
            )
            self.bytes += piece.length_bytes
        self._slot = slot
        self._bound: _Bound | None = None

    def copy(self, leaves: Sequence[Leaf]) -> int:
        """Copy the pieces out of the live tensors; returns the number of bytes.

        On return the tensors may be changed. `leaves` are of the layout that this was built for.
        """
        if not self._pieces:
            return 0
        with torch.no_grad():
            if self._bound is None or not self._bound.holds(leaves):
                self._bound = _bind(self._slot, self._pieces, leaves)
            self._bound.copy()
        return self.bytes


class _Part(NamedTuple):
    """A piece: where it comes from, and where it goes; `start` is its first byte in the slot."""

    source: _Source
    place: torch.Tensor
    start: int


class _Bound:
    """The copies of one set of live tensors, ready to run again as long as these stay as they are.

    Small tensors that lie side by side in the slot are concatenated into it as bytes: one call for
    all of them costs a fraction of a copy each. Views of a tensor that the job gave new memory
    (``p.data = ...``) would copy the old contents, so addresses are compared before each copy; until
    then the old memory is kept.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._joined: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._runs: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._places: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._cuts: list[tuple[torch.Tensor, int, tuple[int, ...]]] = []

    def join(self, run: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        """Add tensors that fill `run`, a view of the slot as bytes."""
        self._joined += tensors
        self._addresses += [tensor.data_ptr() for tensor in tensors]
        self._runs.append((run, [tensor.view(-1).view(torch.uint8) for tensor in tensors]))

    def add(self, place: torch.Tensor, source: torch.Tensor, cut: tuple[slice, ...] | None) -> None:
        """Add a tensor, or a cut of it, that is copied by itself."""
        self._places.append(place)
        self._sources.append(source if cut is None else source[cut])
        if cut is not None:
            self._cuts.append((source, source.data_ptr(), source.stride()))

    def holds(self, leaves: Sequence[Leaf]) -> bool:
        """Tell whether these are the same tensors in the same memory."""
        return (
            leaves is self._leaves
            and list(map(torch.Tensor.data_ptr, self._joined)) == self._addresses
            and all(map(torch.Tensor.is_contiguous, self._joined))
            and all(
                t.data_ptr() == start and t.stride() == stride for t, start, stride in self._cuts
            )
        )

    def copy(self) -> None:
        """Run the copies."""
        for run, sources in self._runs:
            torch.cat(sources, out=run)
        if self._places:
            torch._foreach_copy_(self._places, self._sources)


def _bind(slot: memoryview, parts: Sequence[_Part], leaves: Sequence[Leaf]) -> _Bound:
    bound = _Bound(leaves)
    for run in _runs(parts, leaves):
        if len(run) > 1:
            size = run[-1].start + run[-1].place.nbytes - run[0].start
            joined = torch.frombuffer(slot, dtype=torch.uint8, count=size, offset=run[0].start)
            bound.join(joined, [leaves[part.source.leaf].tensor for part in run])
            continue
        for part in run:
            bound.add(part.place, leaves[part.source.leaf].tensor, part.source.cut)
    return bound


def _runs(parts: Sequence[_Part], leaves: Sequence[Leaf]) -> Iterator[list[_Part]]:
    """Yield the parts in order, those together that can be concatenated."""
    run: list[_Part] = []
    end = -1
    for part in parts:
        is_plain = part.source.cut is None and _is_plain(leaves[part.source.leaf].tensor)
        if run and not (is_plain and part.start == end):
            yield run
            run = []
        run.append(part)
        end = part.start + part.place.nbytes if is_plain else -1
    if run:
        yield run


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether the bytes of a small tensor are, in order, what is stored."""
    return (
        tensor.nbytes <= JOIN_BYTES
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _source(piece: Piece, held: Held) -> _Source:
    boxes = held.boxes
    if len(boxes) != 1 or boxes[0].intersect(piece.box) != piece.box:
        raise ValueError(f"{held.tensor.fqn}: box {piece.box} is not held")
    if piece.box == boxes[0]:
        return _Source(piece.tensor, None)
    return _Source(piece.tensor, piece.box.slices(boxes[0].start))


def _place(slot: memoryview, piece: Piece, chunk: PackedChunk) -> torch.Tensor:
    dtype = DTYPES[chunk.dtype]
    offset = chunk.offset_bytes + piece.offset_bytes
    if piece.box.volume * dtype.itemsize != piece.length_bytes:
        raise ValueError(f"a piece of {piece.length_bytes} bytes for box {piece.box} of {dtype}")
    view = torch.frombuffer(slot, dtype=dtype, count=piece.box.volume, offset=offset)
    return view.reshape(piece.box.shape)
