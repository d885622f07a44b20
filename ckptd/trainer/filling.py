"""One rank's part of restoring a checkpoint: check that it fits, fill, finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ckptd.errors import LayoutError
from ckptd.model.manifest import Tree
from ckptd.trainer.fetching import Fetch, Records
from ckptd.trainer.flatten import survey
from ckptd.trainer.inheritance import Heir, Inheritance
from ckptd.trainer.passing import Passing, digest_of, may_pass
from ckptd.trainer.rebuild import RestorePlan, Restorer
from ckptd.trainer.terms import Terms

log = logging.getLogger("ckptd.trainer")


class Resumed(NamedTuple):
    """What was restored.

    `values` are the entries of the state that are plain values, as they were saved. `source` says
    where the bytes came from: ``store``, or ``memory`` of the daemons. With ``strict=False``, `missing` are names that the state
    wanted and the checkpoint did not hold; `unused` are names that it held and nobody wanted.
    `surplus` lists, on every rank, what ranks that there are no more kept for themselves, as ``name@rank``;
    generators that went by stream may live on under another rank.
    """

    step: int
    attempt: int
    metrics: dict[str, float]
    values: dict[str, Any]
    source: Literal["store", "memory"]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    surplus: tuple[str, ...]


class Request(NamedTuple):
    """What to fill, on what terms, and as which rank of how many."""

    state: Mapping[str, object]
    terms: Terms
    rank: int
    world_size: int


Open = Callable[[], Records]
"""Opens what a state is filled from. Raises CorruptError if it is damaged, StoreError."""


class Filling:
    """Call `check`, `share` if all want the same, `fill`, `pass_on` and `finish`, on one thread.

    Reads run on threads of their own.
    """

    def __init__(self, open_records: Open, request: Request) -> None:
        self._open = open_records
        self._request = request
        self._records: Records | None = None
        self._plan: RestorePlan | None = None
        self._fetch: Fetch | None = None
        self._passing: Passing | None = None
        self._values: dict[str, Tree] = {}
        self._restored: dict[str, Any] = {}
        self._surplus: tuple[str, ...] = ()

    def check(self) -> None:
        """Read the records and make sure that everything wanted is there. Changes nothing.

        Raises:
            LayoutError: state and checkpoint do not fit.
            CorruptError: a record is damaged or missing.
            StoreError: the store did not answer.
        """
        request = self._request
        records = self._records = self._open()
        manifest = records.manifest
        own = records.of(min(request.rank, manifest.world_size - 1))
        surveyed = survey(request.state)
        heir = Heir(request.state, surveyed, request.rank, request.world_size, request.terms)
        inheritance = Inheritance(heir, manifest, own, records.read)
        self._values = inheritance.choose()
        self._surplus = inheritance.surplus
        tensors = {tensor.fqn: tensor for tensor in manifest.tensors}
        restorer = Restorer(request.state, request.terms, surveyed)
        self._plan = restorer.wanted(tensors, manifest.aliases, {**own.values, **self._values})
        if request.terms.select is not None and self._plan.is_nothing_wanted:
            message = f"select={request.terms.select!r} fits no name in the state"
            if request.world_size == 1:
                raise LayoutError(message)
            log.warning("%s of rank %d", message, request.rank)
        self._fetch = Fetch(records, request.rank, request.world_size, self._plan.fills)

    @property
    def fetch(self) -> Fetch:
        """What is read, after `check`."""
        assert self._fetch is not None
        return self._fetch

    @property
    def wants(self) -> str:
        """What is equal on ranks that want the same and can pass it on; empty: this rank cannot."""
        assert self._plan is not None
        targets, world_size = self._plan.targets, self._request.world_size
        return digest_of(targets) if targets and may_pass(targets, world_size) else ""

    def share(self) -> None:
        """From here on read only this rank's part of what all ranks want; `pass_on` gets the rest."""
        assert self._plan is not None
        request = self._request
        self._passing = Passing(self._plan.targets, request.rank, request.world_size)

    def fill(self) -> None:
        """Read everything into the live tensors, or this rank's part of it.

        Raises:
            CorruptError: a chunk is damaged; the objects are changed half.
            StoreError: the store did not answer; the objects are changed half.
        """
        assert self._fetch is not None
        self._fetch.run(None if self._passing is None else self._passing.own)

    def pass_on(self) -> None:
        """Exchange what ranks have read. All of them call it, after all have said that they have."""
        if self._passing is not None:
            self._passing.run()

    def finish(self) -> None:
        """Give optimizers, schedulers, values and generators their state."""
        assert self._plan is not None
        self._restored = self._plan.finish(self._values)

    def resumed(self, source: Literal["store", "memory"]) -> Resumed:
        """Return what `resume` returns."""
        assert self._records is not None
        assert self._plan is not None
        found = self._records.manifest
        return Resumed(
            found.step, found.attempt, found.numbers, self._restored,
            source, tuple(self._plan.missing), tuple(self._plan.unused), self._surplus,
        )  # fmt: skip
