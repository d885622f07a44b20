"""What a root holds: listing, finding and reading the records of committed checkpoints.

Everything here only reads. A record that is not there raises `CheckpointNotFoundError` or
`CorruptError` only if the store answered so; a store that does not answer raises a `StoreError`,
and nothing here takes that for absence or falls back to something older.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import NamedTuple, TypeVar

import xxhash

from ckptd.codec.records import decode_record
from ckptd.errors import CheckpointNotFoundError, CorruptError, ObjectNotFoundError, StoreError
from ckptd.model import keys
from ckptd.model.checkpoint import Checkpoint
from ckptd.model.keys import StepId
from ckptd.model.manifest import Manifest, RankManifest
from ckptd.pipeline.commit import MAX_RECORD_BYTES, TOMBSTONE
from ckptd.pipeline.each import each
from ckptd.pipeline.ranks import RankReader
from ckptd.plan.line import Commit, parse_commits
from ckptd.plan.line import line as plan_line
from ckptd.store.base import Store

log = logging.getLogger(__name__)

_Record = TypeVar("_Record")


def list_commits(store: Store) -> list[Commit]:
    """List what is committed, newest first: highest attempt, then highest step in it.

    Reads keys and sizes only; tombstones are left out.

    Raises:
        StoreError: the listing is not complete.
    """
    commits = parse_commits(store.list(keys.CHECKPOINTS))
    return sorted(commits, key=lambda commit: commit.id, reverse=True)


def find(store: Store, step: int | None = None, attempt: int | None = None) -> Commit:
    """Find a checkpoint: the newest, step `step` of the line, or any by step and attempt.

    An attempt alone names its newest checkpoint. What is found may still turn out damaged.

    Raises:
        CheckpointNotFoundError: the store answered that there is no such checkpoint.
        UnsupportedFormatError: a newer version wrote a manifest that had to be read.
        StoreError: the store did not answer.
    """
    commits = list_commits(store)
    named = [
        commit
        for commit in commits
        if (step is None or commit.id.step == step)
        and (attempt is None or commit.id.attempt == attempt)
    ]
    if named and (step is None or attempt is not None):
        return named[0]
    if named:
        for commit in _line(store, commits):
            if commit.id.step == step:
                return commit
    message = f"there is no {_name(step, attempt)} in {store.url}"
    if named:
        others = " or ".join(commit.id.short for commit in named[:4])
        message = f"step {step} is not on the line of {store.url}; to read it, name {others}"
    raise CheckpointNotFoundError(message, step=step)


def line(store: Store) -> Iterator[Manifest]:
    """Read the manifests of the line, the newest first, back through `previous`.

    A damaged manifest is logged and left out; the line goes on with the next older commit: the
    highest step below it in the same attempt, else the highest attempt below.

    Raises:
        UnsupportedFormatError: a newer version wrote a manifest; that is no damage.
        StoreError: the store did not answer.
    """
    for commit in _line(store, list_commits(store)):
        found = _try_read(store, commit.id)
        if isinstance(found, Manifest):
            yield found
        elif isinstance(found, CorruptError):
            log.warning("checkpoint %s is DAMAGED and left out: %s", commit.id.short, found)


def read_manifest(store: Store, id_: StepId) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointNotFoundError: there is none, or a tombstone in its place.
        CorruptError: it does not parse, or it is another checkpoint's.
        UnsupportedFormatError: a newer version wrote it.
        StoreError: the store did not answer.
    """
    return _twice(lambda: _read_manifest(store, id_))


def _read_manifest(store: Store, id_: StepId) -> Manifest:
    key = keys.checkpoint(id_)
    try:
        data = _get(store, key, MAX_RECORD_BYTES)
    except ObjectNotFoundError:
        raise CheckpointNotFoundError(
            f"there is no checkpoint {id_.short} in {store.url}", step=id_.step
        ) from None
    if data == TOMBSTONE:
        raise CheckpointNotFoundError(
            f"checkpoint {id_.short} in {store.url} was pruned, or its step failed", step=id_.step
        )
    manifest = decode_record(data, Manifest, key=key)
    if manifest.id != id_:
        raise CorruptError(f"the manifest of {manifest.id.short} stands at", key=key, step=id_.step)
    return manifest


def read_rank(
    store: Store, manifest: Manifest, rank: int, reader: RankReader | None = None
) -> RankManifest:
    """Read what one rank wrote, and check that it is what the manifest committed.

    `reader` remembers what records have in common, for who reads several.

    Raises:
        CorruptError: it is missing, or not the very record that the manifest names.
        UnsupportedFormatError: a newer version wrote it.
        StoreError: the store did not answer.
    """
    data = _read_rank(store, manifest, rank)
    return _decode_rank(manifest, rank, data, reader or RankReader())


def _read_rank(store: Store, manifest: Manifest, rank: int) -> bytes:
    """Return the stored bytes of a rank manifest, which are those that the manifest names."""
    entry, key = manifest.ranks[rank], keys.rank(manifest.id, rank)

    def read() -> bytes:
        try:
            data = _get(store, key, MAX_RECORD_BYTES)
        except ObjectNotFoundError:
            raise CorruptError("a rank manifest is missing", key=key, step=manifest.step) from None
        if (len(data), xxhash.xxh3_128_hexdigest(data)) != (entry.bytes, entry.hash):
            # Either may be the damaged one: a manifest has no hash of its own.
            commit = keys.checkpoint(manifest.id)
            raise CorruptError(f"not the record that {commit} names", key=key, step=manifest.step)
        return data

    return _twice(read)


