"""What a training script holds: saves, resumes, and waits."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Literal

import torch

from ckptd import failpoints
from ckptd.errors import ConfigError, LayoutError, SaveUnknownError
from ckptd.model.checkpoint import Checkpoint
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import describe, list_checkpoints
from ckptd.store.open import normalise_url, open_store
from ckptd.trainer.agreement import Agreement
from ckptd.trainer.arguments import numbers_of
from ckptd.trainer.attempts import start_attempt
from ckptd.trainer.busy import Decisions
from ckptd.trainer.deadline import Deadline, wait_committed
from ckptd.trainer.filling import Request, Resumed
from ckptd.trainer.flatten import check_state
from ckptd.trainer.handle import Handle
from ckptd.trainer.link import Link
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.options import Options
from ckptd.trainer.ports import hello_of, is_daemon_there, open_port
from ckptd.trainer.preempting import Preemption, Sources
from ckptd.trainer.preparing import Preparation
from ckptd.trainer.proposals import Root
from ckptd.trainer.recall import Recall
from ckptd.trainer.resuming import Resuming
from ckptd.trainer.saving import Saving
from ckptd.trainer.snapshots import Snapshots
from ckptd.trainer.stepping import Metrics, Stepping
from ckptd.trainer.terms import MapLocation, Rename, Terms

log = logging.getLogger("ckptd.trainer")


class Checkpointer:
    """Checkpoints of one job in one root. Made on every rank, in the same order on all.

    Under torch.distributed, make it after ``init_process_group``; each rank waits for the others.
    Methods belong to the thread that trains, handles to any; a forked child must not use it.

    Args:
        url: a folder that every rank sees, ``s3://bucket/path`` or another URL; ``memory://name`` for tests, with
            ``daemon=False``.
        daemon: True finds or starts the daemon of this user and root on this node (or uses
            ``$CKPTD_SOCKET``); a path is the socket of one that runs as a service; False does its
            work on threads of this process, which die with it.
        compression: ``auto`` leaves raw what does not shrink; ``zstd`` always tries; ``none``.
        on_busy: what a save does for which no slot is free, because the store is slower than the
            job saves: ``wait`` waits for one, up to `busy_timeout_s`, and then raises
            `SlotsBusyError`; ``skip`` waits for nothing and leaves the save out, on all ranks alike,
            where rank 0 has no slot. Then the handle has a `SaveSkippedError`, and nothing raises it
            but the handle. A save with ``wait=True`` or a deadline waits for a slot all the same.
        busy_timeout_s: the longest that a save may wait for a slot, and with ``skip`` on other ranks
            than 0 for rank 0's word and a slot together; also how long a snapshot may wait for a
            daemon.
        slots: snapshots that fit in shared memory; ``auto`` is two where memory allows, else one.
        storage_options: settings of the store; kept in memory, never logged.
        commit_timeout_s: how long a step may wait for the slowest rank before it is given up.
        meeting_timeout_s: how long ranks wait for each other at the start and in `resume`.
        allow_pickle: store values that have no safe form as marked pickles.
        overlap: let `save` return before parameters and optimizer state are copied; the copy runs
            beside the next forward and backward pass, and every optimizer's ``step`` waits for it.
            Whatever else writes to them must call `fence` first.
        stop_signals: which signals `preempted` takes for a warning; handlers that they have are called
            afterwards.

    Raises:
        ConfigError: the arguments, the root or the job cannot work; the message says what to do.
        StoreError: the root cannot be reached, read or written.
        MeetingError: the ranks did not meet.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings, each with a default that works
        self,
        url: str | os.PathLike[str],
        *,
        daemon: bool | str = True,
        compression: Literal["auto", "zstd", "none"] = "auto",
        on_busy: Literal["wait", "skip"] = "wait",
        busy_timeout_s: float = 60.0,
        slots: int | Literal["auto"] = "auto",
        storage_options: dict[str, object] | None = None,
        commit_timeout_s: float = 600.0,
        meeting_timeout_s: float = 300.0,
        allow_pickle: bool = False,
        overlap: bool = False,
        stop_signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
    ) -> None:
        self.options = Options(
            normalise_url(os.fspath(url)), daemon, compression, on_busy, busy_timeout_s, slots,
            storage_options or {}, commit_timeout_s, meeting_timeout_s, allow_pickle, overlap,
            stop_signals,
        )  # fmt: skip
        self.options.check()
        self.options.check_daemon(os.environ)
        sources = Sources.of(stop_signals, os.environ)
        failpoints.arm(os.environ.get("CKPTD_FAILPOINTS", ""))
        self._pid = os.getpid()
        self._meeting = Meeting.of_job(self.options.url, meeting_timeout_s)
        store = open_store(self.options.url, self.options.storage_options)
        try:
            self.attempt = start_attempt(store, self._meeting, meeting_timeout_s)
        finally:
            store.close()
        self._preemption = Preemption(self._meeting, sources)
        self._agreement = Agreement(self._meeting, self.options.chunk_bytes)
        self._snapshots = Snapshots(
            slots=slots, local_ranks=self._meeting.local_world_size,
            is_shared=daemon is not False, chunk_bytes=self.options.chunk_bytes,
        )  # fmt: skip
        self._link = Link(
            partial(open_port, self.options), hello_of(self.options, self._meeting, self.attempt),
            # An engine in this process is there; only a daemon may have to be found.
            give_up_s=busy_timeout_s if daemon is not False else commit_timeout_s,
            on_stop=self._preemption.notify,
        )  # fmt: skip
        self._preparation = Preparation(self.options, self._agreement, self._snapshots)
        root = Root(self.options.url, self.options.storage_options, may_commit=True)
        self._resuming = Resuming(root, self._meeting, meeting_timeout_s)
        decisions = Decisions(self._meeting, self.options, self._snapshots.has_room)
        self._saving = Saving(
            self.options, self._agreement, self._snapshots, self._link, decisions, self._load
        )
        self._state: Mapping[str, object] | None = None  # what `steps` saves, and after which step
        self._resumed_step: int | None = None
        self._is_closed = False
        atexit.register(self._at_exit)

    # --- saving --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, object],
        *,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
        deadline_s: float | None = None,
    ) -> Handle:
        """Copy the state and go on training; the daemon makes it durable.

        Every rank calls it with the same step. Steps only grow; saving the step just saved returns
        the same handle, or raises if that save failed: a step is saved once in an attempt. With
        `wait`, return only after the commit, or raise after `deadline_s`.

        `deadline_s`, on all ranks or on none, is what is left until the machine goes. The snapshot
        is copied at once and goes ahead of all others, and `save` waits for the commit. When the time
        is up it returns all the same: `Handle.status` and the log say what is known. Once `preempted`
        has returned True, it is by default what is left of ``$CKPTD_GRACE_S``.

        Raises:
            LayoutError: the state cannot be stored; nothing was, and the other ranks hear of it.
            SlotsBusyError: no slot got free in time (``on_busy="wait"``).
            SaveUnknownError: not committed within `deadline_s`, with `wait`.
            CkptdError: why an *earlier* save failed, once. This one was handed off all the same, so
                that ranks which hear of a failure at different steps stay in step.
        """
        self._check_usable()
        limit_s = self._preemption.grace_left_s() if self._preemption.is_stopping else None
        limit_s = limit_s if deadline_s is None else deadline_s
        deadline = None if limit_s is None else Deadline(limit_s)
        handle = self._saving.save(
            step, state, numbers_of(metrics or {}), may_skip=not wait, deadline=deadline
        )
        if wait and deadline_s is None:
            handle.wait_committed()
        elif deadline is not None:
            wait_committed(handle, deadline, must=wait)
        self._saving.raise_untold(handle)
        return handle

    def fence(self) -> None:
        """Wait until parameters and optimizer state may be changed after a `save` with ``overlap``.

        Every ``step`` of an optimizer does it by itself. Call it before anything else writes to
        them: swapping in averaged weights, clamping, a replayed CUDA graph. On CUDA the current
        stream waits, and not the caller. Without ``overlap``, or with nothing to wait for, it
        returns at once. For any thread.
        """
        self._saving.fence()

    def prepare(self, state: Mapping[str, object]) -> None:
        """Reserve slots for this state and agree with the other ranks who writes what.

        Returns at once; a thread does it while training begins. `resume` calls it. Without it the
        first saves cost more, and every rank writes all it holds.

        Raises:
            LayoutError: the state cannot be stored.
        """
        self._check_usable()
        self._state = state
        self._preparation.start(state)
        self._link.begin()

    # --- resuming ------------------------------------------------------------------------------

    def resume(  # noqa: PLR0913 - one keyword for each choice
        self,
        state: Mapping[str, object],
        *,
        step: int | None = None,
        strict: bool = True,
        rename: Rename | None = None,
        map_location: MapLocation = None,
        select: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        trust_pickle: bool = False,
        share_reads: bool | None = None,
    ) -> Resumed | None:
        """Fill the live objects of `state` from the newest whole checkpoint, on all ranks alike.

        Every rank calls it, once, before the first save. None if the root holds no checkpoint yet.
        What all ranks want is read once and passed on over the job's process group where they are on
        several nodes, or as `share_reads` says, alike on all ranks.
        `trust_pickle` opens stored pickles, which can run any code.

        Raises:
            LayoutError: state and checkpoint do not fit; nothing was changed.
            CorruptError: `step` was named and is damaged, or no checkpoint can be read at all.
            CheckpointError: there are checkpoints, but none is whole; nothing was changed.
            TornRestoreError: none is whole, and the objects were changed half: do not use them.
            StoreError: the store did not answer; that is never taken for "no checkpoint".
            MeetingError: some rank did not come.
        """
        self._check_usable()
        check_state(state)
        terms = Terms(strict, rename, map_location, trust_pickle, select, dtype)
        terms.check()
        if self._saving.count:
            raise ConfigError("resume comes before the first save of a Checkpointer")
        link = self._link if is_daemon_there(self.options) else None
        recall = Recall(link, self.options.settle_timeout_s, self.attempt.ordinal)
        request = Request(state, terms, self._meeting.rank, self._meeting.world_size)
        resumed = self._resuming.run(request, step, share_reads=share_reads, recall=recall)
        self._saving.resumed_from = self._resuming.line
        self._saving.basis = self._resuming.basis
        self._resumed_step = None if resumed is None else resumed.step
        if link is not None:
            self._preparation.heir_of(self._link)
        try:
            self.prepare(state)
        except LayoutError as error:  # what was restored is restored; the first save raises this
            log.warning("nothing could be prepared for the first save: %s", error)
        return resumed

    # --- being told to stop --------------------------------------------------------------------

    def preempted(self) -> bool:
        """Tell whether the job is to stop here: on every rank True at the same call, and from then on.

        Every rank calls it once per step, with the same calls before. The first call takes the
        `stop_signals` over, until `close`: make one before the first step compiles for minutes. A
        warning to one rank is one to all: a signal, the file ``$CKPTD_STOP_FILE``, `ckptd preempt`,
        `notify_preemption`. It is remembered, whatever the job does at that moment. Without one a
        call costs about a microsecond; after one it may wait some seconds for the other ranks.
        """
        return self._preemption.ask()

    def notify_preemption(self, reason: str = "notify_preemption was called") -> None:
        """Let all ranks stop, as a signal does. For any thread, and where no signal is heard."""
        self._preemption.notify(reason)

    def steps(
        self,
        steps: Iterable[int],
        state: Mapping[str, object] | None = None,
        *,
        every: int | None = None,
        metrics: Metrics | None = None,
    ) -> Iterator[int]:
        """Give the steps that are left, for a loop whose body is one step; save, and stop when told.

        ``for step in ckpt.steps(range(1, 1001), every=100):`` on every rank alike. Steps up to the
        one that was resumed are left out. After the body, if the job is preempted, the step is saved
        and the loop ends, once it is committed or the grace is over. With `every`, multiples of it
        and the last step are saved too. The state is by default what was given to `resume` or
        `prepare`; `metrics` is called at each save, for what goes with it.

        Raises:
            ConfigError: there is no state, or `every` is no number of steps.
            CkptdError: as `save`.
        """
        self._check_usable()
        held = self._state if state is None else state
        if held is None:
            raise ConfigError("steps() needs a state: give it, or call resume() with it before")
        stepping = Stepping(self._preemption, partial(self.save, state=held), every, metrics)
        self._preemption.begin()
        return stepping.walk(steps, self._resumed_step)

    # --- the rest ------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """Return what is committed in the root, newest first."""
        store = open_store(self.options.url, self.options.storage_options)
        try:
            return list_checkpoints(store)
        finally:
            store.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every save has its final word; False if not in time.

        Raises:
            CkptdError: why one of them failed, if nobody was told of it yet.
        """
        self._saving.settle()
        is_done = self._link.wait(timeout_s)
        self._saving.raise_untold(None)
        return is_done

    def close(self) -> None:
        """Wait for the final word on every save, and leave. May be repeated.

        After `preempted` returned True it waits no longer than the grace; what is not known then is
        only logged, and the newest snapshots stay in memory for the next start.

        Raises:
            CkptdError: why a save failed, if nobody was told of it yet.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        self._saving.settle()
        limit_s, is_stopping = self.options.commit_timeout_s + 60.0, self._preemption.is_stopping
        if is_stopping:
            limit_s = min(limit_s, self._preemption.grace_left_s())
        self._link.wait(limit_s)
        self._leave(keeps=is_stopping)
        try:
            self._saving.raise_untold(None)
        except SaveUnknownError as error:
            if not is_stopping:
                raise
            log.warning("%s", error)

    def __enter__(self) -> Checkpointer:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if kind is None:
            self.close()
        else:
            # The daemon finishes what it has; another error must not hide the one under way.
            self._leave(keeps=True)

    # --- inside --------------------------------------------------------------------------------

    def _load(self, step: int) -> Checkpoint:
        store = open_store(self.options.url, self.options.storage_options)
        try:
            return describe(store, StepId(attempt=self.attempt.ordinal, step=step))
        finally:
            store.close()

    def _check_usable(self) -> None:
        if self._is_closed:
            raise ConfigError("this Checkpointer is closed; make a new one")
        if os.getpid() != self._pid:
            raise ConfigError("a Checkpointer belongs to the process that made it, not to a fork")

    def _leave(self, *, keeps: bool = False) -> None:
        """Go; with `keeps` the daemon holds the newest snapshots for the next start."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        atexit.unregister(self._at_exit)
        self._preemption.close()
        self._saving.close()
        self._agreement.close()
        self._link.close(keeps=keeps)
        self._snapshots.close()
        self._preparation.join()
        self._meeting.close()

    def _at_exit(self) -> None:
        """Hand off what waits, when the script ends without `close`, by an error perhaps."""
        self._leave(keeps=getattr(sys, "last_value", None) is not None)
