"""Saves of one rank: from the state to a snapshot that is handed off."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import msgspec

from ckptd import failpoints
from ckptd.errors import (
    CkptdError,
    ConfigError,
    SaveSkippedError,
    SlotsBusyError,
    StateChangedError,
)
from ckptd.model.checkpoint import Checkpoint
from ckptd.model.keys import StepId
from ckptd.model.tensor import Layout
from ckptd.plan.split import whole_share
from ckptd.trainer.agreement import Agreement
from ckptd.trainer.arguments import check_step
from ckptd.trainer.busy import Decision, Decisions
from ckptd.trainer.deadline import Deadline
from ckptd.trainer.flatten import Flat, flatten
from ckptd.trainer.handle import Handle
from ckptd.trainer.layouts import fingerprint_bytes, layout_of
from ckptd.trainer.link import Link
from ckptd.trainer.options import Options
from ckptd.trainer.overlap import Overlap
from ckptd.trainer.pending import Pending
from ckptd.trainer.snapshots import Captured, Cut, Snapshots
from ckptd.wire import messages as say

log = logging.getLogger("ckptd.trainer")


class _Draft(NamedTuple):
    """A handoff that lacks the slot."""

    handle: Handle
    cut: Cut
    values: bytes
    fingerprints: bytes
    metrics: dict[str, float]
    deadline: Deadline | None


class Saving:
    """Takes snapshots in the order of the steps, and remembers which save nobody was told of.

    All methods belong to the thread that trains.

    Attributes:
        resumed_from: the checkpoint that this attempt goes on from.
        basis: a newer step that it took from memory, which may be committed since.
        count: how many saves there were.
        skipped: how many of them this rank left out because no slot was free, here or on rank 0.
    """

    def __init__(
        self,
        options: Options,
        agreement: Agreement,
        snapshots: Snapshots,
        link: Link,
        decisions: Decisions,
        load: Callable[[int], Checkpoint],
    ) -> None:
        self.resumed_from: StepId | None = None
        self.basis: StepId | None = None
        self.count = 0
        self.skipped = 0
        self._options = options
        self._agreement = agreement
        self._snapshots = snapshots
        self._link = link
        self._decisions = decisions
        self._load = load
        self._overlap = Overlap() if options.overlap else None
        self._flat: Flat | None = None
        self._layout: tuple[object, Layout] | None = None  # with the signature it was made for
        self._handles: list[Handle] = []

    def save(
        self,
        step: int,
        state: Mapping[str, object],
        metrics: dict[str, float],
        *,
        may_skip: bool = True,
        deadline: Deadline | None = None,
    ) -> Handle:
        """Take a snapshot and hand it off; the same handle again for the step just saved.

        Without `may_skip` on rank 0 the save waits for slots even where others would be left out. With
        a `deadline`, which all ranks have then, it is copied at once, and goes ahead of others.

        Raises:
            LayoutError, ConfigError, SlotsBusyError: see `Checkpointer.save`.
            SaveFailedError: the step just saved failed.
        """
        began = time.perf_counter()
        last = self._handles[-1] if self._handles else None
        if last is not None and step == last.step:
            last.raise_again()
            return last
        check_step(step, after=None if last is None else last.step)
        self.settle()
        self.count += 1
        has_daemon = self._options.daemon is not False
        handle = Handle(step, self.count, self._load, has_daemon=has_daemon)
        self._handles.append(handle)
        with self._forfeiting(handle):
            # First of all: the others wait for this, and must not wait for what may raise below.
            if deadline is None or self._decisions.is_own:
                may_skip = may_skip and deadline is None
                is_taken, wait_s = self._decisions.on(handle.sequence, may_skip=may_skip)
            else:  # no rank leaves it out, so none that knows the deadline has to hear rank 0
                is_taken, wait_s = Decision(is_taken=True, wait_s=self._options.busy_timeout_s)
            if is_taken:
                self._snapshot(handle, state, metrics, wait_s, deadline)
            else:
                self._skip(handle)
        handle.pause_s = time.perf_counter() - began
        return handle

    def fence(self) -> None:
        """See `Checkpointer.fence`."""
        if self._overlap is not None:
            self._overlap.fence()

    def settle(self) -> None:
        """Wait until every snapshot is copied and handed off."""
        if self._overlap is not None:
            self._overlap.settle()

    def close(self) -> None:
        """Settle; no optimizer waits for anything any more. May be repeated."""
        if self._overlap is not None:
            self._overlap.close()

    def raise_untold(self, current: Handle | None) -> None:
        """Raise the first failure of an earlier save that nobody was told of; the next one next."""
        told: list[Handle] = []
        found = None
        for handle in self._handles:
            if handle is current or not handle.is_done:
                continue
            told.append(handle)
            error = handle.take_untold_error()
            if error is not None and not isinstance(error, SaveSkippedError):
                found = error
                break
        self._handles = [h for h in self._handles if h not in told or h is self._handles[-1]]
        if found is not None:
            raise found

    # --- one snapshot ----------------------------------------------------------------------------

    def _snapshot(
        self, handle: Handle, state: Mapping[str, object], metrics: dict[str, float], wait_s: float,
        deadline: Deadline | None,
    ) -> None:  # fmt: skip
        flat = self._flat = flatten(
            state, allow_pickle=self._options.allow_pickle, previous=self._flat
        )
        cut, samples = self._cut(flat, handle.sequence)
        values = msgspec.json.encode(flat.values)
        if len(values) > say.MAX_VALUES_BYTES:
            raise ConfigError(
                f"the values of the state are {len(values)} bytes; at most {say.MAX_VALUES_BYTES} "
                "travel: keep large arrays as tensors"
            )
        failpoints.hit("capture.begin")
        if deadline is not None:
            wait_s = min(wait_s, deadline.left_s())
        captured = self._snapshots.capture(
            cut, flat.leaves, step=handle.step, sequence=handle.sequence,
            timeout_s=wait_s, defers=self._overlap is not None and deadline is None,
        )  # fmt: skip
        if captured is None:
            self._busy(handle, wait_s)
            return
        handle.captured_bytes = captured.bytes
        draft = _Draft(handle, cut, values, samples, metrics, deadline)
        if captured.deferred is None or self._overlap is None:
            self._finish(draft, captured)
            return
        handle.defer()
        self._overlap.start(
            captured.deferred, lambda error: self._finish_deferred(draft, captured, error)
        )

    def _cut(self, flat: Flat, sequence: int) -> tuple[Cut, bytes]:
        """Return what this rank writes in this save, and the samples that go with it."""
        signature = flat.signature()
        if self._layout is None or self._layout[0] != signature:
            self._layout = (signature, layout_of(flat))
        layout = self._layout[1]
        samples = None
        if not self._agreement.is_planned:
            samples = fingerprint_bytes(flat.leaves)
        agreed = self._agreement.begin_save(sequence, layout, samples)
        if agreed is not None:
            return self._snapshots.cut(layout, agreed.plan, agreed.share), b""
        if samples is None:
            samples = fingerprint_bytes(flat.leaves)
        return self._snapshots.cut(layout, None, whole_share(layout)), samples

    def _finish(self, draft: _Draft, captured: Captured) -> None:
        """Hand a whole snapshot off; its slot is given back if that fails."""
        try:
            failpoints.hit("capture.done")
            self._hand_off(draft, captured)
        except BaseException:  # not handed off, so nobody else gives the slot back
            captured.pool.release(captured.slot)
            raise

    def _finish_deferred(
        self, draft: _Draft, captured: Captured, error: BaseException | None
    ) -> None:
        """Do the same on the thread that copied, where nobody waits for what it raises."""
        handle = draft.handle
        try:
            with self._forfeiting(handle, is_told=False):
                try:
                    _check_copied(handle.step, captured, error)
                    captured.finish()
                except BaseException:
                    captured.abandon()
                    raise
                self._finish(draft, captured)
        except Exception as failure:  # noqa: BLE001 - the handle has it, and the next `save`
            log.error("step %d was not captured: %s", handle.step, failure)  # noqa: TRY400
        finally:
            handle.captured()

    def _hand_off(self, draft: _Draft, captured: Captured) -> None:
        handle, cut = draft.handle, draft.cut
        previous = self._link.newest or self.resumed_from
        message = say.Handoff(
            step=handle.step, sequence=handle.sequence, arena=captured.arena_number,
            slot=captured.slot.index, generation=captured.generation, recipe=cut.recipe.recipe,
            values=draft.values, fingerprints=draft.fingerprints, metrics=draft.metrics,
            previous=str(previous) if previous else None, captured_at=time.time(),
            basis=str(self.basis) if self.basis and not self._link.newest else None,
            deadline_s=draft.deadline.left_s() if draft.deadline else None,
        )  # fmt: skip
        self._link.submit(
            Pending(
                handle, message, cut.recipe, (captured.arena_number, captured.arena),
                release=lambda: captured.pool.release(captured.slot),
            )
        )  # fmt: skip

    # --- none ------------------------------------------------------------------------------------

    def _skip(self, handle: Handle) -> None:
        """Leave a save out, as all ranks do: no slot is taken, no memory reserved, no layout offered.

        The agreement is not told of it. Its rounds need numbers that grow, and not every number; and
        no plan is used in a save that is left out. A rank that takes it all the same, because it did
        not hear rank 0, makes an offer that never becomes a round, and nobody waits for one.
        """
        self.skipped += 1
        if self._decisions.is_own:
            log.warning("step %d skipped on all ranks: no slot is free", handle.step)
            self._forfeit(handle, "skipped", "no slot was free")  # once for all: the step's record
        else:
            log.info("step %d skipped: rank 0 has no free slot", handle.step)
        reason = f"step {handle.step} is left out on all ranks: rank 0 had no free slot"
        handle.resolve(SaveSkippedError(reason, step=handle.step))

    def _busy(self, handle: Handle, waited_s: float) -> None:
        waited = f"no slot got free in {waited_s:.3g} s"
        if self._options.on_busy == "wait":
            raise SlotsBusyError(
                f"step {handle.step}: {waited}; the store is slower than the job saves: save less "
                "often, give more slots or a longer busy_timeout_s, or set on_busy='skip'"
            )
        self.skipped += 1
        handle.leave_out()
        self._forfeit(handle, "skipped", waited)
        log.warning("step %d skipped, also on ranks that took it: %s here", handle.step, waited)

    def _forfeit(self, handle: Handle, state: Literal["failed", "skipped"], reason: str) -> None:
        message = say.Forfeit(handle.step, handle.sequence, state, reason[:4000])
        self._link.submit(Pending(handle, message))

    @contextmanager
    def _forfeiting(self, handle: Handle, *, is_told: bool = True) -> Iterator[None]:
        """Tell the other ranks when this one raises instead of delivering."""
        try:
            yield
        except BaseException as error:  # an interrupt too: nobody may wait for this rank
            is_ours = isinstance(error, CkptdError)
            self._forfeit(handle, "failed", str(error) if is_ours else repr(error))
            handle.refuse(error, is_told=is_told)
            raise


def _check_copied(step: int, captured: Captured, error: BaseException | None) -> None:
    """Raise what stopped the copy, or what was found out about it."""
    if error is not None:
        raise error
    changed = captured.deferred.changed() if captured.deferred else []
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise StateChangedError(
            f"step {step}: {changed[0]}{more} was changed while it was being copied; call "
            "Checkpointer.fence() before anything but an optimizer's step changes parameters or "
            "optimizer state, or set overlap=False",
            step=step, fqn=changed[0],
        )  # fmt: skip
