"""Reading what is wanted of one checkpoint: whose records tell where it is, and then the bytes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from ckptd.bars import progress_bar
from ckptd.codec.buffers import Bytes
from ckptd.errors import LayoutError
from ckptd.model.manifest import Manifest, RankManifest
from ckptd.pipeline.catalog import read_ranks
from ckptd.pipeline.ranks import RankReader
from ckptd.pipeline.read import Place, Progress, Put, Sink, plain_buffer, read_chunks
from ckptd.plan.reading import ChunkRead, Region, Wanted, may_suffice, plan_reads
from ckptd.store.base import Store
from ckptd.trainer.pinning import pinned_buffer
from ckptd.trainer.targets import Targets

MakeBuffer = Callable[[int], Bytes]


class Records(Protocol):
    """The rank manifests of one step, and the bytes that they name."""

    @property
    def manifest(self) -> Manifest:
        """Of the step."""

    def of(self, rank: int) -> RankManifest:
        """Return what one rank wrote.

        Raises:
            CorruptError: the record is damaged or missing.
            StoreError: the store did not answer.
        """

    def read(self, ranks: Iterable[int]) -> list[RankManifest]:
        """Return what several ranks wrote, in the order of `ranks`. Raises as `of`."""

    def near(self, rank: int, world_size: int) -> Iterator[Sequence[int]]:
        """Yield whose records `rank` of `world_size` had best ask, in turn; the last are all."""

    def deliver(
        self, reads: Sequence[ChunkRead], sink: Sink, *, place: Place, make_buffer: MakeBuffer,
        progress: Progress,
    ) -> None:  # fmt: skip
        """Bring the bytes, as `read_chunks` does."""


class StoreRecords:
    """Those of a checkpoint in a store; each record is read once."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._reader = RankReader()
        self._known: dict[int, RankManifest] = {}

    def of(self, rank: int) -> RankManifest:
        """See `Records`."""
        return self.read([rank])[0]

    def read(self, ranks: Iterable[int]) -> list[RankManifest]:
        """See `Records`."""
        wanted = list(ranks)
        new = [rank for rank in wanted if rank not in self._known]
        for record in read_ranks(self.store, self.manifest, new, self._reader) if new else ():
            self._known[record.rank] = record
        return [self._known[rank] for rank in wanted]

    def near(self, rank: int, world_size: int) -> Iterator[Sequence[int]]:
        """See `Records`: its own, those that stood where this rank stands now, everybody's."""
        count = self.manifest.world_size
        own = min(rank, count - 1)
        yield range(own, own + 1)
        # By its share of the world.
        yield range(rank * count // world_size, min(count, -(-(rank + 1) * count // world_size)))
        yield range(count)

    def deliver(
        self, reads: Sequence[ChunkRead], sink: Sink, *, place: Place, make_buffer: MakeBuffer,
        progress: Progress,
    ) -> None:  # fmt: skip
        """See `Records`."""
        read_chunks(
            self.store, reads, sink, place=place, make_buffer=make_buffer, progress=progress
        )


class Fetch:
    """Fills targets, as rank `rank` of `world_size`. Reads run on threads of their own."""

    def __init__(self, records: Records, rank: int, world_size: int, targets: Targets) -> None:
        """Plan what to read. Changes nothing.

        Raises:
            LayoutError: the checkpoint does not hold all of it.
            CorruptError, StoreError: as `Records.of`.
        """
        self._records = records
        self._rank = rank
        self._targets = targets
        wanted = [Wanted(target.fqn, target.box) for target in targets.rows]
        self.reads = choose_reads(records, wanted, rank, world_size)

    def run(self, only: Container[int] | None = None) -> None:
        """Read everything into the targets, or into those at the places `only`.

        Raises:
            CorruptError: a chunk is damaged; what is filled is changed half.
            StoreError: the store did not answer; what is filled is changed half.
        """
        reads = self.reads if only is None else list(_reads_of(self.reads, only))
        devices = self._targets.cuda_devices
        for device in devices:  # readers do not write on the job's stream
            torch.cuda.synchronize(device)
        with progress_bar("restoring", is_shown=self._rank == 0) as progress:
            self._records.deliver(
                reads, self.sink, place=self.place,
                make_buffer=pinned_buffer if devices else plain_buffer, progress=progress,
            )  # fmt: skip

    def place(self, region: Region) -> Put | None:
        """Return what takes the bytes of a region in parts, see `Targets.place`."""
        return self._targets.place(region.wanted, region.box)

    def sink(self, region: Region, raw: memoryview) -> None:
        """Take the bytes of a region."""
        self._targets.write(region.wanted, region.box, raw)


def _reads_of(reads: Iterable[ChunkRead], only: Container[int]) -> Iterator[ChunkRead]:
    for read in reads:
        regions = tuple(region for region in read.regions if region.wanted in only)
        if regions:
            yield read._replace(regions=regions)


def choose_reads(
    records: Records, wanted: list[Wanted], rank: int, world_size: int
) -> list[ChunkRead]:
    """Plan with the records of as few ranks as will do: of this one, of its like, of all.

    Raises:
        LayoutError: the checkpoint does not hold all of it.
        CorruptError, StoreError: as `Records.of`.
    """
    count = records.manifest.world_size
    chosen: list[int] = []
    tried = 0
    for near in records.near(rank, world_size):
        more = [other for other in near if other not in chosen]
        if chosen and len(more) > count // 2:  # not worth another try
            more = [other for other in range(count) if other not in chosen]
        chosen += more
        rows = records.read(chosen)
        if len(rows) == tried or not may_suffice(wanted, rows, count):
            continue
        tried = len(rows)
        try:
            return plan_reads(wanted, rows)
        except LayoutError:
            if len(rows) == count:
                raise
    raise AssertionError("unreachable: the last try is with all")
