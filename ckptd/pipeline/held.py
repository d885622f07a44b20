"""Chunks that lie whole in memory, on their way into tensors: one copy, nothing to decode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.cores import usable_cores
from ckptd.pipeline.read import (
    Place,
    Progress,
    Sink,
    Tally,
    first_failure,
    has_no_gaps,
    region_bytes,
)
from ckptd.plan.reading import ChunkRead

# One copy keeps the memory of a few cores busy.
MAX_THREADS = 4


class HeldRead(NamedTuple):
    """What is wanted of a chunk that lies at `raw`. `check` raises if it does not any more."""

    read: ChunkRead
    raw: memoryview
    check: Callable[[], None]


def read_held(reads: Sequence[HeldRead], sink: Sink, *, place: Place, progress: Progress) -> None:
    """Copy what is wanted, as `read_chunks` does, and see afterwards that it was still there.

    Raises:
        CorruptError: what was copied may be something else: `HeldRead.check` says so.
        Exception: what `sink` or a `Put` raised.
    """
    if not reads:
        return
    tally = Tally(sum(held.read.chunk.raw_bytes for held in reads), progress)
    stop = threading.Event()

    def work(held: HeldRead) -> None:
        if stop.is_set():
            return
        try:
            deliver(held.read, np.frombuffer(held.raw, np.uint8), sink, place)
            held.check()
            tally.add(held.read.chunk.raw_bytes)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(
        min(len(reads), MAX_THREADS, usable_cores()), thread_name_prefix="ckptd-held"
    ) as pool:
        try:
            first_failure([pool.submit(work, held) for held in reads])
        finally:
            stop.set()


def deliver(read: ChunkRead, raw: npt.NDArray[np.uint8], sink: Sink, place: Place) -> None:
    """Hand out the regions of a chunk, all of whose bytes are `raw`."""
    for region in read.regions:
        put = place(region) if has_no_gaps(region) else None
        if put is not None:
            start, stop = region.span()
            put(0, raw[start:stop])
        else:
            with region_bytes(raw, region) as part:
                sink(region, part)
