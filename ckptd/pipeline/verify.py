"""Proving that checkpoints are whole, and naming what is not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from ckptd.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptError,
    LayoutError,
    UnsupportedFormatError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Chunk, Manifest, RankManifest
from ckptd.pipeline.catalog import list_commits, read_manifest, read_rank
from ckptd.pipeline.each import each
from ckptd.pipeline.read import Loader, readers_of
from ckptd.plan.commit import manifest_of
from ckptd.store.base import Store

MAX_NAMES = 5

Progress = Callable[[int, int], None]
"""Raw bytes checked, of raw bytes in all; called in the thread that called `verify`."""


class Damage(msgspec.Struct, frozen=True):
    """An object that is not what it should be.

    `tensors` names up to `MAX_NAMES` of the tensors that need it; `tensor_count` counts all.
    """

    key: str
    what: str
    tensors: tuple[str, ...] = ()
    tensor_count: int = 0


class VerifyReport(msgspec.Struct, frozen=True):
    """What was checked of a checkpoint, and what was found."""

    id: StepId
    is_data: bool
    ranks: int
    chunks: int
    raw_bytes: int
    damage: tuple[Damage, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong, as far as was looked."""
        return not self.damage


def verify(
    store: Store,
    id_: StepId,
    *,
    is_data: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that all that a checkpoint names exists, has its length, and adds up to its manifest.

    With `is_data` every chunk is fetched and every block decoded and hashed. Damage is reported,
    not raised.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        StoreError: the store did not answer; nothing is known.
    """
    return _Check(store, _stored(store), is_data=is_data, threads=threads).run(id_, progress)


def verify_all(
    store: Store,
    *,
    is_data: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Iterator[VerifyReport]:
    """Check all checkpoints of a root, newest first; a chunk that several share is read once.

    Raises:
        StoreError: the store did not answer.
    """
    commits = list_commits(store)
    check = _Check(store, _stored(store), is_data=is_data, threads=threads)
    for commit in commits:
        with suppress(CheckpointNotFoundError):  # pruned since the listing
            yield check.run(commit.id, progress)


def _stored(store: Store) -> dict[str, int]:
    return {entry.key: entry.bytes for entry in store.list(keys.CHUNKS)}


class _Check:
    """One listing of chunks, and what is known of each from earlier checkpoints of the run."""

    def __init__(
        self, store: Store, stored: Mapping[str, int], *, is_data: bool, threads: int | None
    ) -> None:
        self._store = store
        self._stored = stored
        self._is_data = is_data
        self._threads = threads or readers_of(store)
        self._known: dict[Chunk, str] = {}

    def run(self, id_: StepId, progress: Progress | None) -> VerifyReport:
        try:
            manifest = read_manifest(self._store, id_)
        except (CorruptError, UnsupportedFormatError) as error:
            wrong_record = Damage(keys.checkpoint(id_), _what(error))
            return VerifyReport(id_, self._is_data, 0, 0, 0, (wrong_record,))
        records, damage_of_ranks = self._read_ranks(manifest)
        damage = tuple(damage_of_ranks) or tuple(_disagreement(manifest, records))
        chunks = {chunk for record in records for chunk in record.chunks}
        wrong = self._check_chunks(chunks, progress)
        names = _names(records, wrong)
        damage += tuple(
            Damage(chunk.id.key, what, tuple(names[chunk][:MAX_NAMES]), len(names[chunk]))
            for chunk, what in sorted(wrong.items(), key=lambda item: item[0].id.key)
        )
        if damage:
            read_manifest(self._store, id_)  # a prune meanwhile is no damage: not found then
        raw_bytes = sum(chunk.raw_bytes for chunk in chunks)
        return VerifyReport(id_, self._is_data, manifest.world_size, len(chunks), raw_bytes, damage)

    def _read_ranks(self, manifest: Manifest) -> tuple[list[RankManifest], list[Damage]]:
        def read(rank: int) -> RankManifest | Damage:
            try:
                return read_rank(self._store, manifest, rank)
            except (CorruptError, UnsupportedFormatError) as error:
                return Damage(keys.rank(manifest.id, rank), _what(error))

        found = list(each(self._store, read, range(manifest.world_size)))
        return (
            [record for record in found if isinstance(record, RankManifest)],
            [damage for damage in found if isinstance(damage, Damage)],
        )

    def _check_chunks(self, chunks: Iterable[Chunk], progress: Progress | None) -> dict[Chunk, str]:
        """Return what is wrong with which chunks."""
        ordered = sorted(chunks, key=lambda chunk: chunk.id.key)
        total_bytes, done_bytes = sum(chunk.raw_bytes for chunk in ordered), 0
        local = threading.local()

        def check(chunk: Chunk) -> str:
            if not hasattr(local, "loader"):
                local.loader = Loader(self._store)
            return self._what_is_wrong(chunk, local.loader)

        wrong = {}
        with ThreadPoolExecutor(self._threads, thread_name_prefix="ckptd-verify") as pool:
            new = [chunk for chunk in ordered if chunk not in self._known]
            try:
                for chunk, what in zip(new, pool.map(check, new), strict=True):
                    self._known[chunk] = what
                    done_bytes += chunk.raw_bytes
                    if progress is not None:
                        progress(done_bytes, total_bytes)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        wrong = {chunk: self._known[chunk] for chunk in ordered if self._known[chunk]}
        if progress is not None:
            progress(total_bytes, total_bytes)
        return wrong

    def _what_is_wrong(self, chunk: Chunk, loader: Loader) -> str:
        stored_bytes = self._stored.get(chunk.id.key)
        if stored_bytes is None:
            return "missing"
        if stored_bytes != chunk.stored_bytes:
            return f"{stored_bytes} bytes in place of {chunk.stored_bytes}"
        if self._is_data:
            try:
                for _ in loader.blocks(chunk):
                    pass
            except (CorruptError, UnsupportedFormatError) as error:
                return _what(error)
        return ""


def _disagreement(manifest: Manifest, records: list[RankManifest]) -> Iterator[Damage]:
    """Prove that the rank manifests, which are those that were committed, add up to the manifest."""
    key = keys.checkpoint(manifest.id)
    parts = [
        (record, entry.bytes, entry.hash)
        for record, entry in zip(records, manifest.ranks, strict=True)
    ]
    try:
        expected = manifest_of(parts)
    except (CheckpointError, LayoutError) as error:
        yield Damage(key, f"its rank manifests do not make a whole checkpoint: {error}")
        return
    for field in Manifest.__struct_fields__:
        if _canonical(getattr(manifest, field)) != _canonical(getattr(expected, field)):
            yield Damage(key, f"{field} is not what its rank manifests say")


def _canonical(value: object) -> bytes:
    """Return bytes that are equal for equal values: a NaN metric is not equal to itself."""
    return msgspec.msgpack.encode(value, order="deterministic")


def _what(error: CheckpointError) -> str:
    """Return the message without the key, which stands beside it."""
    key = error.key if isinstance(error, CorruptError) else ""
    return str(error).removesuffix(f": {key}")


def _names(records: list[RankManifest], wrong: Mapping[Chunk, str]) -> dict[Chunk, list[str]]:
    """Return the FQNs of the tensors that have pieces in the chunks of `wrong`."""
    names: dict[Chunk, dict[str, None]] = {chunk: {} for chunk in wrong}
    for record in records if wrong else ():
        for piece in record.unpack():
            chunk = record.chunks[piece.chunk]
            if chunk in names:
                names[chunk][record.tensors[piece.tensor].fqn] = None
    return {chunk: sorted(found) for chunk, found in names.items()}
