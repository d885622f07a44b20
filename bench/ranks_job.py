"""What the ranks of a large job say and store, made without the job: inputs of `bench.ranks`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import xxhash

from ckptd.codec.records import encode_record
from ckptd.model import keys
from ckptd.model.box import Box
from ckptd.model.columns import Columns
from ckptd.model.keys import StepId
from ckptd.model.manifest import FORMAT, Chunk, RankManifest, Tree
from ckptd.model.tensor import Held, Layout, Tensor
from ckptd.pipeline.commit import COMMITTED, Proofs, try_commit
from ckptd.plan.pack import pack
from ckptd.plan.split import Share, Splitter, whole_share
from ckptd.shm.slots import SLOT_HEADER_BYTES
from ckptd.store.memory import MemoryStore
from ckptd.units import MIB

Case = Literal["replicated", "sharded"]
CASES: tuple[Case, ...] = ("replicated", "sharded")

CHUNK_BYTES = 32 * MIB
EARLIER, LATER = StepId(attempt=1, step=1000), StepId(attempt=1, step=2000)
"""Two saves of one layout: the first is committed already, the other is not."""

ROUND = 0  # of the agreement: what `prepare` offers
_GPUS = 8  # a node has so many: tensor tables of ranks differ in the device, and only there
# A transformer's block, and how large a model of as many tensors is where it runs that way.
_MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
_VECTORS = ("norm_1", "norm_2")
_WIDTHS: dict[Case, int] = {"replicated": 2048, "sharded": 8192}


class Job:
    """The layouts of all ranks, and what follows from them.

    ``replicated``: every rank holds every tensor whole, as under DDP. ``sharded``: every rank holds
    an interval of the rows of every tensor, as under FSDP; a placement says so.
    """

    def __init__(self, case: Case, ranks: int, tensors: int) -> None:
        self.case, self.ranks = case, ranks
        self._tables = [
            sorted(islice(_table(_WIDTHS[case], f"cuda:{gpu}"), tensors), key=lambda t: t.fqn)
            for gpu in range(_GPUS)
        ]
        names = [t.fqn for t in self._tables[0] if t.kind == "parameter"]
        options = {"lr": 3e-4, "betas": {"$tuple": [0.9, 0.95]}, "eps": 1e-8, "weight_decay": 0.1}
        group = {"params": names, "options": options, "class": "torch.optim.adamw.AdamW"}
        self._optimizer: Tree = {"groups": [group], "state_values": {}}

    def boxes(self, rank: int, ranks: int | None = None) -> list[tuple[str, Box]]:
        """Return what a rank holds of each tensor, in a job of this many ranks or of others."""
        return [(h.tensor.fqn, h.boxes[0]) for h in self.layout(rank, ranks).held]

    def layout(self, rank: int, ranks: int | None = None) -> Layout:
        """Return what a rank holds."""
        is_sharded, of = self.case == "sharded", ranks or self.ranks
        held = []
        for tensor in self._tables[rank % _GPUS]:
            rows, *rest = tensor.shape
            first, last = (rows * rank // of, rows * (rank + 1) // of) if is_sharded else (0, rows)
            box = Box((first, *[0] * len(rest)), (last, *rest))
            held.append(Held(tensor, (box,), is_replicated=is_sharded))
        return Layout(tuple(held))

    def record(self, rank: int, plan: Splitter) -> RankManifest:
        """Return what a rank wrote of the first save."""
        layout = self.layout(rank)
        # What nobody else holds is written whole; to look that up would only take time.
        share = whole_share(layout) if self.case == "sharded" else plan.share(rank)
        return _record(self, rank, layout, (plan.digest, share))

    def saved(self, record: RankManifest, id_: StepId) -> RankManifest:
        """Return what the rank wrote of another save: other contents, and generators moved on."""
        spans = [(chunk.dtype, chunk.raw_bytes) for chunk in record.chunks]
        return msgspec.structs.replace(
            record, step=id_.step, sequence=id_.step // 1000,
            previous=None if id_ == EARLIER else str(EARLIER),
            chunks=_chunks(id_, record.rank, spans), values=self.values(record.rank, id_),
        )  # fmt: skip

    def values(self, rank: int, id_: StepId) -> dict[str, Tree]:
        """Return a rank's values: those of an optimizer, which are everybody's, and its generators."""
        return {"epoch": id_.step, "optimizer": self._optimizer, "rng": _generators(rank, id_)}


class CountedStore(MemoryStore):
    """A store in memory that counts reads."""

    gets = 0

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        self.gets += 1
        return super().get(key, max_bytes=max_bytes)

    def bytes_of(self, prefix: str) -> int:
        """Return the bytes of all objects below a prefix."""
        return sum(entry.bytes for entry in self.list(prefix))


def build(job: Job, folder: Path) -> None:
    """Write what `board` and `store` read: what all ranks said and stored.

    Raises:
        RuntimeError: ckptd does not commit it.
    """
    plan = _offer_all(job, folder)
    stores = {EARLIER: MemoryStore(), LATER: MemoryStore()}
    for rank in range(job.ranks):
        record = job.record(rank, plan)
        for id_, held in stores.items():
            held.put_new(keys.rank(id_, rank), encode_record(job.saved(record, id_)))
    if (verdict := try_commit(stores[EARLIER], EARLIER, job.ranks, Proofs())) != COMMITTED:
        raise RuntimeError(verdict.reason)
    for id_, held in stores.items():
        entries = [*held.list(keys.RANKS), *held.list(keys.CHECKPOINTS)]
        _write(folder / str(id_), {e.key: held.get(e.key, max_bytes=e.bytes) for e in entries})


def board(folder: Path) -> Any:
    """Return a board on which all ranks have offered what they hold."""
    from ckptd.trainer.boards import LocalBoard

    found = LocalBoard()
    for key, value in _load(folder / "board").items():
        found.set(key, value)
    return found


def store(folder: Path, *ids: StepId) -> CountedStore:
    """Return a store with the records of these saves."""
    found = CountedStore()
    for id_ in ids:
        for key, data in _load(folder / str(id_)).items():
            found.put_new(key, data)
    return found


def _offer_all(job: Job, folder: Path) -> Splitter:
    """Let every rank offer its layout; keep the board, and return the plan that follows."""
    from ckptd.trainer.agreement import Agreement
    from ckptd.trainer.boards import LocalBoard
    from ckptd.trainer.meeting import Meeting

    shared, digests = LocalBoard(), []
    for rank in range(job.ranks):
        agreement = Agreement(Meeting(shared, rank, job.ranks), CHUNK_BYTES)
        layout = job.layout(rank)
        samples = xxhash.xxh3_64_digest(b"as on all ranks") * len(layout.held)
        agreement._offered[ROUND] = (layout, samples)  # as `prepare` does, whose thread would go on
        agreement._put_offer(ROUND, layout.digest())
        agreement.close()
        digests.append(layout.digest())
    _write(folder / "board", shared._values)
    holdings = agreement._fetch_layouts(set(digests))
    return Splitter([holdings[digest] for digest in digests], CHUNK_BYTES)


def _record(job: Job, rank: int, layout: Layout, planned: tuple[str, Share]) -> RankManifest:
    packed = pack(layout, planned[1], chunk_bytes=CHUNK_BYTES, header_bytes=SLOT_HEADER_BYTES)
    spans = [(chunk.dtype, chunk.raw_bytes) for chunk in packed.chunks]
    return RankManifest(
        format=FORMAT,
        step=EARLIER.step,
        attempt=EARLIER.attempt,
        rank=rank,
        world_size=job.ranks,
        sequence=1,
        plan=planned[0],
        layout=layout.digest(),
        previous=None,
        parent=None,
        captured_at=1.7e9,
        metrics={"loss": 2.5},
        tensors=packed.tensors,
        aliases=packed.aliases,
        chunks=_chunks(EARLIER, rank, spans),
        pieces=Columns.pack(packed.pieces),
        fingerprints=b"",
        values={},
    )


def _chunks(id_: StepId, rank: int, spans: list[tuple[str, int]]) -> tuple[Chunk, ...]:
    return tuple(
        Chunk(
            xxhash.xxh3_128_hexdigest(f"{id_} {rank} {number}".encode()), str(id_), dtype, raw_bytes,
            raw_bytes * 17 // 20,
        )
        for number, (dtype, raw_bytes) in enumerate(spans)
    )  # fmt: skip


def _table(width: int, device: str) -> Iterator[Tensor]:
    """Give parameters with their two moments, block after block, without end."""
    block = 0
    while True:
        for part in (*_MATRICES, *_VECTORS):
            fqn = f"model.layers.{block}.{part}.weight"
            shape = (width,) if part in _VECTORS else (width, width)
            yield Tensor(fqn, "float32", shape, "parameter", True, device)
            for moment in ("exp_avg", "exp_avg_sq"):
                name = f"optimizer/{fqn}/{moment}"
                yield Tensor(name, "float32", shape, "optimizer", False, device)
        block += 1


def _generators(rank: int, id_: StepId) -> Tree:
    import numpy as np
    import torch

    from ckptd.trainer import rng

    seed = 1_000_000 * id_.step + rank
    kept = rng.capture()
    try:
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(seed % (1 << 32))  # noqa: NPY002 - the global one, which is captured
        return rng.capture()
    finally:
        rng.restore(kept)


def _write(path: Path, values: dict[str, bytes]) -> None:
    path.write_bytes(msgspec.msgpack.encode(values))


def _load(path: Path) -> dict[str, bytes]:
    return msgspec.msgpack.decode(path.read_bytes(), type=dict[str, bytes])
