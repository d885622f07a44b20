"""Reading what is wanted of one checkpoint: whose records tell where it is, and then the bytes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

import torch

from ckptd.bars import progress_bar
from ckptd.errors import LayoutError
from ckptd.model.manifest import Manifest, RankManifest
from ckptd.pipeline.catalog import read_ranks
from ckptd.pipeline.ranks import RankReader
from ckptd.pipeline.read import Put, plain_buffer, read_chunks
from ckptd.plan.reading import ChunkRead, Region, Wanted, may_suffice, plan_reads
from ckptd.store.base import Store
from ckptd.trainer.pinning import pinned_buffer
from ckptd.trainer.targets import Targets

# Twice the cores, since half of the threads wait for the store. More than a few wait for each other's
# interpreter lock: eight were slower than four on 2 cores and on 16.


class Records:
    """The rank manifests of one checkpoint; each is read once."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest
        self._reader = RankReader()
        self._known: dict[int, RankManifest] = {}

    def of(self, rank: int) -> RankManifest:
        """Return what one rank wrote.

        Raises:
            CorruptError: the record is damaged or missing.
            StoreError: the store did not answer.
        """
        return self.read([rank])[0]

    def read(self, ranks: Iterable[int]) -> list[RankManifest]:
        """Return what several ranks wrote, in the order of `ranks`. Raises as `of`."""
        wanted = list(ranks)
        new = [rank for rank in wanted if rank not in self._known]
        for record in read_ranks(self.store, self.manifest, new, self._reader) if new else ():
            self._known[record.rank] = record
        return [self._known[rank] for rank in wanted]


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
        self._reads = choose_reads(records, wanted, rank, world_size)

    def run(self, only: Container[int] | None = None) -> None:
        """Read everything into the targets, or into those at the places `only`.

        Raises:
            CorruptError: a chunk is damaged; what is filled is changed half.
            StoreError: the store did not answer; what is filled is changed half.
        """
        targets = self._targets

        def place(region: Region) -> Put | None:
            return targets.place(region.wanted, region.box)

        def sink(region: Region, raw: memoryview) -> None:
            targets.write(region.wanted, region.box, raw)

        reads = self._reads if only is None else list(_reads_of(self._reads, only))
        devices = targets.cuda_devices
        for device in devices:  # readers do not write on the job's stream
            torch.cuda.synchronize(device)
        with progress_bar("restoring", is_shown=self._rank == 0) as progress:
            read_chunks(
                self._records.store, reads, sink, place=place,
                make_buffer=pinned_buffer if devices else plain_buffer, progress=progress,
            )  # fmt: skip


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
    everyone = range(records.manifest.world_size)
    own = min(rank, len(everyone) - 1)
    # The old ranks that stood where this one stands now, by its share of the world.
    first, last = rank * len(everyone) // world_size, -(-(rank + 1) * len(everyone) // world_size)
    chosen, tried = [own], 0
    for near in (range(own, own + 1), range(first, min(len(everyone), last)), everyone):
        more = [rank for rank in near if rank not in chosen]
        if len(more) > len(everyone) // 2:  # not worth another try
            more = [rank for rank in everyone if rank not in chosen]
        chosen += more
        rows = records.read(chosen)
        if len(rows) == tried or not may_suffice(wanted, rows, len(everyone)):
            continue
        tried = len(rows)
        try:
            return plan_reads(wanted, rows)
        except LayoutError:
            if len(rows) == len(everyone):
                raise
    raise AssertionError("unreachable: the last try is with all")
