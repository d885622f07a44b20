"""One decision for all ranks: which checkpoint, and whether it came back whole.

Rank 0 proposes checkpoints from the newest of the line on. For each, all ranks first check that it
fits (nothing is changed by that), then all fill their objects, then all say how it went. Damage
anywhere sends everyone to the next older checkpoint, which overwrites everything again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

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
from ckptd.pipeline.catalog import find, line, list_commits
from ckptd.pipeline.recover import commit_whole_steps
from ckptd.store.base import Store
from ckptd.store.open import open_store
from ckptd.trainer.filling import Filling, Request, Resumed
from ckptd.trainer.meeting import Meeting

log = logging.getLogger("ckptd.trainer")


class _Proposal(msgspec.Struct):
    """Rank 0's next checkpoint; `id` is None when there is none left, or when it failed to look."""

    id: str | None = None
    kind: str = ""
    reason: str = ""


class _Report(msgspec.Struct):
    """How one phase went on one rank."""

    state: Literal["good", "damaged", "bad"] = "good"
    kind: str = ""
    reason: str = ""
    fqn: str = ""
    note: str = ""


class Root(NamedTuple):
    """Where to look.

    `may_commit`: steps that lack only their manifest are given it first.
    """

    url: str
    storage_options: dict[str, object]
    may_commit: bool


class Resuming:
    """Restores checkpoints of one root into the state of a job; all ranks call `run` alike."""

    def __init__(self, root: Root, meeting: Meeting, timeout_s: float) -> None:
        self._root = root
        self._meeting = meeting
        self._timeout_s = timeout_s
        self._runs = 0
        self._notes: list[str] = []  # of all ranks, from the last phase
        self._shares = False
        self._is_asked: bool | None = None

    def run(
        self, request: Request, step: int | None, *, share_reads: bool | None = None
    ) -> Resumed | None:
        """Fill the request's state from checkpoint `step`, None for the newest whole one.

        With `share_reads` what all ranks want is read once and passed on over the job's process group;
        None: if they are on several nodes. See `Checkpointer.resume`.
        """
        self._is_asked = share_reads
        self._runs += 1
        store = open_store(self._root.url, self._root.storage_options)
        try:
            return self._run(store, request, step)
        finally:
            store.close()

    def _run(self, store: Store, request: Request, step: int | None) -> Resumed | None:
        # Rank 0 looks only when the daemons of all nodes have settled (or their ranks gave up).
        self._meeting.gather(f"resume/{self._runs}/settled", b"", self._timeout_s)
        candidates: Iterator[StepId] = iter(())
        if self._meeting.rank == 0:
            candidates = _candidates(store, step, may_commit=self._root.may_commit)
        damages: list[str] = []
        is_torn = False
        turn = 0
        while True:
            turn += 1
            id_ = self._agree_on(candidates, turn)
            if id_ is None:
                _none_left(damages, step, is_torn=is_torn)
                return None
            filling = Filling(store, request)
            problem = self._check(filling, id_, turn, is_torn=is_torn)
            if problem is None:
                is_torn = True
                problem = self._change(f"{turn}/fill", filling.fill)
            if problem is None and self._shares:
                problem = self._change(f"{turn}/pass", filling.pass_on)
            if problem is None:
                problem = self._change(f"{turn}/finish", filling.finish)
            if problem is None:
                return filling.resumed()
            damages.append(problem)
            log.error(
                "checkpoint %s is NOT WHOLE, looking for an older one: %s", id_.short, problem
            )

    def _check(self, filling: Filling, id_: StepId, turn: int, *, is_torn: bool) -> str | None:
        def check() -> str:
            filling.check(id_)
            return filling.wants if self._may_share() else ""

        try:
            problem = self._phase(f"{turn}/check", check)
            self._shares = problem is None and len(set(self._notes)) == 1 and self._notes[0] != ""
            if self._shares:
                filling.share()
            return problem
        except LayoutError as error:
            if not is_torn:
                raise
            raise TornRestoreError(
                "the live objects were changed half from a newer checkpoint that turned out damaged, "
                f"and {id_.short} does not fit: do not use them, start the process again. {error}"
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

    def _agree_on(self, candidates: Iterator[StepId], turn: int) -> StepId | None:
        topic = f"resume/{self._runs}/{turn}"
        if self._meeting.rank == 0:
            proposal = _propose(candidates)
            self._meeting.announce(topic, msgspec.json.encode(proposal))
        else:
            answer = self._meeting.hear(topic, self._timeout_s)
            proposal = msgspec.json.decode(answer, type=_Proposal)
        if proposal.kind:
            raise _error(proposal.kind, f"rank 0 could not look: {proposal.reason}")
        return StepId.parse(proposal.id) if proposal.id is not None else None

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


def _candidates(store: Store, step: int | None, *, may_commit: bool) -> Iterator[StepId]:
    """Yield the checkpoints to try: the newest of the line, then back; or just `step`."""
    if may_commit:
        commit_whole_steps(store)
    if step is None:
        has_any = False
        for manifest in line(store):
            has_any = True
            yield manifest.id
        if not has_any and list_commits(store):
            raise CorruptError("there are checkpoints but no manifest can be read", key=store.url)
        return
    # Be it damaged, that is for `check` to say; whoever names a step wants that one or an error.
    yield find(store, step).id


def _propose(candidates: Iterator[StepId]) -> _Proposal:
    try:
        id_ = next(candidates, None)
    except CkptdError as error:
        return _Proposal(kind=type(error).__name__, reason=str(error))
    except Exception as error:
        log.exception("looking for checkpoints failed")
        return _Proposal(kind=CkptdError.__name__, reason=repr(error))
    return _Proposal(id=str(id_) if id_ is not None else None)


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
