"""Finishing what a dead job left: steps that lack nothing but their commit."""

from __future__ import annotations

import logging

from ckptd.codec.records import decode_record
from ckptd.errors import CheckpointError, ObjectNotFoundError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Outcome, RankManifest
from ckptd.pipeline.commit import MAX_RECORD_BYTES, Proofs, try_commit
from ckptd.store.base import Store
from ckptd.store.root import check_writer

log = logging.getLogger(__name__)


def commit_whole_steps(store: Store) -> list[StepId]:
    """Commit the newest steps of which all rank manifests are there; return what was committed.

    Looks only at steps newer than the newest checkpoint: older ones would not change what a job
    resumes from. A step that cannot be committed is left as it is, or ended if that is certain.

    Raises:
        StoreError: the store did not answer.
    """
    decided = {found: entry.bytes for entry in store.list(keys.CHECKPOINTS)
               if (found := keys.parse_checkpoint(entry.key))}  # fmt: skip
    newest = max((step for step, size in decided.items() if size), default=None)
    parts: dict[StepId, list[int]] = {}
    for entry in store.list(keys.RANKS):
        part = keys.parse_rank(entry.key)
        if part and part[0] not in decided and (newest is None or part[0] > newest):
            parts.setdefault(part[0], []).append(part[1])
    committed = []
    for step, ranks in sorted(parts.items()):
        world_size = _world_size(store, step, ranks[0])
        if world_size == len(ranks):
            check_writer(store)
            if not store.has_conditional_put:
                log.warning(
                    "step %s is whole, but only the daemon of rank 0 may commit it", step.short
                )
                continue
            verdict = try_commit(store, step, world_size, Proofs())
            log.warning("step %s had all its rank manifests: %s", step.short, verdict.state)
            if verdict.state == "committed":
                committed.append(step)
    return committed


def _world_size(store: Store, step: StepId, rank: int) -> int | None:
    key = keys.rank(step, rank)
    try:
        data = store.get(key, max_bytes=MAX_RECORD_BYTES)
        return decode_record(data, RankManifest | Outcome, key=key).world_size
    except (CheckpointError, ObjectNotFoundError) as error:  # damaged, or pruned meanwhile
        log.warning("step %s is not whole: %s", step.short, error)
        return None
