"""One save of a small job, brought to a store part by part, as its ranks' daemons would."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from ckptd.codec.records import decode_record
from ckptd.errors import ObjectExistsError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import RankManifest
from ckptd.pipeline.commit import Proofs, Verdict, put_rank, try_commit
from ckptd.store.base import Store
from ckptd.store.memory import MemoryStore
from tests.fakes.checkpoints import PLAIN, write_checkpoint

MAX = 1 << 30


class Save:
    """The records and chunks of a step of which nothing is stored yet."""

    def __init__(self, id_: StepId, world_size: int = 2, **options: object) -> None:
        scratch = MemoryStore()
        write_checkpoint(scratch, id_, PLAIN, world_size=world_size, **options)
        self.id = id_
        self.world_size = world_size
        self.records = [
            decode_record(scratch.get(key, max_bytes=MAX), RankManifest, key=key)
            for key in (keys.rank(id_, rank) for rank in range(world_size))
        ]
        self._chunks = {e.key: scratch.get(e.key, max_bytes=MAX) for e in scratch.list(keys.CHUNKS)}

    def put_chunks(self, store: Store, rank: int) -> None:
        """Store what a rank wrote, and make it durable."""
        for chunk in self.records[rank].chunks:
            with suppress(ObjectExistsError):
                store.put_new(chunk.id.key, self._chunks[chunk.id.key], is_deferred=True)
        store.sync()

    def record(self, rank: int, /, **changes: object) -> RankManifest:
        return msgspec.structs.replace(self.records[rank], **changes)

    def deliver(self, store: Store, rank: int, /, **changes: object) -> None:
        """Bring a rank's part to the store, its record with some fields changed."""
        self.put_chunks(store, rank)
        put_rank(store, self.record(rank, **changes))

    def deliver_all(self, store: Store) -> None:
        for rank in range(self.world_size):
            self.deliver(store, rank)

    def commit(self, store: Store) -> Verdict:
        return try_commit(store, self.id, self.world_size, Proofs())
