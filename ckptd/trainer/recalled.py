"""The records and bytes of a step that lies in the memory of daemons."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec
import torch
import torch.distributed as dist

from ckptd.codec.records import decode_record, encode_record
from ckptd.engine.delivery import Author, rank_manifest_of
from ckptd.engine.replies import decode_values
from ckptd.errors import CkptdError, CorruptError, ProtocolError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Chunk, Manifest, RankManifest
from ckptd.model.ready import make_ready
from ckptd.pipeline.catalog import read_manifest
from ckptd.pipeline.held import HeldRead, deliver, read_held
from ckptd.pipeline.read import Place, Progress, Sink, read_chunks
from ckptd.plan.commit import manifest_of
from ckptd.plan.reading import ChunkRead
from ckptd.shm.arena import Arena
from ckptd.shm.slots import Slot
from ckptd.store.base import Store
from ckptd.trainer.boards import MAX_VALUE_BYTES
from ckptd.trainer.fetching import Fetch, MakeBuffer, StoreRecords
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.passing import carried_devices
from ckptd.trainer.recall import HeldPart, HeldStep, Recall, Sighting
from ckptd.wire import messages as say

log = logging.getLogger("ckptd.trainer")

PIECE_BYTES = MAX_VALUE_BYTES - (1 << 20)


class _Piece(msgspec.Struct, array_like=True):
    """A piece of a record on the board; of no pieces if the snapshot is gone."""

    count: int
    data: bytes = b""


make_ready(_Piece)


class Site(NamedTuple):
    """Where a rank looks for a held step: its daemon, the other ranks', and the store.

    `topic` is for what ranks tell each other of this step, and is used once.
    """

    recall: Recall
    sightings: Sequence[Sighting]
    meeting: Meeting
    store: Store
    topic: str
    timeout_s: float


class _Local(NamedTuple):
    """A snapshot in memory that this rank has mapped."""

    arena: Arena
    slot: Slot
    chunks: tuple[say.ChunkPlan, ...]
    generation: int


class Recalled:
    """See `Records`. One thread uses it; `close` lets go of the memory.

    Args:
        step: the step, agreed by all ranks.
        site: where this rank stands.

    Raises:
        CorruptError: the snapshots are gone, or do not make up a whole step.
        StoreError, MeetingError: the store or a rank did not answer.
    """

    def __init__(self, step: HeldStep, site: Site) -> None:
        self._step = step
        self._site = site
        self.id = StepId.parse(step.id)
        self._local: dict[int, _Local] = {}
        self._records: dict[int, RankManifest] = {}
        try:
            self._gather_records()
            _ = self.manifest
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap what was borrowed. May be repeated."""
        local, self._local = self._local, {}
        arenas = [part.arena for part in local.values()]
        local.clear()
        for arena in arenas:
            arena.close()

    # --- records -------------------------------------------------------------------------------

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest that a commit of these snapshots would make: it proves their coverage."""
        step = self._step
        if step.is_whole:
            try:
                return manifest_of([(self._records[r], 0, "") for r in range(step.world_size)])
            except (CkptdError, ValueError) as error:
                raise CorruptError(
                    f"the snapshots of step {self.id.short} do not add up: {error}",
                    step=self.id.step,
                ) from error
        found = read_manifest(self._site.store, self.id)
        if (found.sequence, found.world_size) != (step.sequence, step.world_size):
            raise CorruptError("held snapshots are of another save than the checkpoint")
        return found

    def of(self, rank: int) -> RankManifest:
        """See `Records`."""
        return self.read([rank])[0]

    def read(self, ranks: Iterable[int]) -> list[RankManifest]:
        """See `Records`: from memory where it is there."""
        wanted = list(ranks)
        absent = [rank for rank in wanted if rank not in self._records]
        if absent:
            for record in self._stored.read(absent):
                self._records[record.rank] = record
        return [self._records[rank] for rank in wanted]

    def near(self, rank: int, world_size: int) -> Iterator[Sequence[int]]:  # noqa: ARG002 - see `Records`
        """See `Records`: what lies on this machine first."""
        count = self.manifest.world_size
        own = min(rank, count - 1)
        near = sorted(self._local, key=lambda other: (other != own, other))
        if near:
            yield near[:1]
            yield near
        yield range(count)

    @cached_property
    def _stored(self) -> StoreRecords:
        return StoreRecords(self._site.store, self.manifest)

    def _gather_records(self) -> None:
        """Borrow what this rank's daemon holds, tell the others of it, and hear of the rest."""
        mine = self._site.recall.sighting.daemon
        parts = self._step.parts
        is_spread = is_spread_out(self._site.sightings)
        for rank, part in sorted(parts.items()):
            if part.daemon == mine:
                self._borrow(rank, part)
            if is_spread and self._sayer(rank) == self._site.meeting.rank:
                self._tell(rank)
        for rank in sorted(parts):
            if rank not in self._records:
                self._records[rank] = self._hear(rank)

    def _borrow(self, rank: int, part: HeldPart) -> None:
        lent = self._site.recall.borrow(part)
        if lent is None:
            return
        handoff, recipe, arena = lent
        try:
            said = (handoff.step, handoff.sequence, handoff.slot, handoff.generation)
            if said != (self.id.step, self._step.sequence, part.slot, part.generation):
                raise ProtocolError("another snapshot than the one that was seen")  # noqa: TRY301
            slot = arena.slot(handoff.slot)
            local = _Local(arena, slot, recipe.chunks, handoff.generation)
            _check_chunks(local)
            author = Author(self.id.attempt, rank, self._step.world_size)
            chunks = tuple(
                Chunk(_name(rank, i), str(self.id), c.dtype, c.raw_bytes, c.raw_bytes)
                for i, c in enumerate(recipe.chunks)
            )
            record = rank_manifest_of(
                author, handoff, recipe, decode_values(handoff.values), chunks, previous=None
            )
            record.check()
        except Exception as error:  # noqa: BLE001 - whatever was lent, the other ranks must not wait
            # They have to hear that this snapshot cannot be had.
            log.warning("the snapshot of rank %d makes no sense: %s", rank, str(error))
            arena.close()
            return
        self._local[rank] = local
        self._records[rank] = record

    def _sayer(self, rank: int) -> int:
        """Return the new rank that tells, and sends, what an old rank left."""
        near = self._holders(self._step.parts[rank].daemon)
        return near[rank % len(near)]

    def _holders(self, daemon: str) -> list[int]:
        sightings = self._site.sightings
        return [rank for rank, sighting in enumerate(sightings) if sighting.daemon == daemon]

    def _tell(self, rank: int) -> None:
        meeting, topic = self._site.meeting, f"{self._site.topic}/{rank}"
        record = self._records.get(rank)
        try:
            data = b"" if record is None else encode_record(record)
        except ValueError as error:
            log.warning("the snapshot of rank %d makes no sense: %s", rank, error)
            data = b""
        pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
        for i, piece in reversed(list(enumerate(pieces))):
            meeting.announce(f"{topic}/{i}", msgspec.msgpack.encode(_Piece(len(pieces), piece)))
        if not pieces:
            meeting.announce(f"{topic}/0", msgspec.msgpack.encode(_Piece(0)))

    def _hear(self, rank: int) -> RankManifest:
        part, mine = self._step.parts[rank], self._site.recall.sighting.daemon
        if part.daemon == mine:
            raise CorruptError(f"the snapshot of rank {rank} is gone", step=self.id.step)
        meeting, topic = self._site.meeting, f"{self._site.topic}/{rank}"

        def piece(i: int) -> _Piece:
            data = meeting.hear(f"{topic}/{i}", self._site.timeout_s)
            return msgspec.msgpack.decode(data, type=_Piece)

        first = piece(0)
        if not first.count:
            raise CorruptError(f"the snapshot of rank {rank} is gone", step=self.id.step)
        data = first.data + b"".join(piece(i).data for i in range(1, first.count))
        return decode_record(data, RankManifest, key=keys.rank(self.id, rank))

    # --- bytes ---------------------------------------------------------------------------------

    def deliver(
        self, reads: Sequence[ChunkRead], sink: Sink, *, place: Place, make_buffer: MakeBuffer,
        progress: Progress,
    ) -> None:  # fmt: skip
        """See `Records`: what lies here, and what only the store has. The rest is passed on."""
        here, stored = [], []
        for read in reads:
            rank, number = _parse(read.chunk.hash)
            if rank in self._local:
                here.append(self._held_read(read, rank, number))
            elif rank not in self._step.parts:
                stored.append(read)
        read_held(here, sink, place=place, progress=progress)
        if stored:
            read_chunks(
                self._site.store, stored, sink, place=place, make_buffer=make_buffer,
                progress=progress,
            )  # fmt: skip

    def lacks(self, reads: Sequence[ChunkRead]) -> str:
        """Say, for the other ranks, which chunks only other machines hold; empty: none."""
        found = sorted(
            (rank, number) for rank, number in (_parse(read.chunk.hash) for read in reads)
            if rank in self._step.parts and rank not in self._local
        )  # fmt: skip
        return json.dumps(found) if found else ""

    def pass_on(self, notes: Sequence[str], fetch: Fetch) -> None:
        """Send what others lack and take what this rank does; all ranks call it with the same notes.

        Raises:
            CorruptError: something was overwritten while it was sent. Only after all was exchanged: a
                collective that one rank does not enter hangs the others.
        """
        wanted = sorted({(row[0], row[1]) for note in notes if note for row in json.loads(note)})
        mine = {_parse(read.chunk.hash): read for read in fetch.reads}
        device = _device()
        failure: Exception | None = None
        for rank, number in wanted:
            sender = self._sayer(rank)
            raw_bytes = self._records[rank].chunks[number].raw_bytes
            flat = torch.empty(raw_bytes, dtype=torch.uint8)
            if sender == self._site.meeting.rank:
                flat.numpy()[:] = memoryview(_bytes_of(self._local[rank], number))
            sent = flat.to(device)
            dist.broadcast(sent, sender)
            try:
                if sender == self._site.meeting.rank:
                    self._check(self._local[rank])
                elif (rank, number) in mine and rank not in self._local:
                    deliver(mine[rank, number], sent.cpu().numpy(), fetch.sink, fetch.place)
            except Exception as error:  # noqa: BLE001 - the others wait for the broadcasts to come
                failure = failure or error
        if failure is not None:
            raise failure

    def _held_read(self, read: ChunkRead, rank: int, number: int) -> HeldRead:
        local = self._local[rank]
        return HeldRead(read, _bytes_of(local, number), lambda: self._check(local))

    def _check(self, local: _Local) -> None:
        if not local.slot.is_current(local.generation):
            raise CorruptError("a snapshot was overwritten while it was read", step=self.id.step)


def is_spread_out(sightings: Sequence[Sighting]) -> bool:
    """Tell whether ranks have different daemons, or some have none."""
    return len({sighting.daemon for sighting in sightings}) > 1


def _device() -> torch.device:
    return torch.device("cpu" if "cpu" in carried_devices() else "cuda")


def _name(rank: int, number: int) -> str:
    """Return what stands for the hash of a chunk that nobody has hashed."""
    return f"{rank:016x}{number:016x}"


def _parse(name: str) -> tuple[int, int]:
    return int(name[:16], 16), int(name[16:], 16)


def _bytes_of(local: _Local, number: int) -> memoryview:
    chunk = local.chunks[number]
    return local.slot.view[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]


def _check_chunks(local: _Local) -> None:
    for chunk in local.chunks:
        if chunk.offset_bytes + chunk.raw_bytes > local.slot.view.nbytes:
            raise ProtocolError("a chunk that leaves its slot")