def _decode_rank(manifest: Manifest, rank: int, data: bytes, reader: RankReader) -> RankManifest:
    key = keys.rank(manifest.id, rank)
    record = reader.decode(data, key=key)
    if not isinstance(record, RankManifest):
        raise CorruptError("an outcome stands in place of a rank manifest", key=key)
    said = (record.id, record.rank, record.world_size, record.sequence)
    if said != (manifest.id, rank, manifest.world_size, manifest.sequence):
        raise CorruptError(
            f"a rank manifest of step {record.id.short}, rank {record.rank} of {record.world_size}, "
            f"save {record.sequence}, stands at", key=key, step=manifest.step,
        )  # fmt: skip
    return record


def read_ranks(
    store: Store,
    manifest: Manifest,
    ranks: Iterable[int] | None = None,
    reader: RankReader | None = None,
) -> list[RankManifest]:
    """Read what several ranks wrote (None: all), some at a time; in the order of `ranks`.

    Raises:
        As `read_rank`.
    """
    wanted = list(range(manifest.world_size) if ranks is None else ranks)
    reader = reader or RankReader()
    # Threads wait for the store; to decode takes the interpreter, which is one.
    with closing(each(store, lambda rank: _read_rank(store, manifest, rank), wanted)) as fetched:
        return [
            _decode_rank(manifest, rank, data, reader)
            for rank, data in zip(wanted, fetched, strict=True)
        ]


class Listed(NamedTuple):
    """A commit with its manifest, or with what is wrong with that."""

    commit: Commit
    manifest: Manifest | None
    damage: CorruptError | None
    is_on_line: bool


def survey(store: Store) -> list[Listed]:
    """Read all manifests of a root, newest first, and tell which are on the line.

    Raises:
        UnsupportedFormatError: a newer version wrote one.
        StoreError: the store did not answer.
    """
    commits = list_commits(store)
    read = each(store, lambda commit: _try_read(store, commit.id), commits)
    found = {commit.id: there for commit, there in zip(commits, read, strict=True)}
    ids = list(found)
    on_line = {c.id for c in plan_line(commits, lambda id_: _before(ids, id_, found[id_]))}
    return [
        Listed(
            commit,
            there if isinstance(there, Manifest) else None,
            there if isinstance(there, CorruptError) else None,
            commit.id in on_line,
        )
        for commit in commits
        if not isinstance(there := found[commit.id], CheckpointNotFoundError)
    ]


def _try_read(store: Store, id_: StepId) -> Manifest | CorruptError | CheckpointNotFoundError:
    try:
        return read_manifest(store, id_)
    except (CorruptError, CheckpointNotFoundError) as error:
        return error


def _twice(read: Callable[[], _Record]) -> _Record:
    """Read once more before a record counts as damaged: a bit may have flipped on the way."""
    try:
        return read()
    except CorruptError:
        return read()


def _get(store: Store, key: str, max_bytes: int) -> bytes:
    try:
        return store.get(key, max_bytes=max_bytes)
    except StoreError as error:
        if type(error) is StoreError:  # the base class says: larger than any such record can be
            raise CorruptError(f"larger than {max_bytes} bytes", key=key) from None
        raise


def _line(store: Store, commits: list[Commit]) -> Iterator[Commit]:
    ids = [commit.id for commit in commits]
    return plan_line(commits, lambda id_: _before(ids, id_, _try_read(store, id_)))


def _before(
    ids: list[StepId], id_: StepId, found: Manifest | CorruptError | CheckpointNotFoundError
) -> StepId | None:
    """Return what comes before the lowest step of an attempt: what it says, if it can be read.

    Where it cannot, the highest attempt below does; there, steps that are not below `id_.step` are
    passed over if others exist: a job that went on from an older step has abandoned them.
    """
    if isinstance(found, Manifest):
        return StepId.parse(found.previous) if found.previous is not None else None
    older = [other for other in ids if other.attempt < id_.attempt]
    return max(
        (other for other in older if other.step < id_.step), default=max(older, default=None)
    )


def _name(step: int | None, attempt: int | None) -> str:
    what = "checkpoint" if step is None else f"step {step}"
    return what if attempt is None else f"{what} of attempt {attempt:04d}"


def describe(store: Store, id_: StepId) -> Checkpoint:
    """Return what a committed checkpoint is.

    Raises:
        As `read_manifest`.
    """
    commit = find(store, id_.step, id_.attempt)
    return Checkpoint.of(read_manifest(store, id_), commit.committed_at)


def list_checkpoints(store: Store) -> list[Checkpoint]:
    """Return all checkpoints of a root whose manifest can be read, newest first.

    Raises:
        As `survey`.
    """
    return [
        Checkpoint.of(listed.manifest, listed.commit.committed_at)
        for listed in survey(store)
        if listed.manifest is not None
    ]
