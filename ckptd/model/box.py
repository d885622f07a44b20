"""Half-open index blocks of a tensor."""

from __future__ import annotations

import math

import msgspec


class Box(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The elements ``start[d] <= i[d] < stop[d]`` of a tensor; a scalar's box has no dimensions."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Box:
        """Return the box that is the whole of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent in each dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def volume(self) -> int:
        """The number of elements; 1 for a scalar, 0 where some extent is empty."""
        return math.prod(self.shape)

    def is_within(self, shape: tuple[int, ...]) -> bool:
        """Tell whether this is a well-formed box of a tensor of this shape."""
        return (
            len(self.start) == len(self.stop) == len(shape)
            and all(0 <= a <= b <= n for a, b, n in zip(self.start, self.stop, shape, strict=True))
        )  # fmt: skip

    def intersect(self, other: Box) -> Box | None:
        """Return what both boxes hold, or None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def subtract(self, other: Box) -> list[Box]:
        """Return disjoint boxes that together are this one without `other`."""
        common = self.intersect(other)
        if common is None:
            return [self]
        rest = []
        start, stop = list(self.start), list(self.stop)
        for d in range(len(start)):
            if start[d] < common.start[d]:
                rest.append(Box(tuple(start), (*stop[:d], common.start[d], *stop[d + 1 :])))
            if common.stop[d] < stop[d]:
                rest.append(Box((*start[:d], common.stop[d], *start[d + 1 :]), tuple(stop)))
            start[d], stop[d] = common.start[d], common.stop[d]
        return rest

    def moved(self, origin: tuple[int, ...]) -> Box:
        """Return this box as seen from `origin`.

        Raises:
            ValueError: that has other dimensions.
        """
        if len(origin) != len(self.start):
            raise ValueError(f"box {self} seen from {origin}")
        return Box(
            tuple(a - o for a, o in zip(self.start, origin, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin, strict=True)),
        )

    def slices(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index that selects this box from an array whose first element is `origin`."""
        return tuple(
            slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True)
        )

    def cut(self, max_elements: int) -> list[Box]:
        """Cut into boxes of at most `max_elements`, in row-major order, each contiguous in this box.

        The cut runs along the first dimension in which one index is small enough, so that every part
        is a run of consecutive elements of the row-major layout of this box.
        """
        if self.volume <= max_elements:
            return [self]
        shape = self.shape
        dim = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= max_elements)
        return list(self._cut_at(dim, max(1, max_elements // math.prod(shape[dim + 1 :]))))

    def _cut_at(self, dim: int, rows: int) -> list[Box]:
        heads = [(self.start[:dim], self.stop[:dim])] if dim == 0 else _singles(self, dim)
        tail_start, tail_stop = self.start[dim + 1 :], self.stop[dim + 1 :]
        return [
            Box((*head_start, a, *tail_start), (*head_stop, min(a + rows, self.stop[dim]), *tail_stop))
            for head_start, head_stop in heads
            for a in range(self.start[dim], self.stop[dim], rows)
        ]  # fmt: skip

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def _singles(box: Box, dims: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the one-index blocks of the first `dims` dimensions, in row-major order."""
    heads: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for d in range(dims):
        heads = [
            ((*start, i), (*stop, i + 1))
            for start, stop in heads
            for i in range(box.start[d], box.stop[d])
        ]
    return heads
