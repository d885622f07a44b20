"""Chunks on their way from the store into tensors: fetched, verified, and only then handed out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

from ckptd.codec.blocks import BLOCK_BYTES
from ckptd.codec.chunk import Decoder, Header, block_count, header_bytes, read_header, stored_bound
from ckptd.errors import CorruptError, ObjectNotFoundError, StoreError, UnsupportedFormatError
from ckptd.model.manifest import Chunk
from ckptd.plan.reading import ChunkRead, Region
from ckptd.store.base import Store

Sink = Callable[[Region, memoryview], None]

BUDGET_BYTES = 256 << 20


class Loader:
    """Brings verified blocks of one chunk at a time into a staging buffer of its own.

    For one thread. The staging buffer grows to the largest chunk that it met (at most
    `MAX_CHUNK_BYTES`) and is reused, since fresh memory costs far more than the copy.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._decoder = Decoder()
        self._staging: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def load(self, chunk: Chunk, blocks: Sequence[int] | None = None) -> npt.NDArray[np.uint8]:
        """Return the chunk's raw bytes, of which only `blocks` (None: all) are filled in.

        The array belongs to this object and holds until the next call. Each block was checked
        against the header, and the header against the chunk's name. What fails a check is fetched
        once more before it counts as damage: a bit may have flipped on the way.

        Raises:
            CorruptError: the object is missing, of another length, or not what its name says.
            UnsupportedFormatError: a newer version wrote it.
            StoreError: the store did not answer.
        """
        count = block_count(chunk.raw_bytes)
        wanted = range(count) if blocks is None else blocks
        try:
            return self._load_once(chunk, wanted, count)
        except (CorruptError, UnsupportedFormatError):
            return self._load_once(chunk, wanted, count)

    def _load_once(self, chunk: Chunk, blocks: Sequence[int], count: int) -> npt.NDArray[np.uint8]:
        key = chunk.id.key
        if chunk.stored_bytes > stored_bound(chunk.raw_bytes):  # before memory is asked for
            raise CorruptError("a chunk that is longer than any coding of it", key=key)
        if len(self._staging) < chunk.raw_bytes:
            self._staging = np.empty(chunk.raw_bytes, np.uint8)
        staging = self._staging[: chunk.raw_bytes]
        try:
            header, stored = self._fetch(chunk, blocks, is_whole=2 * len(blocks) >= count)
            for i in blocks:
                out = staging[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
                self._decoder.decode_block(header, i, stored[i], out.data)
        except ObjectNotFoundError:
            raise CorruptError("a chunk is missing", key=key) from None
        except StoreError as error:
            if type(error) is StoreError:  # the base class says: the object has another length
                raise CorruptError("a chunk of another length", key=key) from None
            raise
        except CorruptError as error:
            raise error if error.key else CorruptError(str(error), key=key) from None
        return staging

    def _fetch(
        self, chunk: Chunk, blocks: Sequence[int], *, is_whole: bool
    ) -> tuple[Header, dict[int, memoryview]]:
        """Get the header and the stored blocks: in one request if most of the chunk is wanted."""
        key, size = chunk.id.key, header_bytes(chunk.raw_bytes)
        if is_whole:
            data = memoryview(self._store.get(key, max_bytes=chunk.stored_bytes))
            header = _header(chunk, data[:size])
            if len(data) != chunk.stored_bytes:
                raise CorruptError(f"{len(data)} bytes in place of {chunk.stored_bytes}", key=key)
            return header, {
                i: data[header.blocks[i].stored_offset :][: header.blocks[i].stored_bytes]
                for i in blocks
            }
        (head,) = self._store.get_ranges(key, [(0, size)])
        header = _header(chunk, memoryview(head))
        ranges = [(header.blocks[i].stored_offset, header.blocks[i].stored_bytes) for i in blocks]
        found = self._store.get_ranges(key, ranges)
        return header, {i: memoryview(data) for i, data in zip(blocks, found, strict=True)}


def read_chunks(
    store: Store,
    reads: Sequence[ChunkRead],
    sink: Sink,
    *,
    threads: int = 2,
    budget_bytes: int = BUDGET_BYTES,
) -> None:
    """Read chunks and give `sink` the verified bytes of each region.

    `sink` is called from up to `threads` threads at once, with the row-major bytes of the region's
    box; the view is valid only during the call. No byte reaches it before its block was verified.
    Staging and fetched bytes stay within `budget_bytes` as far as one chunk at a time allows:
    fewer threads run where chunks are large. The first failure stops the rest; all threads have
    ended on return.

    Raises:
        CorruptError: a chunk is missing or damaged; `key` names it. Other chunks may have reached
            the sink.
        UnsupportedFormatError: a newer version wrote a chunk.
        StoreError: the store did not answer.
        Exception: what the sink raised.
    """
    if not reads:
        return
    largest = max(read.chunk.raw_bytes + read.chunk.stored_bytes for read in reads)
    workers = max(1, min(threads, len(reads), budget_bytes // largest))
    local = threading.local()
    stop = threading.Event()

    def work(read: ChunkRead) -> None:
        if stop.is_set():
            return
        try:
            if not hasattr(local, "loader"):
                local.loader = Loader(store)
            _deliver(local.loader, read, sink)
        except BaseException:
            stop.set()  # at once: the caller may wake up many chunks later
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="ckptd-read") as pool:
        try:
            _first_failure([pool.submit(work, read) for read in reads])
        finally:
            stop.set()


def region_bytes(staging: npt.NDArray[np.uint8], region: Region) -> memoryview:
    """Return the row-major bytes of a region: a view of the staging buffer wherever they adjoin."""
    piece_bytes = region.piece_box.volume * region.itemsize
    raw = staging[region.offset_bytes : region.offset_bytes + piece_bytes]
    if region.box == region.piece_box:
        return raw.data
    # One-element dimensions go: numpy has a limit of dimensions, and the bytes are the same.
    real = [d for d, n in enumerate(region.piece_box.shape) if n != 1]
    index = region.box.slices(region.piece_box.start)
    piece = raw.view(_word(region.itemsize)).reshape([region.piece_box.shape[d] for d in real])
    part = np.ascontiguousarray(piece[tuple(index[d] for d in real)])
    return part.reshape(-1).view(np.uint8).data


def needed_blocks(read: ChunkRead) -> list[int]:
    """Return the numbers of the blocks that hold the wanted spans, in order."""
    return sorted(
        {
            i
            for start, stop in read.spans()
            for i in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        }
    )


def _deliver(loader: Loader, read: ChunkRead, sink: Sink) -> None:
    staging = loader.load(read.chunk, needed_blocks(read))
    for region in read.regions:
        with region_bytes(staging, region) as raw:
            sink(region, raw)


def _first_failure(futures: list[Future[None]]) -> None:
    done, others = wait(futures, return_when=FIRST_EXCEPTION)
    for future in others:
        future.cancel()
    for future in done:
        future.result()


def _header(chunk: Chunk, head: memoryview) -> Header:
    return read_header(head, hash=chunk.hash, dtype=chunk.dtype, raw_bytes=chunk.raw_bytes)


def _word(itemsize: int) -> np.dtype[np.void] | np.dtype[np.uint8]:
    return np.dtype(f"u{itemsize}") if itemsize in (1, 2, 4, 8) else np.dtype(f"V{itemsize}")
