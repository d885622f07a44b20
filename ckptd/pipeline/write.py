"""Chunks on their way from a slot to the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal, NamedTuple

from ckptd import failpoints
from ckptd.codec.chunk import Encoder, header_bytes, read_header, stored_bound
from ckptd.errors import ObjectExistsError
from ckptd.model.keys import ChunkId, StepId
from ckptd.model.manifest import MAX_CHUNK_BYTES, Chunk
from ckptd.pipeline.buffers import BufferPool
from ckptd.pipeline.threads import submit
from ckptd.store.base import Store

Compression = Literal["auto", "zstd", "none"]


class Source(NamedTuple):
    """A chunk that is to be stored: its dtype and its raw bytes, which another process may change.

    `check` is called after each block was copied and raises when the bytes are no longer those of
    the snapshot.
    """

    dtype: str
    raw: memoryview
    check: Callable[[], None]


class ChunkWriter:
    """Worker threads that hash, code and store chunks; shared by all snapshots of a daemon.

    In flight are at most as many chunks as there are workers, within `budget_bytes`.
    """

    def __init__(
        self, *, workers: int | None = None, budget_bytes: int = 4 * MAX_CHUNK_BYTES
    ) -> None:
        self.workers = workers or default_workers()
        self.buffers = BufferPool(max(budget_bytes, stored_bound(MAX_CHUNK_BYTES) + (1 << 16)))
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ckptd-chunk")

    def write(
        self, store: Store, birth: StepId, sources: Sequence[Source], compression: Compression
    ) -> list[Chunk]:
        """Store all chunks of one snapshot and make them durable; return them in order.

        Blocks the calling thread. The first failure stops the rest and is raised.

        Raises:
            StoreError: the snapshot is not stored whole; it may be written again.
        """
        stop = threading.Event()
        futures = [
            submit(self._pool, self._write_one, store, birth, source, compression, stop)
            for source in sources
        ]
        chunks = _results(futures, stop)
        failpoints.hit("chunks.sync")
        store.sync()
        return chunks

    def close(self, *, wait: bool = True) -> None:
        """End the workers after the chunk that each is at, which `wait` False does not wait for."""
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _write_one(
        self,
        store: Store,
        birth: StepId,
        source: Source,
        compression: Compression,
        stop: threading.Event,
    ) -> Chunk:
        if stop.is_set():
            raise InterruptedError("another chunk of this snapshot failed")
        raw_bytes = source.raw.nbytes
        with self.buffers.borrow(stored_bound(raw_bytes)) as out:
            encoded = self._encoder().encode(
                source.raw, source.dtype, out, mode=compression, copied=source.check
            )
            chunk = ChunkId(encoded.hash, birth)
            stored_bytes = encoded.stored_bytes
            try:
                failpoints.hit("chunk.put")
                store.put_new(chunk.key, out[:stored_bytes], is_deferred=True)
            except ObjectExistsError:
                stored_bytes = _stored_bytes(store, chunk, source.dtype, raw_bytes)
        return Chunk(chunk.hash, str(birth), source.dtype, raw_bytes, stored_bytes)

    def _encoder(self) -> Encoder:
        if not hasattr(self._local, "encoder"):
            self._local.encoder = Encoder()
        encoder: Encoder = self._local.encoder
        return encoder


def default_workers() -> int:
    """Return how many cores this process may use: the affinity, not what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _results(futures: list[Future[Chunk]], stop: threading.Event) -> list[Chunk]:
    try:
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        wait(futures)  # nobody may read the slot once this returns
        raise


def _stored_bytes(store: Store, chunk: ChunkId, dtype: str, raw_bytes: int) -> int:
    """Return the length of a chunk that another rank of this birth stored already.

    It has our content, but may have been coded in another way; its header says how long it is.
    """
    size = header_bytes(raw_bytes)
    (head,) = store.get_ranges(chunk.key, [(0, size)])
    header = read_header(head, hash=chunk.hash, dtype=dtype, raw_bytes=raw_bytes)
    return size + sum(block.stored_bytes for block in header.blocks)
