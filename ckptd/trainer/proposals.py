"""What rank 0 proposes to resume from, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from ckptd.errors import CkptdError, CorruptError, ObjectNotFoundError, StoreError
from ckptd.model.keys import StepId
from ckptd.model.ready import make_ready
from ckptd.pipeline.catalog import find, line, list_commits
from ckptd.pipeline.recover import commit_whole_steps
from ckptd.store.base import Store
from ckptd.trainer.attempts import read_attempt
from ckptd.trainer.passing import has_group
from ckptd.trainer.recall import HeldStep, Recall, Sighting, held_steps
from ckptd.trainer.recalled import is_spread_out

log = logging.getLogger("ckptd.trainer")


class Proposal(msgspec.Struct):
    """What rank 0 proposes next: a checkpoint, or a step in memory with the newest checkpoint `before`.

    Both are None when nothing is left, or when it failed to look. `settles` says that the daemons are
    to finish first what they write.
    """

    id: str | None = None
    held: HeldStep | None = None
    before: str | None = None
    settles: bool = False
    kind: str = ""
    reason: str = ""


make_ready(Proposal)


class Root(NamedTuple):
    """Where to look.

    `may_commit`: steps that lack only their manifest are given it first.
    """

    url: str
    storage_options: dict[str, object]
    may_commit: bool


class Looking(NamedTuple):
    """Rank 0's look at what there is; `step` as in `Checkpointer.resume`."""

    root: Root
    world_size: int
    step: int | None
    sightings: Sequence[Sighting]

    def proposals(
        self, store: Store, *, has_memory: bool, recall: Recall | None
    ) -> Iterator[Proposal]:
        """Yield what to try: held steps, then the newest of the line, then back; or just `step`.

        A checkpoint of which memory lacks a part comes after all is settled: a daemon that is gone may
        have written its part of a newer one, that lacks no more than its commit.
        """
        attempt = recall.attempt if has_memory and recall is not None else None
        if attempt is not None:
            yield from self._held(store, attempt, is_whole=True)
            yield Proposal(settles=True)
        if self.root.may_commit:
            commit_whole_steps(store)
        if attempt is not None:
            yield from self._held(store, attempt, is_whole=False)
        if self.step is not None:
            # Be it damaged, that is for `check` to say; whoever names a step wants that one.
            yield Proposal(id=str(find(store, self.step).id))
            return
        has_any = False
        for manifest in line(store):
            has_any = True
            yield Proposal(id=str(manifest.id))
        if not has_any and list_commits(store):
            raise CorruptError("there are checkpoints but no manifest can be read", key=store.url)

    def _held(self, store: Store, attempt: int, *, is_whole: bool) -> Iterator[Proposal]:
        """Yield what is held of attempts before `attempt`, whole or not, and not older than a commit."""
        if is_spread_out(self.sightings) and not has_group(self.world_size):
            return
        commits = [commit.id for commit in list_commits(store)]
        newest = str(max(commits)) if commits else None
        for held in held_steps(self.sightings, attempt, commits):
            if held.is_whole == is_whole and _is_of_root(store, held):
                yield Proposal(held=held, before=newest)


def _is_of_root(store: Store, held: HeldStep) -> bool:
    """Tell whether an attempt is one of this root's, not of one that had the same name before."""
    try:
        record = read_attempt(store, StepId.parse(held.id).attempt)
    except (ObjectNotFoundError, CorruptError):
        return False
    except StoreError as error:
        if type(error) is StoreError:  # the base class says: larger than any such record can be
            return False
        raise
    return record.token == held.token


def next_proposal(proposals: Iterator[Proposal]) -> Proposal:
    """Return the next one, an empty one at the end, or why there is none."""
    try:
        return next(proposals, Proposal())
    except CkptdError as error:
        return Proposal(kind=type(error).__name__, reason=str(error))
    except Exception as error:
        log.exception("looking for checkpoints failed")
        return Proposal(kind=CkptdError.__name__, reason=repr(error))
