"""`ckptd.restore`: from a checkpoint into live objects, without a Checkpointer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from ckptd.errors import CheckpointNotFoundError
from ckptd.store.open import normalise_url
from ckptd.trainer.filling import Request, Resumed
from ckptd.trainer.flatten import check_state
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.proposals import Root
from ckptd.trainer.resuming import Resuming
from ckptd.trainer.terms import MapLocation, Rename, Terms


def restore(  # noqa: PLR0913 - one keyword for each choice
    source: str | os.PathLike[str],
    state: Mapping[str, object],
    *,
    step: int | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    map_location: MapLocation = None,
    select: str | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    trust_pickle: bool = False,
    storage_options: dict[str, object] | None = None,
    share_reads: bool | None = None,
    meeting_timeout_s: float = 300.0,
) -> Resumed:
    """Fill the live objects of `state` from a checkpoint of the root `source`; writes nothing to it.

    For evaluation, fine-tuning and conversion; a job that goes on training its own root calls
    `Checkpointer.resume`, which takes the same arguments and does the same, but that it first commits a
    step which lacks only its manifest, and returns None for an empty root. In a job of several ranks
    every rank calls it, in the same order, and all take the same checkpoint. What all of them want is
    read once and passed on over the job's process group where they are on several nodes, or as
    `share_reads` says.

    Raises:
        CheckpointNotFoundError: the root holds no checkpoint.
        CkptdError: as `Checkpointer.resume`.
    """
    check_state(state)
    terms = Terms(strict, rename, map_location, trust_pickle, select, dtype)
    terms.check()
    url = normalise_url(os.fspath(source))
    meeting = Meeting.of_job(url, meeting_timeout_s)
    try:
        request = Request(state, terms, meeting.rank, meeting.world_size)
        root = Root(url, storage_options or {}, may_commit=False)
        resumed = Resuming(root, meeting, meeting_timeout_s).run(
            request, step, share_reads=share_reads
        )
    finally:
        meeting.close()
    if resumed is None:
        raise CheckpointNotFoundError(f"{url} holds no checkpoint")
    return resumed
