"""Rank manifests, the commit, and the end of steps that will never be committed.

Whoever comes first creates the one terminal record of a step: the manifest, or a tombstone. All of
them put with create-if-absent, read back, and believe what they read, so that any number of racing
committers report the same outcome, also after a lost response.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Literal, NamedTuple

import xxhash

from ckptd import failpoints
from ckptd.codec.records import decode_record, encode_record
from ckptd.errors import (
    CheckpointError,
    CkptdError,
    CorruptError,
    IncompleteError,
    LayoutError,
    ObjectExistsError,
    ObjectNotFoundError,
    SaveFailedError,
    StoreUnavailableError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import FORMAT, Manifest, Outcome, RankManifest
from ckptd.pipeline.each import each
from ckptd.pipeline.ranks import RankReader
from ckptd.plan.commit import layout_key, manifest_of
from ckptd.plan.table import join_ranks
from ckptd.store.base import Store

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 256 << 20
MAX_REASON_CHARS = 4000
MAX_OUTCOME_BYTES = 32 << 10  # a reason of that many characters, each escaped, and the rest
TOMBSTONE = b""

State = Literal["committed", "failed", "skipped", "unknown", "waiting"]


class Verdict(NamedTuple):
    """What is known of a step. `kind` names the class of error where the step is not committed."""

    state: State
    kind: str = ""
    reason: str = ""
    fqn: str = ""
    ranks: tuple[int, ...] = ()


COMMITTED = Verdict("committed")


class Recent:
    """Things that were seen, the latest `limit` of them; shared by threads."""

    def __init__(self, limit: int) -> None:
        self._known: dict[Hashable, None] = {}
        self._limit = limit
        self._lock = threading.Lock()  # guards _known

    def has(self, thing: Hashable) -> bool:
        """Tell whether it was seen."""
        with self._lock:
            return thing in self._known

    def add(self, thing: Hashable) -> None:
        """Remember it; the oldest is forgotten at the limit."""
        with self._lock:
            self._known[thing] = None
            while len(self._known) > self._limit:
                del self._known[next(iter(self._known))]


class Proofs:
    """What one commit leaves for the next; shared by threads.

    Attributes:
        reader: decodes rank manifests, and remembers what many have in common.
        layouts: keys (`layout_key`) under which coverage was proved.
        delivered: records that were read and are no outcomes: the root and what it listed there,
            since one that was begun anew lists other times.
    """

    def __init__(self) -> None:
        self.reader = RankReader()
        self.layouts = Recent(64)
        self.delivered = Recent(1 << 16)


def put_rank(store: Store, record: RankManifest) -> None:
    """Make a rank manifest durable. Repeating it after a lost answer is fine.

    Raises:
        SaveFailedError: another record stands in its place: this rank's outcome, or the manifest of
            another save of the same step.
        StoreError: it may not be durable.
    """
    key = keys.rank(record.id, record.rank)
    try:
        failpoints.hit("rank.put")
        store.put_new(key, encode_record(record))
    except (ObjectExistsError, StoreUnavailableError) as error:
        there = _read_part(store, key, error)
        is_ours = isinstance(there, RankManifest) and (
            (there.sequence, there.layout, there.world_size)
            == (record.sequence, record.layout, record.world_size)
        )
        if not is_ours:
            raise SaveFailedError(
                f"step {record.step}: another record of rank {record.rank} stands at {key}; "
                "saves of one step must not be mixed",
                step=record.step,
            ) from None
    failpoints.hit("rank.done")


def put_outcome(store: Store, record: Outcome) -> None:
    """Record that a rank delivers nothing; whatever stands there already stays.

    Raises:
        StoreError: it may not be durable.
    """
    try:
        failpoints.hit("outcome.put")
        store.put_new(keys.rank(record.id, record.rank), encode_record(record))
    except ObjectExistsError:
        return


def read_verdict(store: Store, step: StepId, world_size: int) -> Verdict:
    """Read the terminal record of a step, if there is one.

    Raises:
        StoreError: the store did not answer.
    """
    key = keys.checkpoint(step)
    try:
        data = store.get(key, max_bytes=MAX_RECORD_BYTES)
    except ObjectNotFoundError:
        return Verdict("waiting")
    if data == TOMBSTONE:
        return _why_ended(store, step, world_size)
    manifest = decode_record(data, Manifest, key=key)
    if manifest.id != step:
        raise CorruptError("a manifest of another step", key=key, step=step.step)
    return COMMITTED


def try_commit(store: Store, step: StepId, world_size: int, proofs: Proofs) -> Verdict:
    """Commit a step if all its rank manifests are there; end it if it can never be committed.

    Raises:
        StoreError: nothing is decided; ask again.
    """
    entries = {
        found[1]: entry
        for entry in store.list(f"{keys.RANKS}{step}/")
        if (found := keys.parse_rank(entry.key)) and found[1] < world_size
    }
    missing = sorted(set(range(world_size)) - entries.keys())
    # As long as ranks are missing this is asked again and again: only an outcome counts.
    wanted = [
        number
        for number, entry in sorted(entries.items())
        if not missing
        or (entry.bytes <= MAX_OUTCOME_BYTES and not proofs.delivered.has((store.url, entry)))
    ]
    records = []
    try:
        for record, size, digest in _read_ranks(store, step, wanted, proofs.reader):
            if isinstance(record, Outcome):
                return end_step(store, step, world_size, outcome_verdict(record))
            proofs.delivered.add((store.url, entries[record.rank]))
            records.append((record, size, digest))
        if missing:
            verdict = read_verdict(store, step, world_size)
            return verdict._replace(ranks=tuple(missing)) if verdict.state == "waiting" else verdict
        manifest = _prove(records, proofs)
    except (CheckpointError, LayoutError) as error:
        return end_step(store, step, world_size, verdict_of(error))
    return _put_manifest(store, manifest)


def end_step(store: Store, step: StepId, world_size: int, why: Verdict) -> Verdict:
    """Put a tombstone on the commit key; return `why`, or what stands there already.

    Raises:
        StoreError: nothing is decided; ask again.
    """
    try:
        failpoints.hit("tombstone.put")
        store.put_new(keys.checkpoint(step), TOMBSTONE)
    except (ObjectExistsError, StoreUnavailableError):
        there = read_verdict(store, step, world_size)
        if there.state == "waiting":
            raise
        return COMMITTED if there.state == "committed" else why
    return why


def give_up(
    store: Store, step: StepId, world_size: int, proofs: Proofs, why: Verdict
) -> Verdict:  # fmt: skip
    """End a step whose time is over, unless it turns out to be whole: then commit it.

    `why` may blame ranks of other nodes only because nothing was heard of them here; the verdict
    names those that are not in the store.

    Raises:
        StoreError: nothing is decided; ask again.
    """
    verdict = try_commit(store, step, world_size, proofs)
    if verdict.state == "waiting":
        verdict = end_step(store, step, world_size, why._replace(ranks=verdict.ranks))
    return verdict if verdict == COMMITTED else read_verdict(store, step, world_size)


def incomplete(step: StepId, missing: Sequence[int], timeout_s: float) -> Verdict:
    """Return the verdict on a step some of whose ranks did not deliver in time."""
    reason = f"step {step.step}: {join_ranks(missing)} delivered nothing within {timeout_s:.0f} s"
    return Verdict("failed", IncompleteError.__name__, reason, ranks=tuple(missing))


def verdict_of(error: CkptdError) -> Verdict:
    """Turn the error that stopped a commit into a verdict."""
    ranks = error.missing_ranks if isinstance(error, IncompleteError) else ()
    if isinstance(error, LayoutError):
        return Verdict("failed", type(error).__name__, str(error), error.fqn, error.ranks)
    return Verdict("failed", type(error).__name__, str(error), ranks=ranks)


def _prove(records: list[tuple[RankManifest, int, str]], proofs: Proofs) -> Manifest:
    key = layout_key(records)
    is_proven = proofs.layouts.has(key)
    manifest = manifest_of(records, is_layout_proven=is_proven)
    if manifest.differing and not is_proven:
        log.info(
            "step %s: kept per rank, because ranks differ: %s",
            manifest.id.short, ", ".join(manifest.differing),
        )  # fmt: skip
    proofs.layouts.add(key)
    return manifest


def _put_manifest(store: Store, manifest: Manifest) -> Verdict:
    # Rank manifests of other daemons may be visible before they are durable (a local file system
    # shared by several): everything that the manifest names is made durable before it exists.
    store.sync()
    try:
        failpoints.hit("commit.put")
        store.put_new(keys.checkpoint(manifest.id), encode_record(manifest))
    except ObjectExistsError:
        pass  # somebody was faster: the read below tells what
    except StoreUnavailableError:
        verdict = read_verdict(store, manifest.id, manifest.world_size)
        if verdict.state == "waiting":
            raise
        return verdict
    failpoints.hit("commit.done")
    return read_verdict(store, manifest.id, manifest.world_size)


def _read_ranks(
    store: Store, step: StepId, numbers: Iterable[int], reader: RankReader
) -> Iterator[tuple[RankManifest | Outcome, int, str]]:
    """Yield records with their lengths and hashes; several are fetched at once."""

    def fetch(number: int) -> tuple[int, bytes]:
        return number, store.get(keys.rank(step, number), max_bytes=MAX_RECORD_BYTES)

    with closing(each(store, fetch, numbers)) as fetched:
        for number, data in fetched:
            yield _decode_rank(step, number, data, reader), len(data), _hash(data)


def _decode_rank(
    step: StepId, number: int, data: bytes, reader: RankReader
) -> RankManifest | Outcome:
    key = keys.rank(step, number)
    record = reader.decode(data, key=key)
    if record.id != step or record.rank != number:
        raise CorruptError("a rank manifest of another step or rank", key=key, step=step.step)
    return record


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _read_part(store: Store, key: str, cause: Exception) -> RankManifest | Outcome:
    try:
        data = store.get(key, max_bytes=MAX_RECORD_BYTES)
    except ObjectNotFoundError:
        raise cause from None
    return decode_record(data, RankManifest | Outcome, key=key)


def outcome_verdict(record: Outcome) -> Verdict:
    """Return the verdict on a step to which a rank delivers nothing."""
    kind = "SaveSkippedError" if record.state == "skipped" else SaveFailedError.__name__
    reason = f"step {record.step}: rank {record.rank} {record.state}: {record.reason}"
    return Verdict(record.state, kind, reason, ranks=(record.rank,))


def _why_ended(store: Store, step: StepId, world_size: int) -> Verdict:
    """Say why a step has a tombstone, from what its ranks left: the same on every node.

    That is an outcome record, a damaged record, ranks that are not there, or what the proof says.
    """
    parts, damage, reader = [], None, RankReader()
    for entry in store.list(f"{keys.RANKS}{step}/"):
        found = keys.parse_rank(entry.key)
        if found is None or found[1] >= world_size:
            continue
        try:
            data = store.get(entry.key, max_bytes=MAX_RECORD_BYTES)
            record = _decode_rank(step, found[1], data, reader)
        except ObjectNotFoundError:
            continue  # pruned meanwhile
        except CheckpointError as error:
            damage = damage or error
            continue
        if isinstance(record, Outcome):
            return outcome_verdict(record)
        parts.append((record, len(data), _hash(data)))
    if damage is not None:
        return verdict_of(damage)
    missing = tuple(sorted(set(range(world_size)) - {record.rank for record, _, _ in parts}))
    try:
        if not missing:
            manifest_of(parts)
    except (CheckpointError, LayoutError) as error:
        return verdict_of(error)
    if missing:
        reason = f"step {step.step}: {join_ranks(missing)} delivered nothing before it was given up"
        return Verdict("failed", IncompleteError.__name__, reason, ranks=missing)
    reason = f"step {step.step} was ended by a tombstone, though all its ranks had delivered"
    return Verdict("failed", SaveFailedError.__name__, reason)


def new_outcome(
    step: StepId, rank: int, world_size: int, sequence: int, state: Literal["failed", "skipped"],
    reason: str,
) -> Outcome:  # fmt: skip
    """Build the record that stands in place of a rank manifest."""
    return Outcome(
        FORMAT,
        step.step,
        step.attempt,
        rank,
        world_size,
        sequence,
        state,
        reason[:MAX_REASON_CHARS],
    )
