"""One decision for all ranks: which checkpoint, and whether it came back whole.

Rank 0 proposes what living daemons hold, as far as it is not older than the newest checkpoint; then
checkpoints from the newest of the line on. For each, all ranks first check that it
fits (nothing is changed by that), then all fill their objects, then all say how it went. Damage
anywhere sends everyone to the next older checkpoint, which overwrites everything again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec

from ckptd import errors
from ckptd.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CkptdError,
    CorruptError,
    LayoutError,
    StoreError,
    TornRestoreError,
)
from ckptd.model.keys import StepId
from ckptd.model.ready import make_ready
from ckptd.store.base import Store
from ckptd.store.open import open_store
from ckptd.trainer.filling import Filling, Request, Resumed
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.proposals import Looking, Proposal, Root, next_proposal
from ckptd.trainer.recall import Recall, Sighting
from ckptd.trainer.recalled import Site
from ckptd.trainer.sources import MemorySource, Source, StoreSource

log = logging.getLogger("ckptd.trainer")


class _Report(msgspec.Struct):
    """How one phase went on one rank."""

    state: Literal["good", "damaged", "bad"] = "good"
    kind: str = ""
    reason: str = ""
    fqn: str = ""
    note: str = ""


make_ready(_Report)


class Resuming:
    """Restores checkpoints of one root into the state of a job; all ranks call `run` alike.

    Attributes:
        line: after `run`, the newest checkpoint of the line that the job goes on with.
        basis: the step that was taken from memory and may not be committed yet.
    """

    def __init__(self, root: Root, meeting: Meeting, timeout_s: float) -> None:
        self.line: StepId | None = None
        self.basis: StepId | None = None
        self._root = root
        self._meeting = meeting
        self._timeout_s = timeout_s
        self._runs = 0
        self._notes: list[str] = []  # of all ranks, from the last phase
        self._is_torn = False
        self._is_asked: bool | None = None

    def run(
        self,
        request: Request,
        step: int | None,
        *,
        share_reads: bool | None = None,
        recall: Recall | None = None,
    ) -> Resumed | None:
        """Fill the request's state from checkpoint `step`, None for the newest whole one.

        With `share_reads` what all ranks want is read once and passed on over the job's process group;
        None: if they are on several nodes. With `recall` what the daemons hold is looked at first,
        unless a step is named. See `Checkpointer.resume`.
        """
        self._is_asked = share_reads
        self._is_torn = False
        self._runs += 1
        store = open_store(self._root.url, self._root.storage_options)
        try:
            return self._run(store, request, step, recall)
        finally:
            store.close()

    def _run(
        self, store: Store, request: Request, step: int | None, recall: Recall | None
    ) -> Resumed | None:
        sightings = self._sightings(recall)
        looking = Looking(self._root, self._meeting.world_size, step, sightings)
        has_memory = step is None and any(sighting.rows for sighting in sightings)
        proposals: Iterator[Proposal] = iter(())
        if self._meeting.rank == 0:
            proposals = looking.proposals(store, has_memory=has_memory, recall=recall)
        if not has_memory:
            self._settle(recall)
        damages: list[str] = []
        turn = 0
        while True:
            turn += 1
            proposal = self._agree_on(proposals, turn)
            if proposal.settles:
                self._settle(recall)
                continue
            if proposal.id is None and proposal.held is None:
                _none_left(damages, step, is_torn=self._is_torn)
                return None
            source = self._source(store, proposal, sightings, recall, turn)
            try:
                filling, problem = self._fill(source, request, turn)
                if problem is None:
                    self._note_line(proposal, source.id)
                    return filling.resumed(source.name)
            finally:
                source.close()
            if source.name == "store" or self._is_torn:  # what memory has lost is no damage yet
                damages.append(problem)
            log.error(
                "%s %s is NOT WHOLE, looking for an older one: %s",
                "checkpoint" if source.name == "store" else "in memory, step",
                source.id.short, problem,
            )  # fmt: skip

    def _sightings(self, recall: Recall | None) -> list[Sighting]:
        sighting = recall.sighting if recall is not None else Sighting()
        answers = self._meeting.gather(
            f"resume/{self._runs}/held", msgspec.msgpack.encode(sighting), self._timeout_s
        )
        return [msgspec.msgpack.decode(answer, type=Sighting) for answer in answers]

    def _settle(self, recall: Recall | None) -> None:
        """Let the daemons of all nodes settle (or their ranks give up) before rank 0 looks."""
        if recall is not None:
            recall.settle()
        self._meeting.gather(f"resume/{self._runs}/settled", b"", self._timeout_s)

    def _source(
        self,
        store: Store,
        proposal: Proposal,
        sightings: Sequence[Sighting],
        recall: Recall | None,
        turn: int,
    ) -> Source:
        if proposal.held is None:
            assert proposal.id is not None
            return StoreSource(store, StepId.parse(proposal.id), may_share=self._may_share())
        topic = f"resume/{self._runs}/{turn}/held"
        site = Site(
            recall or Recall(None, 0.0), sightings, self._meeting, store, topic, self._timeout_s
        )
        return MemorySource(proposal.held, site)

    def _fill(self, source: Source, request: Request, turn: int) -> tuple[Filling, str | None]:
        filling = Filling(source.open, request)
        problem = self._check(filling, source, turn)
        if problem is None:
            passes = source.hear(filling, self._notes)
            self._is_torn = True
            problem = self._change(f"{turn}/fill", filling.fill)
            if problem is None and passes:
                problem = self._change(f"{turn}/pass", lambda: source.pass_on(filling))
            if problem is None:
                problem = self._change(f"{turn}/finish", filling.finish)
        return filling, problem

    def _note_line(self, proposal: Proposal, id_: StepId) -> None:
        self.line, self.basis = id_, None
        if proposal.held is not None and not proposal.held.is_committed:
            self.line = StepId.parse(proposal.before) if proposal.before is not None else None
            self.basis = id_

    def _check(self, filling: Filling, source: Source, turn: int) -> str | None:
        def check() -> str:
            filling.check()
            return source.note(filling)

        try:
            return self._phase(f"{turn}/check", check)
        except LayoutError as error:
            if not self._is_torn:
                raise
            raise TornRestoreError(
                "the live objects were changed half from a newer checkpoint that turned out damaged, "
                f"and {source.id.short} does not fit: do not use them, start the process again. {error}"
            ) from error

    def _may_share(self) -> bool:
        """Tell whether links between ranks are worth it: one node's ranks share the page cache."""
        meeting = self._meeting
        if meeting.world_size == 1 or self._is_asked is False:
            return False
        return self._is_asked is True or meeting.local_world_size < meeting.world_size

    def _change(self, name: str, work: Callable[[], None]) -> str | None:
        """Do a phase that changes the live objects: whatever stops it leaves them half changed."""
        try:
            return self._phase(name, work)
        except Exception as error:
            raise TornRestoreError(
                "restoring stopped while the live objects were being changed: do not use them, start "
                f"the process again. {error}"
            ) from error

    def _agree_on(self, proposals: Iterator[Proposal], turn: int) -> Proposal:
        topic = f"resume/{self._runs}/{turn}"
        if self._meeting.rank == 0:
            proposal = next_proposal(proposals)
            self._meeting.announce(topic, msgspec.json.encode(proposal))
        else:
            answer = self._meeting.hear(topic, self._timeout_s)
            proposal = msgspec.json.decode(answer, type=Proposal)
        if proposal.kind:
            raise _error(proposal.kind, f"rank 0 could not look: {proposal.reason}")
        return proposal

    def _phase(self, name: str, work: Callable[[], str | None]) -> str | None:
        """Do something on every rank; return what is damaged, raise what else went wrong."""
        error: Exception | None = None
        note = ""
        try:
            note = work() or ""
        except Exception as caught:  # noqa: BLE001 - the other ranks must not wait for this one
            error = caught
        report = _report(error)
        report.note = note
        answers = self._meeting.gather(
            f"resume/{self._runs}/{name}",
            msgspec.json.encode(report),
            self._timeout_s,
        )
        reports = [msgspec.json.decode(answer, type=_Report) for answer in answers]
        self._notes = [other.note for other in reports]
        if report.state == "bad":
            assert error is not None
            raise error
        for rank, other in enumerate(reports):
            if other.state == "bad":
                raise _error(other.kind, f"rank {rank}: {other.reason}", other.fqn)
        damaged = [f"rank {r}: {o.reason}" for r, o in enumerate(reports) if o.state == "damaged"]
        return "; ".join(damaged) or None


