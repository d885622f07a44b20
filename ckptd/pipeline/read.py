"""Chunks on their way from the store into tensors: fetched, verified, and only then handed out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.codec.blocks import BLOCK_BYTES
from ckptd.codec.buffers import Bytes
from ckptd.codec.chunk import (
    Block,
    Decoder,
    Header,
    block_count,
    header_bytes,
    read_header,
    stored_bound,
)
from ckptd.cores import usable_cores
from ckptd.errors import CorruptError, ObjectNotFoundError, StoreError, UnsupportedFormatError
from ckptd.model.manifest import Chunk
from ckptd.plan.reading import ChunkRead, Region
from ckptd.store.base import Store
from ckptd.units import MIB

Sink = Callable[[Region, memoryview], None]
Put = Callable[[int, Bytes], None]
"""Takes verified bytes of a region, from that byte of its box (row-major) on; keeps no view."""
Place = Callable[[Region], Put | None]
Progress = Callable[[int, int], None]
"""Told of bytes done and bytes in all, by any thread."""

BUDGET_BYTES = 256 * MIB


def readers_of(store: Store) -> int:
    """Return how many threads read: as many as the store likes, and this machine has use for.

    Each has a window of its own, and memory that was never used costs more than a copy does.
    """
    return min(store.traits.requests, max(4, 2 * usable_cores()))


def plain_buffer(count: int) -> Bytes:
    """Return new memory."""
    return np.empty(count, np.uint8)


class Loader:
    """Brings verified blocks of one chunk at a time into memory of its own.

    For one thread. It keeps a window of fetched bytes and one block, since fresh memory costs far
    more than a copy; `make_buffer` makes the block's, for memory of a special kind.
    """

    def __init__(
        self,
        store: Store,
        *,
        window_bytes: int | None = None,
        make_buffer: Callable[[int], Bytes] = plain_buffer,
    ) -> None:
        self._store = store
        self._decoder = Decoder()
        window_bytes = window_bytes or store.traits.window_bytes
        self._window = plain_buffer(max(window_bytes, header_bytes(1 << 26) + BLOCK_BYTES))
        self._block = make_buffer(BLOCK_BYTES)
        self._held = range(0)  # which bytes of the chunk are in the window

    def blocks(self, chunk: Chunk, wanted: Sequence[int] | None = None) -> Iterator[_Block]:
        """Yield the blocks `wanted` (rising; None: all), each checked before.

        Each was checked against the header, and the header against the chunk's name. What fails a
        check is fetched once more before it counts as damage: a bit may have flipped on the way.
        The bytes hold until the next block is asked for.

        Raises:
            CorruptError: the object is missing, of another length, or not what its name says.
            StoreError: the store did not answer.
        """
        wanted = range(block_count(chunk.raw_bytes)) if wanted is None else wanted
        with _damage_of(chunk):
            if chunk.stored_bytes > stored_bound(chunk.raw_bytes):
                raise CorruptError("a chunk that is longer than any coding of it")
            self._held = range(0)
            header = self._header(chunk, wanted)
        for place, number in enumerate(wanted):
            with _damage_of(chunk):
                raw = self._decode(chunk, header, wanted[place:])
            yield _Block(number * BLOCK_BYTES, raw)

    def _header(self, chunk: Chunk, wanted: Sequence[int]) -> Header:
        """Fetch the header, and the wanted blocks that follow it: they are no longer than raw."""
        size = header_bytes(chunk.raw_bytes)
        first = next((place for place, number in enumerate(wanted) if place != number), len(wanted))
        most = min(size + first * BLOCK_BYTES, chunk.stored_bytes, len(self._window))
        try:
            return self._read_header(chunk, max(size, most))
        except (CorruptError, UnsupportedFormatError):
            return self._read_header(chunk, max(size, most))

    def _read_header(self, chunk: Chunk, count: int) -> Header:
        self._fetch(chunk, 0, count)
        header = read_header(
            self._window[:count].data,
            hash=chunk.hash, dtype=chunk.dtype, raw_bytes=chunk.raw_bytes,
        )  # fmt: skip
        if header.stored_bytes != chunk.stored_bytes:
            raise CorruptError(f"{header.stored_bytes} bytes in place of {chunk.stored_bytes}")
        return header

    def _decode(self, chunk: Chunk, header: Header, wanted: Sequence[int]) -> Bytes:
        """Return the first of the wanted blocks; those that adjoin it are fetched with it."""
        number = wanted[0]
        block = header.blocks[number]
        end = block.stored_offset + block.stored_bytes
        out = self._block[: header.block_raw_bytes(number)]
        if block.stored_offset in self._held and end <= self._held.stop:
            try:
                return self._decoder.view_block(header, number, self._fetched(block, end), out)
            except CorruptError:
                pass
        self._fetch(chunk, block.stored_offset, self._run_bytes(header, wanted))
        return self._decoder.view_block(header, number, self._fetched(block, end), out)

    def _fetched(self, block: Block, end: int) -> memoryview:
        begin = self._held.start
        return self._window[block.stored_offset - begin : end - begin].data

    def _run_bytes(self, header: Header, wanted: Sequence[int]) -> int:
        """Return the stored bytes of the first wanted blocks that adjoin and fit into the window."""
        begin = header.blocks[wanted[0]].stored_offset
        count = 0
        for place, number in enumerate(wanted):
            block = header.blocks[number]
            end = block.stored_offset + block.stored_bytes - begin
            if number != wanted[0] + place or end > len(self._window):
                break
            count = end
        return count

    def _fetch(self, chunk: Chunk, offset: int, count: int) -> None:
        self._held = range(0)
        found = self._store.read_into(chunk.id.key, offset, self._window[:count].data)
        if found != chunk.stored_bytes:
            raise CorruptError(f"{found} bytes in place of {chunk.stored_bytes}")
        self._held = range(offset, offset + count)


class _Block(NamedTuple):
    """Raw bytes of a chunk from `start` on."""

    start: int
    raw: Bytes


@contextmanager
def _damage_of(chunk: Chunk) -> Iterator[None]:
    """Name the chunk in what is raised, and take what the store says of it for what it means."""
    key = chunk.id.key
    try:
        yield
    except ObjectNotFoundError:
        raise CorruptError("a chunk is missing", key=key) from None
    except StoreError as error:
        if type(error) is StoreError:  # the base class says: the object has another length
            raise CorruptError("a chunk of another length", key=key) from None
        raise
    except CorruptError as error:
        raise error if error.key else CorruptError(str(error), key=key) from None


def read_chunks(  # noqa: PLR0913 - what, from where, to where, and with how much
    store: Store,
    reads: Sequence[ChunkRead],
    sink: Sink,
    *,
    place: Place = lambda _region: None,
    threads: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
    make_buffer: Callable[[int], Bytes] = plain_buffer,
    progress: Progress = lambda _done, _all: None,
) -> None:
    """Read chunks and hand out the verified bytes of each region.

    Where a region lies in its chunk without gaps and `place` gives a `Put` for it, that takes its
    bytes block by block; else `sink` gets them at once, with the whole chunk in memory. Both are
    called from up to `threads` threads (None: as many as the store likes), with views that are valid only during the call, and with no
    byte whose block was not verified. Fetched and staged bytes stay within `budget_bytes` as far as one thread allows. The first
    failure stops the rest; all threads have ended on return.

    Raises:
        CorruptError: a chunk is missing or damaged; `key` names it. Other blocks may have been
            handed out.
        StoreError: the store did not answer.
        Exception: what `sink` or a `Put` raised.
    """
    if not reads:
        return
    puts = [[place(r) if has_no_gaps(r) else None for r in read.regions] for read in reads]
    staged = [
        read.chunk.raw_bytes for read, row in zip(reads, puts, strict=True) if None in row
    ]  # fmt: skip
    each_bytes = store.traits.window_bytes + BLOCK_BYTES + max(staged, default=0)
    workers = max(1, min(threads or readers_of(store), len(reads), budget_bytes // each_bytes))
    tally = Tally(sum(map(_needed_bytes, reads)), progress)
    local = threading.local()
    stop = threading.Event()

    def work(read: ChunkRead, row: Sequence[Put | None]) -> None:
        if stop.is_set():
            return
        try:
            if not hasattr(local, "delivery"):
                local.delivery = _Delivery(Loader(store, make_buffer=make_buffer), sink)
            local.delivery.run(read, row, tally)
        except BaseException:
            stop.set()  # at once: the caller may wake up many chunks later
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="ckptd-read") as pool:
        try:
            first_failure([pool.submit(work, *row) for row in zip(reads, puts, strict=True)])
        finally:
            stop.set()


class _Delivery:
    """Hands out chunks, one after the other, on one thread."""

    def __init__(self, loader: Loader, sink: Sink) -> None:
        self._loader = loader
        self._sink = sink
        self._staging: Bytes = np.empty(0, np.uint8)

    def run(self, read: ChunkRead, puts: Sequence[Put | None], tally: Tally) -> None:
        """Deliver all regions of a chunk."""
        staging = self._staging_for(read.chunk) if None in puts else None
        rows = sorted(
            ((*region.span(), put) for region, put in zip(read.regions, puts, strict=True) if put),
            key=lambda row: row[:2],
        )
        first = 0
        for start, raw in self._loader.blocks(read.chunk, needed_blocks(read)):
            stop = start + len(raw)
            if staging is not None:
                np.copyto(staging[start:stop], raw)
            while first < len(rows) and rows[first][1] <= start:
                first += 1
            for begin, end, put in rows[first:]:
                if begin >= stop:
                    break
                if end > start:
                    put(max(start - begin, 0), raw[max(begin - start, 0) : end - start])
            tally.add(len(raw))
        if staging is not None:
            whole = [r for r, put in zip(read.regions, puts, strict=True) if put is None]
            for region in whole:
                with region_bytes(staging, region) as part:
                    self._sink(region, part)

    def _staging_for(self, chunk: Chunk) -> Bytes:
        if len(self._staging) < chunk.raw_bytes:
            self._staging = np.empty(chunk.raw_bytes, np.uint8)
        return self._staging[: chunk.raw_bytes]


class Tally:
    """Adds up what several threads have done."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._done_bytes = 0
        self._lock = threading.Lock()  # guards _done_bytes, and keeps reports in order

    def add(self, count: int) -> None:
        """Add bytes that are done."""
        with self._lock:
            self._done_bytes += count
            self._progress(self._done_bytes, self._total_bytes)


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


def has_no_gaps(region: Region) -> bool:
    """Tell whether a region's bytes lie in the chunk in one piece."""
    start, stop = region.span()
    return stop - start == region.box.volume * region.itemsize


def needed_blocks(read: ChunkRead) -> list[int]:
    """Return the numbers of the blocks that hold the wanted spans, in order."""
    return sorted(
        {
            i
            for start, stop in read.spans()
            for i in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        }
    )


def _needed_bytes(read: ChunkRead) -> int:
    size = read.chunk.raw_bytes
    return sum(min(BLOCK_BYTES, size - i * BLOCK_BYTES) for i in needed_blocks(read))


def first_failure(futures: list[Future[None]]) -> None:
    """Wait for all, or for the first that fails, and raise what it raised."""
    done, others = wait(futures, return_when=FIRST_EXCEPTION)
    for future in others:
        future.cancel()
    for future in done:
        future.result()


def _word(itemsize: int) -> np.dtype[np.void] | np.dtype[np.uint8]:
    return np.dtype(f"u{itemsize}") if itemsize in (1, 2, 4, 8) else np.dtype(f"V{itemsize}")
