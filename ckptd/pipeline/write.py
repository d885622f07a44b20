"""Chunks on their way from a slot to the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Literal, NamedTuple

from ckptd import failpoints
from ckptd.codec.chunk import Encoder, header_bytes, read_header, stored_bound
from ckptd.cores import usable_cores
from ckptd.errors import ObjectExistsError
from ckptd.model.keys import ChunkId, StepId
from ckptd.model.manifest import MAX_CHUNK_BYTES, Chunk
from ckptd.pipeline.buffers import BufferPool
from ckptd.pipeline.lanes import Lane
from ckptd.pipeline.pace import Pace
from ckptd.store.base import CHUNK_ROOM_BYTES, Store

Compression = Literal["auto", "zstd", "none"]

PUTS = 16
MAX_CODERS = 4
BUDGET_BYTES = PUTS * CHUNK_ROOM_BYTES
"""Of all stores together; each has a budget of its own (`Traits.budget_bytes`)."""


class Source(NamedTuple):
    """A chunk that is to be stored: its dtype and its raw bytes, which another process may change.

    `check` is called after each block was copied and raises when the bytes are no longer those of
    the snapshot.
    """

    dtype: str
    raw: memoryview
    check: Callable[[], None]


class ChunkWriter:
    """Threads that hash and code chunks, and threads that store them; shared by all snapshots.

    While one chunk is being stored the next one is coded. In flight are at most `budget_bytes`, and
    for each store what it is worth. Chunks of an urgent snapshot go ahead of all that are not being
    stored already, and are lent buffers first: a thread that waits for a buffer in order to code
    another one gives that up for them. What coded chunks hold comes back as they are stored, which
    waits for nothing but the store.
    """

    def __init__(
        self, *, workers: int | None = None, puts: int = PUTS, budget_bytes: int = BUDGET_BYTES
    ) -> None:
        self.workers = workers or default_workers()
        self.buffers = BufferPool(max(budget_bytes, stored_bound(MAX_CHUNK_BYTES) + (1 << 16)))
        self._paces: dict[str, Pace] = {}
        self._paces_lock = threading.Lock()  # guards _paces
        self._local = threading.local()
        self._coders = Lane(ThreadPoolExecutor(self.workers, thread_name_prefix="ckptd-code"))
        self._putters = Lane(ThreadPoolExecutor(puts, thread_name_prefix="ckptd-put"))

    def write(
        self,
        store: Store,
        birth: StepId,
        sources: Sequence[Source],
        compression: Compression,
        *,
        is_urgent: bool = False,
    ) -> list[Chunk]:
        """Store all chunks of one snapshot and make them durable; return them in order.

        Blocks the calling thread. The first failure stops the rest and is raised. With ``auto``
        chunks are left raw while coding them would keep the store waiting; of an urgent snapshot
        too with ``zstd``, and as long as nobody knows whether it would.

        Raises:
            StoreError: the snapshot is not stored whole; it may be written again.
        """
        stop = threading.Event()
        job = _Job(store, birth, compression, stop, self.pace_of(store), is_urgent)
        futures = [
            self._coders.submit(partial(self._code, job, source), is_urgent=is_urgent)
            for source in sources
        ]
        if is_urgent:
            self.buffers.wake()
        chunks = _results(futures, stop)
        failpoints.hit("chunks.sync")
        store.sync()
        return chunks

    def pace_of(self, store: Store) -> Pace:
        """Return what is known of the speed of a root, for as long as this daemon lives."""
        with self._paces_lock:
            return self._paces.setdefault(store.url, Pace(self.workers))

    def close(self, *, wait: bool = True) -> None:
        """End the threads after the chunk that each is at, which `wait` False does not wait for."""
        self._coders.close(wait=wait)
        self._putters.close(wait=wait)

    def _code(self, job: _Job, source: Source) -> Future[Chunk]:
        """Code a chunk into a buffer that goes on to a thread that stores it."""
        job.check()
        raw_bytes = source.raw.nbytes
        with ExitStack() as held:
            out = held.enter_context(
                self.buffers.borrow(
                    stored_bound(raw_bytes),
                    within_bytes=job.store.traits.budget_bytes,
                    is_urgent=job.is_urgent,
                    gives_way=lambda: not job.is_urgent and self._coders.has_urgent,
                )
            )
            job.check()  # the buffer may have been long in coming
            mode = job.mode()
            with job.pace.coding(raw_bytes) if mode != "none" else nullcontext():
                encoded = self._encoder().encode(
                    source.raw, source.dtype, out, mode=mode, copied=source.check
                )
            ready = _Ready(encoded.hash, source.dtype, raw_bytes, out[: encoded.stored_bytes])
            held.callback(ready.stored.release)
            put = partial(self._put, job, ready, held.pop_all())
            return self._putters.submit(put, is_urgent=job.is_urgent)

    def _put(self, job: _Job, ready: _Ready, held: ExitStack) -> Chunk:
        with held:
            job.check()
            chunk = ChunkId(ready.hash, job.birth)
            stored_bytes = len(ready.stored)
            try:
                failpoints.hit("chunk.put")
                with job.pace.storing(stored_bytes):
                    job.store.put_new(chunk.key, ready.stored, is_deferred=True)
            except ObjectExistsError:
                stored_bytes = _stored_bytes(job.store, chunk, ready.dtype, ready.raw_bytes)
        return Chunk(chunk.hash, str(job.birth), ready.dtype, ready.raw_bytes, stored_bytes)

    def _encoder(self) -> Encoder:
        if not hasattr(self._local, "encoder"):
            self._local.encoder = Encoder()
        encoder: Encoder = self._local.encoder
        return encoder


class _Job(NamedTuple):
    """One call of `write`."""

    store: Store
    birth: StepId
    compression: Compression
    stop: threading.Event
    pace: Pace
    is_urgent: bool

    def check(self) -> None:
        if self.stop.is_set():
            raise InterruptedError("another chunk of this snapshot failed")

    def mode(self) -> Compression:
        """Decide how the next chunk is coded."""
        if not self.store.has_conditional_put:
            # A rank of another node may overwrite this chunk, and only raw bytes are the same
            # whatever coded them there.
            return "none"
        mode: Compression = (
            "auto" if self.compression == "zstd" and self.is_urgent else self.compression
        )
        if mode == "auto" and not self.pace.is_worth_coding(is_urgent=self.is_urgent):
            return "none"
        return mode


class _Ready(NamedTuple):
    """A coded chunk; `stored` lies in a borrowed buffer."""

    hash: str
    dtype: str
    raw_bytes: int
    stored: memoryview


def default_workers() -> int:
    """Return how many threads code: half the cores, and four at most.

    One codes faster than most disks store. Where training keeps all cores busy, two on two cores
    cost it half as much again as one, since each time that one of them runs the training threads
    wait for each other, and the checkpoint was durable no sooner.
    """
    return max(1, min(MAX_CODERS, usable_cores() // 2))


def _results(coding: list[Future[Future[Chunk]]], stop: threading.Event) -> list[Chunk]:
    try:
        return [future.result().result() for future in coding]
    except BaseException:
        stop.set()
        wait(coding)  # nobody may read the slot once this returns
        wait([f.result() for f in coding if not f.cancelled() and f.exception() is None])
        raise


def _stored_bytes(store: Store, chunk: ChunkId, dtype: str, raw_bytes: int) -> int:
    """Return the length of a chunk that another rank of this birth stored already.

    It has our content, but may have been coded in another way; its header says how long it is.
    """
    size = header_bytes(raw_bytes)
    head = bytearray(size)
    store.read_into(chunk.key, 0, memoryview(head))
    header = read_header(head, hash=chunk.hash, dtype=dtype, raw_bytes=raw_bytes)
    return size + sum(block.stored_bytes for block in header.blocks)