def _none_left(damages: list[str], step: int | None, *, is_torn: bool) -> None:
    if is_torn and damages:
        raise TornRestoreError(
            "no whole checkpoint is left and the live objects were changed half: do not use them, "
            "start the process again. " + " | ".join(damages)
        )
    if damages and step is not None:
        raise CorruptError(
            f"step {step} is damaged; `ckptd ls` shows others. {damages[0]}", step=step
        )
    if damages:
        raise CorruptError(
            "there are checkpoints but none is whole; to start anew, use another root. "
            + " | ".join(damages)
        )


def _report(error: Exception | None) -> _Report:
    if error is None:
        return _Report()
    if not isinstance(error, CkptdError):
        return _Report("bad", CkptdError.__name__, repr(error))
    state: Literal["damaged", "bad"] = "bad"
    if isinstance(error, (CorruptError, CheckpointNotFoundError)):
        state = "damaged"
    fqn = error.fqn if isinstance(error, LayoutError) else ""
    return _Report(state, type(error).__name__, str(error), fqn)


def _error(kind: str, reason: str, fqn: str = "") -> CkptdError:
    """Rebuild an error that another rank met."""
    found = errors.class_named(kind)
    if issubclass(found, StoreError):
        return found("", reason)
    if issubclass(found, LayoutError):
        return found(reason, fqn=fqn)
    if issubclass(found, CorruptError) or not issubclass(found, CheckpointError):
        return found(reason)
    return found(reason) if found is not errors.IncompleteError else CheckpointError(reason)
