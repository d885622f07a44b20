"""What `save` returns: a view of one save until its final word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from ckptd import errors
from ckptd.errors import (
    CheckpointError,
    CkptdError,
    IncompleteError,
    LayoutError,
    SaveFailedError,
    SaveSkippedError,
    SaveUnknownError,
)
from ckptd.model.checkpoint import Checkpoint
from ckptd.wire.messages import Finished

Status = Literal[
    "capturing", "captured", "handed_off", "committed", "failed", "skipped", "unknown"
]  # fmt: skip


class Handle:
    """One save of one rank. All methods may be called from any thread.

    `has_daemon` False says that this process itself does what a daemon would.

    Attributes:
        step: the trainer's counter.
        sequence: the number of this save within the attempt, from 1.
        pause_s: how long `save` kept the calling thread, in seconds.
        captured_bytes: what this rank copied into its slot.
    """

    def __init__(
        self,
        step: int,
        sequence: int,
        load: Callable[[int], Checkpoint],
        *,
        has_daemon: bool = True,
    ) -> None:
        self.step = step
        self.sequence = sequence
        self.pause_s = 0.0
        self.captured_bytes = 0
        self._load = load
        self._has_daemon = has_daemon
        self._error: CkptdError | None = None
        self._is_told = False
        self._done = threading.Event()
        self._captured = threading.Event()
        self._captured.set()
        self._is_taken = False
        self._is_left_out = False

    def __repr__(self) -> str:
        if not self.is_done:
            return f"Handle(step={self.step}, pending)"
        return f"Handle(step={self.step}, {f'failed: {self._error}' if self._error else 'durable'})"

    @property
    def is_done(self) -> bool:
        """Tell whether the final word is known."""
        return self._done.is_set()

    @property
    def status(self) -> Status:
        """How far the save is, as far as this process knows.

        ``capturing``: the state is being copied (with ``overlap``). ``captured``: the snapshot is in
        shared memory, and no daemon has said that it has it; if this process dies now, it may be
        lost. ``handed_off``: a daemon has it and goes on, whatever becomes of this process. The rest
        is final: ``committed``, ``failed``, ``skipped``, or ``unknown``, where nobody could find out
        whether it was committed.
        """
        if self._done.is_set():
            return _final_status(self._error)
        if self._is_left_out:
            return "skipped"
        if not self._captured.is_set():
            return "capturing"
        return "handed_off" if self._is_taken else "captured"

    @property
    def whereabouts(self) -> str:
        """What `status` means, in words, as long as it is not final."""
        status = self.status
        if status == "capturing":
            return "the state is still being copied"
        if status == "captured":
            return "no daemon has taken the snapshot" if self._has_daemon else "nobody has taken it"
        if status == "handed_off" and self._has_daemon:
            return "the daemon has the snapshot and goes on"
        if status == "handed_off":
            return "this process still stores the snapshot, and has to live until then"
        return f"it is {status}"

    def wait_captured(self, timeout_s: float | None = None) -> bool:
        """Wait until the snapshot is copied and handed off; False if not in time.

        Without ``overlap`` that is so when `save` returns. With it, the state may be changed
        earlier, after `Checkpointer.fence`.
        """
        return self._captured.wait(timeout_s)

    def wait_committed(self, timeout_s: float | None = None) -> bool:
        """Wait for the commit; False if there is no final word in time.

        Raises:
            CkptdError: why the step is not committed and never will be.
        """
        if not self._done.wait(timeout_s):
            return False
        if self._error is not None:
            self._is_told = True
            raise self._error
        return True

    def result(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait for the commit and return the checkpoint as it stands in the store.

        Raises:
            SaveUnknownError: the final word was not known in time; the step may still be committed.
            CkptdError: why the step is not committed and never will be.
        """
        if not self.wait_committed(timeout_s):
            raise SaveUnknownError(
                f"step {self.step}: no final word within {timeout_s} s; {self.whereabouts}",
                step=self.step,
            )
        return self._load(self.step)

    def taken(self, *, is_taken: bool = True) -> None:
        """Note that a daemon has the snapshot, or that it is gone, and has not stored it."""
        self._is_taken = is_taken

    def leave_out(self) -> None:
        """Note that there is no snapshot; the final word comes once the other ranks cannot commit."""
        self._is_left_out = True

    def defer(self) -> None:
        """Let `wait_captured` wait until `captured`."""
        self._captured.clear()

    def captured(self) -> None:
        """Note that the copy is over, for good or ill."""
        self._captured.set()

    def resolve(self, error: CkptdError | None) -> None:
        """Set the final word; the first one stands."""
        if not self._done.is_set():
            self._error = error
            self._done.set()

    def raise_again(self) -> None:
        """Raise if this save failed, whoever was told of it before.

        Raises:
            SaveFailedError: with the reason.
        """
        if self._error is not None:
            raise SaveFailedError(
                f"step {self.step} failed before and cannot be saved again in this attempt; save a "
                f"later step. It failed because: {self._error}", step=self.step,
            ) from self._error  # fmt: skip

    def refuse(self, error: BaseException, *, is_told: bool = True) -> None:
        """Fail: this rank will never deliver; `is_told`: the caller is hearing of it right now."""
        self._is_told = is_told
        if not isinstance(error, CkptdError):
            error = SaveFailedError(f"step {self.step}: save was left by {error!r}", step=self.step)
        self.resolve(error)

    def take_untold_error(self) -> CkptdError | None:
        """Return the failure if nobody was told of it yet; it counts as told from then on."""
        if self._is_told or not self._done.is_set() or self._error is None:
            return None
        self._is_told = True
        return self._error


def _final_status(error: CkptdError | None) -> Status:
    if error is None:
        return "committed"
    if isinstance(error, SaveSkippedError):
        return "skipped"
    return "unknown" if isinstance(error, SaveUnknownError) else "failed"


def error_of(finished: Finished) -> CkptdError | None:
    """Rebuild the error that the daemon reported; None if the step is committed."""
    if finished.state == "committed":
        return None
    kind = errors.class_named(finished.kind)
    if kind is IncompleteError:
        return IncompleteError(
            finished.reason, step=finished.step, missing_ranks=finished.ranks
        )  # fmt: skip
    if issubclass(kind, LayoutError):
        return kind(finished.reason, fqn=finished.fqn, ranks=finished.ranks)
    if issubclass(kind, CheckpointError):
        return kind(finished.reason, step=finished.step)
    return SaveFailedError(finished.reason, step=finished.step)
