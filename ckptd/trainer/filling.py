"""One rank's part of restoring a checkpoint: check that it fits, fill, finish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from ckptd.bars import progress_bar
from ckptd.errors import LayoutError
from ckptd.model.keys import StepId
from ckptd.model.manifest import Manifest, RankManifest, Tree
from ckptd.pipeline.catalog import read_manifest, read_rank, read_ranks
from ckptd.pipeline.ranks import RankReader
from ckptd.pipeline.read import Put, plain_buffer, read_chunks
from ckptd.pipeline.threads import usable_cores
from ckptd.plan.reading import ChunkRead, Region, Wanted, may_suffice, plan_reads
from ckptd.store.base import Store
from ckptd.trainer.flatten import survey
from ckptd.trainer.inheritance import Heir, Inheritance
from ckptd.trainer.pinning import pinned_buffer
from ckptd.trainer.rebuild import RestorePlan, Restorer
from ckptd.trainer.stored import MapLocation, Rename

# Twice the cores, since half of the threads wait for the store. More than a few wait for each other's
# interpreter lock: eight were slower than four on 2 cores and on 16.
MAX_READERS = 4


class Resumed(NamedTuple):
    """What was restored.

    `values` are the entries of the state that are plain values, as they were saved. `source` says
    where the bytes came from: ``store``. With ``strict=False``, `missing` are names that the state
    wanted and the checkpoint did not hold; `unused` are names that it held and nobody wanted.
    `surplus` lists, on every rank, what ranks of the old world kept for themselves and nobody took
    over, as ``name@rank``.
    """

    step: int
    attempt: int
    metrics: dict[str, float]
    values: dict[str, Any]
    source: Literal["store"]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    surplus: tuple[str, ...]


class Request(NamedTuple):
    """What to fill, and as which rank of how many."""

    state: Mapping[str, object]
    strict: bool
    rename: Rename | None
    map_location: MapLocation
    trust_pickle: bool
    rank: int
    world_size: int


class Filling:
    """Call `check`, then `fill`, then `finish`, on one thread. Reads run on threads of their own."""

    def __init__(self, store: Store, request: Request) -> None:
        self._store = store
        self._request = request
        self._manifest: Manifest | None = None
        self._plan: RestorePlan | None = None
        self._reads: list[ChunkRead] = []
        self._reader = RankReader()
        self._values: dict[str, Tree] = {}
        self._restored: dict[str, Any] = {}
        self._surplus: tuple[str, ...] = ()

    def check(self, id_: StepId) -> None:
        """Read the records and make sure that everything wanted is there. Changes nothing.

        Raises:
            LayoutError: state and checkpoint do not fit.
            CorruptError: a record is damaged or missing.
            StoreError: the store did not answer.
        """
        request = self._request
        manifest = self._manifest = read_manifest(self._store, id_)
        own_rank = min(request.rank, manifest.world_size - 1)
        own = read_rank(self._store, manifest, own_rank, self._reader)
        surveyed = survey(request.state)
        heir = Heir(
            request.state, surveyed, request.rank, request.world_size, request.strict,
            request.trust_pickle, is_renamed=request.rename is not None,
        )  # fmt: skip
        inheritance = Inheritance(
            heir,
            manifest,
            own,
            lambda ranks: read_ranks(self._store, manifest, ranks, self._reader),
        )
        self._values = inheritance.choose()
        self._surplus = inheritance.surplus
        tensors = {tensor.fqn: tensor for tensor in manifest.tensors}
        restorer = Restorer(
            request.state, strict=request.strict, rename=request.rename,
            map_location=request.map_location, trust_pickle=request.trust_pickle,
        )  # fmt: skip
        self._plan = restorer.wanted(tensors, manifest.aliases, {**own.values, **self._values})
        wanted = [Wanted(t.fqn, t.box) for t in self._plan.targets]
        self._reads = self._plan_reads(manifest, own, wanted)

    def fill(self) -> None:
        """Read everything into the live tensors.

        Raises:
            CorruptError: a chunk is damaged; the objects are changed half.
            StoreError: the store did not answer; the objects are changed half.
        """
        plan = self._plan
        assert plan is not None

        def place(region: Region) -> Put | None:
            return plan.place(region.wanted, region.box)

        def sink(region: Region, raw: memoryview) -> None:
            plan.write(region.wanted, region.box, raw)

        make_buffer = pinned_buffer if plan.cuda_devices else plain_buffer
        for device in plan.cuda_devices:  # readers do not write on the job's stream
            torch.cuda.synchronize(device)
        with progress_bar("restoring", is_shown=self._request.rank == 0) as progress:
            read_chunks(
                self._store, self._reads, sink, place=place,
                threads=min(MAX_READERS, 2 * usable_cores()),
                make_buffer=make_buffer, progress=progress,
            )  # fmt: skip

    def finish(self) -> None:
        """Give optimizers, schedulers, values and generators their state."""
        assert self._plan is not None
        self._restored = self._plan.finish(self._values)

    def resumed(self) -> Resumed:
        """Return what `resume` returns."""
        assert self._manifest is not None
        assert self._plan is not None
        found = self._manifest
        return Resumed(
            found.step, found.attempt, found.numbers, self._restored,
            "store", tuple(self._plan.missing), tuple(self._plan.unused), self._surplus,
        )  # fmt: skip

    def _plan_reads(
        self, manifest: Manifest, own: RankManifest, wanted: list[Wanted]
    ) -> list[ChunkRead]:
        """Plan with the records of as few ranks as will do: of this one, of its like, of all."""
        everyone = range(manifest.world_size)
        records, tried = {own.rank: own}, 0
        for near in (range(own.rank, own.rank + 1), self._like(manifest), everyone):
            more = [rank for rank in near if rank not in records]
            if len(more) > len(everyone) // 2:  # not worth another try
                more = [rank for rank in everyone if rank not in records]
            found = read_ranks(self._store, manifest, more, self._reader)
            records |= {record.rank: record for record in found}
            rows = list(records.values())
            if len(rows) == tried or not may_suffice(wanted, rows, len(everyone)):
                continue
            tried = len(rows)
            try:
                return plan_reads(wanted, rows)
            except LayoutError:
                if len(rows) == len(everyone):
                    raise
        raise AssertionError("unreachable: the last try is with all")

    def _like(self, manifest: Manifest) -> range:
        """Return the old ranks that stood where this one stands now, by its share of the world."""
        old, new, rank = manifest.world_size, self._request.world_size, self._request.rank
        return range(rank * old // new, min(old, -(-(rank + 1) * old // new)))
