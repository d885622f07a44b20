"""Where a state may be filled from: a checkpoint in a store, or snapshots in the memory of daemons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import read_manifest
from ckptd.store.base import Store
from ckptd.trainer.fetching import Records, StoreRecords
from ckptd.trainer.filling import Filling
from ckptd.trainer.recall import HeldStep
from ckptd.trainer.recalled import Recalled, Site


class Source(Protocol):
    """One step to fill from. Ranks open it, tell each other a note, and may pass something on."""

    name: Literal["store", "memory"]
    id: StepId

    def open(self) -> Records:
        """Open it.

        Raises:
            CorruptError: it is damaged, or gone.
            StoreError, MeetingError: the store or a rank did not answer.
        """

    def note(self, filling: Filling) -> str:
        """Say what the other ranks have to know, once the filling was checked."""

    def hear(self, filling: Filling, notes: Sequence[str]) -> bool:
        """Take all ranks' notes; tell whether something is to be passed on, alike on all ranks."""

    def pass_on(self, filling: Filling) -> None:
        """Exchange it. All ranks call it, after all have filled."""

    def close(self) -> None:
        """Let go of what was opened. May be repeated."""


class StoreSource:
    """A checkpoint. With `may_share` what all ranks want alike is read once."""

    name: Literal["store", "memory"] = "store"

    def __init__(self, store: Store, id_: StepId, *, may_share: bool) -> None:
        self.id = id_
        self._store = store
        self._may_share = may_share

    def open(self) -> Records:
        """See `Source`."""
        return StoreRecords(self._store, read_manifest(self._store, self.id))

    def note(self, filling: Filling) -> str:
        """See `Source`: what is equal on ranks that want the same."""
        return filling.wants if self._may_share else ""

    def hear(self, filling: Filling, notes: Sequence[str]) -> bool:
        """See `Source`."""
        shares = len(set(notes)) == 1 and notes[0] != ""
        if shares:
            filling.share()
        return shares

    def pass_on(self, filling: Filling) -> None:
        """See `Source`."""
        filling.pass_on()

    def close(self) -> None:
        """See `Source`."""


class MemorySource:
    """Snapshots that were never read back from a store."""

    name: Literal["store", "memory"] = "memory"

    def __init__(self, step: HeldStep, site: Site) -> None:
        self.id = StepId.parse(step.id)
        self._step = step
        self._site = site
        self._recalled: Recalled | None = None
        self._notes: Sequence[str] = ()

    def open(self) -> Records:
        """See `Source`."""
        self._recalled = Recalled(self._step, self._site)
        return self._recalled

    def note(self, filling: Filling) -> str:
        """See `Source`: which chunks lie on other machines only."""
        assert self._recalled is not None
        return self._recalled.lacks(filling.fetch.reads)

    def hear(self, filling: Filling, notes: Sequence[str]) -> bool:  # noqa: ARG002 - see `Source`
        """See `Source`."""
        self._notes = notes
        return any(notes)

    def pass_on(self, filling: Filling) -> None:
        """See `Source`."""
        assert self._recalled is not None
        self._recalled.pass_on(self._notes, filling.fetch)

    def close(self) -> None:
        """See `Source`."""
        if self._recalled is not None:
            self._recalled.close()
