"""Random states, random ways to spread them over ranks, and a store made of plain bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import xxhash
from hypothesis import strategies as st

from ckptd.model.box import Box
from ckptd.model.columns import Columns
from ckptd.model.manifest import FORMAT, Chunk, RankManifest
from ckptd.model.tensor import REPLICATED_KINDS, Held, Kind, Layout, Tensor
from ckptd.plan.pack import Packed, pack
from ckptd.plan.reading import ChunkRead
from ckptd.plan.split import Share, merge_runs

Array = npt.NDArray[np.generic]
KINDS: tuple[Kind, ...] = ("parameter", "optimizer", "buffer", "other")
NUMPY = {"float32": np.float32, "float64": np.float64, "uint8": np.uint8, "int16": np.int16}
STEP = "000000000001-0001"


def tensor(fqn="w", shape=(4, 8), dtype="float32", kind: Kind = "parameter", grad=True) -> Tensor:
    return Tensor(fqn, dtype, tuple(shape), kind, grad, "cpu")


def layout(
    *held: tuple[Tensor, Iterable[Box]] | Tensor, is_replicated=False, aliases=None
) -> Layout:
    rows = [
        Held(h, (Box.full(h.shape),), is_replicated)
        if isinstance(h, Tensor)
        else Held(h[0], tuple(h[1]), is_replicated)
        for h in held
    ]
    return Layout(tuple(sorted(rows, key=lambda h: h.tensor.fqn)), aliases or {})


def rows(start: int, stop: int, columns: int = 8) -> Box:
    return Box((start, 0), (stop, columns))


@st.composite
def tensors(draw) -> list[Tensor]:
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    return [
        tensor(
            f"t{number}",
            draw(shapes),
            draw(st.sampled_from(sorted(NUMPY))),
            draw(st.sampled_from(KINDS)),
            draw(st.booleans()),
        )
        for number in range(draw(st.integers(1, 5)))
    ]


@st.composite
def cells(draw, shape: tuple[int, ...]) -> list[list[Box]]:
    """Part a tensor into what single holders hold: cells of a grid, or flat runs of elements."""
    if draw(st.booleans()):
        edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
        spans = [list(pairwise(e)) if len(e) > 1 else [(0, 0)] for e in edges]
        return [[Box(tuple(a for a, _ in c), tuple(b for _, b in c))] for c in product(*spans)]
    elements = Box.full(shape).cut(1)
    marks = draw(st.lists(st.integers(0, len(elements)), max_size=3))
    ends = sorted({0, len(elements), *marks})
    return [merge_runs(elements[a:b]) for a, b in pairwise(ends)]


@st.composite
def layouts(draw, of: Sequence[Tensor], world_size: int) -> list[Layout]:
    held: list[list[Held]] = [[] for _ in range(world_size)]
    ranks = st.sets(st.integers(0, world_size - 1), min_size=1)
    for t in of:
        boxes: dict[int, list[Box]] = {}
        is_replicated = draw(st.booleans())
        for cell in draw(cells(t.shape)):
            for rank in draw(st.one_of(ranks, st.just(set(range(world_size))))):
                boxes.setdefault(rank, []).extend(cell)
        for rank, own in boxes.items():
            held[rank].append(Held(t, tuple(own), is_replicated))
    return [Layout(tuple(sorted(h, key=lambda h: h.tensor.fqn))) for h in held]


def contents(t: Tensor, rank: int, *, is_replicated: bool) -> Array:
    """What `rank` holds of a tensor; buffers that nothing declares equal differ between ranks."""
    seed = xxhash.xxh32_intdigest(t.fqn.encode())
    own = 0 if t.kind in REPLICATED_KINDS or is_replicated else rank + 1
    numbers = np.arange(math.prod(t.shape), dtype=np.int64) * 7 + seed % 100 + own * 31
    return (numbers % 251).astype(NUMPY[t.dtype]).reshape(t.shape)


def manifest(
    rank: int,
    own: Layout,
    share: Share,
    *,
    world_size: int,
    plan: str | None = None,
    chunk_bytes: int = 64,
    blobs: dict[str, bytes] | None = None,
    **changes,
) -> RankManifest:
    """Write a share as a rank would: pieces into chunks, chunks named by content."""
    packed = pack(own, share, chunk_bytes=chunk_bytes, header_bytes=4096)
    chunks = []
    for span, raw in zip(packed.chunks, fill(own, packed, rank), strict=True):
        name = xxhash.xxh3_128_hexdigest(span.dtype.encode() + raw)
        chunks.append(Chunk(name, STEP, span.dtype, len(raw), len(raw) + 10))
        if blobs is not None:
            blobs[name] = raw
    fields = {
        "format": FORMAT,
        "step": 1,
        "attempt": 1,
        "rank": rank,
        "world_size": world_size,
        "sequence": 1,
        "plan": plan,
        "layout": own.digest(),
        "previous": None,
        "parent": None,
        "captured_at": 1.0 + rank,
        "metrics": {},
        "tensors": packed.tensors,
        "aliases": packed.aliases,
        "chunks": tuple(chunks),
        "pieces": Columns.pack(packed.pieces),
        "fingerprints": b"",
        "values": {},
    }
    made = RankManifest(**{**fields, **changes})
    made.check()
    return made


def fill(own: Layout, packed: Packed, rank: int) -> list[bytes]:
    """Copy what a rank holds to where its pieces lie."""
    raw = [bytearray(span.raw_bytes) for span in packed.chunks]
    for piece in packed.pieces:
        held = own.held[piece.tensor]
        whole = contents(held.tensor, rank, is_replicated=held.is_replicated)
        part = whole[piece.box.slices((0,) * whole.ndim)].tobytes()
        assert len(part) == piece.length_bytes
        raw[piece.chunk][piece.offset_bytes : piece.offset_bytes + len(part)] = part
    return [bytes(chunk) for chunk in raw]


def read(reads: Sequence[ChunkRead], blobs: dict[str, bytes], into: Sequence[tuple[Box, Array]]):
    """Copy regions into arrays (each the contents of its box), seeing only the bytes of `spans`."""
    for chunk, regions in reads:
        seen = bytearray(b"\xee" * chunk.raw_bytes)
        for start, stop in ChunkRead(chunk, regions).spans():
            seen[start:stop] = blobs[chunk.hash][start:stop]
        for region in regions:
            box, target = into[region.wanted]
            piece = np.frombuffer(
                seen, target.dtype, region.piece_box.volume, region.offset_bytes
            ).reshape(region.piece_box.shape)
            target[region.box.slices(box.start)] = piece[region.box.slices(region.piece_box.start)]
