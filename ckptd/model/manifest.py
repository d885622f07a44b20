"""The records of a checkpoint: what one rank wrote, what became of it, and the commit itself.

Types say most of what is valid; `check` says the rest, once, where stored bytes become values.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from ckptd.model import dtypes, keys
from ckptd.model.columns import Columns, Piece
from ckptd.model.keys import ChunkId, StepId
from ckptd.model.pieces import PieceCheck
from ckptd.model.ready import make_ready
from ckptd.model.tensor import Tensor

FORMAT = 1
MAX_CHUNK_BYTES = 64 << 20

Tree = Any
"""A value in its stored form: tagged JSON, see docs/format.md."""


class RootRecord(msgspec.Struct, frozen=True):
    """``ckptd.json``: says that this is a root, and in which format."""

    format: int


class AttemptRecord(msgspec.Struct, frozen=True):
    """``attempts/0007``: who claimed this ordinal. `token` is random, so that ranks can compare."""

    token: str
    world_size: int
    host: str
    user: str
    pid: int


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A chunk that a rank manifest refers to. `birth` is a step id in the form of keys."""

    hash: str
    birth: str
    dtype: str
    raw_bytes: int
    stored_bytes: int

    @property
    def id(self) -> ChunkId:
        """Content and birth."""
        return ChunkId(self.hash, StepId.parse(self.birth))

    def check(self) -> None:
        """Check what types cannot say.

        Raises:
            ValueError: naming the field.
        """
        if not keys.is_hash(self.hash) or self.dtype not in dtypes.BY_NAME:
            raise ValueError("bad hash or dtype of a chunk")
        StepId.parse(self.birth)
        if not 0 < self.raw_bytes <= MAX_CHUNK_BYTES or self.stored_bytes <= 0:
            raise ValueError("bad length of a chunk")
        if self.raw_bytes % dtypes.BY_NAME[self.dtype].itemsize:
            raise ValueError("a chunk that is not whole elements")


class RankManifest(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="record", tag="rank"
):
    """What one rank wrote of one step.

    `sequence` numbers the saves of an attempt from 1. `plan` is the digest of the split plan that
    the rank followed, None where it wrote all it holds; `layout` the digest of its own layout.
    `fingerprints` (8 bytes a tensor, only where `plan` is None) are samples of the contents of
    parameters and optimizer tensors, so that a commit can tell replicas that differ; zeros mean
    "not sampled". A metric that is not a finite number is None. `previous` is the checkpoint before
    this one on the line. `parent` is the committed checkpoint from which chunks are borrowed.
    `captured_at` is the trainer's clock, in seconds since 1970, for people only.
    """

    format: int
    step: int
    attempt: int
    rank: int
    world_size: int
    sequence: int
    plan: str | None
    layout: str
    previous: str | None
    parent: str | None
    captured_at: float
    metrics: dict[str, float | None]
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    chunks: tuple[Chunk, ...]
    pieces: Columns
    fingerprints: bytes
    values: dict[str, Tree]

    @property
    def id(self) -> StepId:
        """Step and attempt."""
        return StepId(attempt=self.attempt, step=self.step)

    def unpack(self) -> list[Piece]:
        """Return the pieces.

        Raises:
            ValueError: if the columns do not fit.
        """
        return self.pieces.unpack([len(t.shape) for t in self.tensors])

    def check(self) -> None:
        """Check what types cannot say: ranges, tables, and that each piece lies in its chunk.

        Raises:
            ValueError: naming the field.
        """
        self.check_head()
        check_table(self.tensors, self.aliases)
        spans = [(chunk.dtype, chunk.raw_bytes) for chunk in self.chunks]
        if not PieceCheck(self.tensors).are_in_order(self.pieces, spans):
            for piece in self.unpack():
                _check_piece(piece, self.tensors, self.chunks)
            raise ValueError("pieces that do not fit tensors and chunks")

    def check_head(self) -> None:
        """Check all but the table of tensors and the pieces.

        Raises:
            ValueError: naming the field.
        """
        _check_step(self.step, self.attempt, self.sequence, self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}")
        for digest in (self.plan, self.layout):
            if digest is not None and not keys.is_hash(digest):
                raise ValueError("bad digest")
        for step_id in (self.previous, self.parent):
            if step_id is not None:
                StepId.parse(step_id)
        for chunk in self.chunks:
            chunk.check()
        if len(self.fingerprints) not in (0, 8 * len(self.tensors)):
            raise ValueError("fingerprints that do not fit the tensors")


