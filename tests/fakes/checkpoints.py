"""Whole, valid checkpoints, written in one go without daemon or trainer, for tests of reading."""

from collections.abc import Sequence
from contextlib import suppress

import msgspec
import numpy as np
import xxhash

from ckptd.codec.chunk import Encoder, stored_bound
from ckptd.codec.records import encode_record
from ckptd.errors import ObjectExistsError
from ckptd.model import keys
from ckptd.model.box import Box
from ckptd.model.columns import Columns
from ckptd.model.keys import ChunkId, StepId
from ckptd.model.manifest import FORMAT, Chunk, Manifest, RankManifest
from ckptd.model.tensor import Held, Layout, Tensor
from ckptd.plan.commit import manifest_of
from ckptd.plan.pack import Packed, pack
from ckptd.plan.split import split, whole_share
from ckptd.store.base import Store
from ckptd.store.root import create_root
from ckptd.units import MIB

PLAIN = {
    "model.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.bias": np.array([1.5, -2.5], dtype=np.float32),
    "optimizer.step": np.array(7, dtype=np.int64),
}


def write_checkpoint(
    store: Store,
    id_: StepId,
    tensors: dict[str, np.ndarray],
    *,
    world_size: int = 1,
    previous: StepId | None = None,
    plan: dict[str, Sequence[Sequence[Box]]] | None = None,
    is_planned: bool = True,
    values: dict[str, object] | Sequence[dict[str, object]] | None = None,
    metrics: dict[str, float | None] | None = None,
    aliases: dict[str, str] | None = None,
    sequence: int = 1,
    dtypes: dict[str, str] | None = None,
    chunk_bytes: int = 32 * MIB,
    compression: str = "auto",
) -> Manifest:
    """Write a whole checkpoint and return its manifest; the root is made if there is none.

    Every rank holds all of each tensor and the split plan shares the writing out, unless `plan`
    maps a tensor to the boxes that each rank holds. With `is_planned` False every rank writes all
    it holds. `values` is one mapping for all ranks, or one for each. Array dtypes that torch names
    otherwise (bfloat16 as uint16) are named by `dtypes`.
    """
    create_root(store)
    boxes = plan or {}
    layouts = [
        _layout(tensors, boxes, rank, aliases or {}, dtypes or {}) for rank in range(world_size)
    ]
    shares = split(layouts, chunk_bytes) if is_planned else None
    parts = []
    for rank, layout in enumerate(layouts):
        share = whole_share(layout) if shares is None else shares.shares[rank]
        packed = pack(layout, share, chunk_bytes=chunk_bytes, header_bytes=4096)
        record = RankManifest(
            format=FORMAT,
            step=id_.step,
            attempt=id_.attempt,
            rank=rank,
            world_size=world_size,
            sequence=sequence,
            plan=None if shares is None else shares.digest,
            layout=layout.digest(),
            previous=None if previous is None else str(previous),
            parent=None,
            captured_at=1.7e9,
            metrics=metrics or {},
            tensors=packed.tensors,
            aliases=packed.aliases,
            chunks=_put_chunks(store, id_, packed, tensors, compression),
            pieces=Columns.pack(packed.pieces),
            fingerprints=b"",
            values=_values(values, rank),
        )
        data = encode_record(record)
        store.put_new(keys.rank(id_, rank), data)
        parts.append((record, len(data), xxhash.xxh3_128_hexdigest(data)))
    manifest = manifest_of(parts)
    store.put_new(keys.checkpoint(id_), encode_record(manifest))
    return manifest


def rewrite_record(store: Store, key: str, record: object, **changes: object) -> None:
    """Replace a record by one with some fields changed, well encoded."""
    store.put(key, encode_record(msgspec.structs.replace(record, **changes)))


def flip_byte(store: Store, key: str, at: int) -> None:
    """Flip one bit of a stored object."""
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[at] ^= 1
    store.put(key, bytes(data))


def _layout(tensors, boxes, rank, aliases, dtypes) -> Layout:
    held = []
    for fqn, array in sorted(tensors.items()):
        kind = "optimizer" if fqn.startswith("optimizer") else "parameter"
        tensor = Tensor(
            fqn, dtypes.get(fqn, str(array.dtype)), array.shape, kind, kind == "parameter", "cpu"
        )
        own = boxes[fqn][rank] if fqn in boxes else [Box.full(array.shape)]
        held.append(Held(tensor, tuple(own), is_replicated=True))
    return Layout(tuple(held), aliases)


def _put_chunks(store, id_, packed: Packed, tensors, compression) -> tuple[Chunk, ...]:
    encoder = Encoder()
    chunks = []
    for number, span in enumerate(packed.chunks):
        raw = bytearray(span.raw_bytes)
        for piece in packed.pieces:
            if piece.chunk == number:
                array = tensors[packed.tensors[piece.tensor].fqn]
                part = array[piece.box.slices((0,) * array.ndim)]
                end = piece.offset_bytes + piece.length_bytes
                raw[piece.offset_bytes : end] = np.ascontiguousarray(part).tobytes()
        out = memoryview(bytearray(stored_bound(len(raw))))
        encoded = encoder.encode(memoryview(raw), span.dtype, out, mode=compression)
        chunk = ChunkId(encoded.hash, id_)
        with suppress(ObjectExistsError):
            store.put_new(chunk.key, out[: encoded.stored_bytes])
        chunks.append(Chunk(encoded.hash, str(id_), span.dtype, len(raw), encoded.stored_bytes))
    return tuple(chunks)


def _values(values, rank: int) -> dict[str, object]:
    if values is None:
        return {}
    return dict(values) if isinstance(values, dict) else dict(values[rank])