class Outcome(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="record", tag="outcome"
):
    """Stands in place of a rank manifest: why this rank delivers nothing for this step."""

    format: int
    step: int
    attempt: int
    rank: int
    world_size: int
    sequence: int
    state: Literal["failed", "skipped"]
    reason: str

    @property
    def id(self) -> StepId:
        """Step and attempt."""
        return StepId(attempt=self.attempt, step=self.step)

    def check(self) -> None:
        """Check what types cannot say.

        Raises:
            ValueError: naming the field.
        """
        _check_step(self.step, self.attempt, self.sequence, self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}")


class RankEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A rank manifest that a commit names: its stored length, and the xxh3-128 of its bytes."""

    rank: int
    bytes: int
    hash: str


class Manifest(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="record", tag="manifest"
):
    """The record whose existence is the commit.

    `raw_bytes` are the bytes of all tensors, each counted once; `stored_bytes` those of all chunks
    that the rank manifests name. `differing` are the values that are not the same on all ranks.
    """

    format: int
    step: int
    attempt: int
    world_size: int
    sequence: int
    previous: str | None
    captured_at: float
    metrics: dict[str, float | None]
    raw_bytes: int
    stored_bytes: int
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    differing: tuple[str, ...]
    ranks: tuple[RankEntry, ...]

    @property
    def id(self) -> StepId:
        """Step and attempt."""
        return StepId(attempt=self.attempt, step=self.step)

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics as they were: not a number where null stands."""
        return {name: math.nan if v is None else v for name, v in self.metrics.items()}

    def check(self) -> None:
        """Check what types cannot say.

        Raises:
            ValueError: naming the field.
        """
        _check_step(self.step, self.attempt, self.sequence, self.world_size)
        if self.previous is not None:
            StepId.parse(self.previous)
        if [entry.rank for entry in self.ranks] != list(range(self.world_size)):
            raise ValueError("the ranks are not exactly 0 to world_size - 1")
        for entry in self.ranks:
            if entry.bytes <= 0 or not keys.is_hash(entry.hash):
                raise ValueError(f"bad entry of rank {entry.rank}")
        if self.raw_bytes < 0 or self.stored_bytes < 0:
            raise ValueError("negative bytes")
        check_table(self.tensors, self.aliases)


def check_table(tensors: tuple[Tensor, ...], aliases: dict[str, str]) -> None:
    """Check a tensor table: each row, no name twice, no alias of nothing.

    Raises:
        ValueError: naming the tensor.
    """
    names = set()
    for tensor in tensors:
        tensor.check()
        if tensor.fqn in names:
            raise ValueError(f"{tensor.fqn} stands twice in the table")
        names.add(tensor.fqn)
    for alias, target in aliases.items():
        if target not in names or alias in names:
            raise ValueError(f"alias {alias[:80]!r} of nothing, or of itself")


def _check_step(step: int, attempt: int, sequence: int, world_size: int) -> None:
    if not 0 <= step <= keys.MAX_STEP or not 0 < attempt <= keys.MAX_ATTEMPT:
        raise ValueError(f"step {step} of attempt {attempt}")
    if sequence < 1 or not 1 <= world_size <= keys.MAX_RANK + 1:
        raise ValueError(f"sequence {sequence}, world size {world_size}")


def _check_piece(piece: Piece, tensors: tuple[Tensor, ...], chunks: tuple[Chunk, ...]) -> None:
    tensor = tensors[piece.tensor]
    if piece.chunk >= len(chunks):
        raise ValueError(f"{tensor.fqn}: a piece in a chunk that is not in the table")
    chunk = chunks[piece.chunk]
    if not piece.box.is_within(tensor.shape):
        raise ValueError(f"{tensor.fqn}: box {piece.box} outside of shape {tensor.shape}")
    size = math.prod(piece.box.shape) * tensor.itemsize
    if piece.length_bytes != size or chunk.dtype != tensor.dtype:
        raise ValueError(f"{tensor.fqn}: dtype or length of a piece does not fit its box")
    if piece.offset_bytes + size > chunk.raw_bytes or piece.offset_bytes % tensor.itemsize:
        raise ValueError(f"{tensor.fqn}: a piece that leaves its chunk")


make_ready(RootRecord, AttemptRecord, RankManifest | Outcome, Manifest)
