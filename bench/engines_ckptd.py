"""ckptd, blocking and (once it can) overlapped, compressed and raw."""

from __future__ import annotations

import inspect
import os
from typing import Any

import ckptd
from bench.engine import WAIT_S, Engine, Restore, Ticket, Undo
from bench.files import files_in


def can_overlap() -> bool:
    """Tell whether this ckptd has overlapped capture."""
    return "overlap" in inspect.signature(ckptd.Checkpointer.__init__).parameters


class Ckptd(Engine):
    """The defaults: one copy into shared memory, and a daemon that compresses and writes."""

    name = "ckptd"
    settings: dict[str, Any] = {}  # noqa: RUF012 - read only

    def prepare(self) -> None:
        """Make the Checkpointer and reserve its slots, as `resume` does at the start of a job."""
        self._ckpt = ckptd.Checkpointer(self.folder, **self.settings)
        self._ckpt.prepare(self._state())
        self._ids: dict[int, int] = {}

    def save(self, step: int) -> Ticket:
        """Save; a thread waits for the commit."""
        handle = self._ckpt.save(step, self._state())
        return Ticket.after(lambda: handle.result(WAIT_S))

    def fence(self) -> None:
        """Do nothing: with `overlap` a hook of ckptd's own waits before the optimizer steps."""

    def restores(self) -> dict[str, Restore]:
        """Resume with a Checkpointer of its own, as a job that was started again does."""
        return {"": self._resume}

    def _resume(self, step: int) -> Undo:
        again = ckptd.Checkpointer(self.folder, **self.settings)
        resumed = again.resume(self._state())
        if resumed is None or resumed.step != step:
            raise RuntimeError(f"resumed {resumed and resumed.step} and not {step}")
        return again.close

    def discard(self, step: int) -> None:
        """Delete what belongs to the step: its names end with it."""
        for path in list(files_in(self.folder)):
            if f"{step:012d}-{self._ckpt.attempt.ordinal:04d}" in str(path):
                os.unlink(path)

    def close(self) -> None:
        """Say goodbye to the daemon, which then ends."""
        self._ckpt.close()

    def _state(self) -> dict[str, Any]:
        return {"model": self.job.model, "optimizer": self.job.optimizer}


class CkptdRaw(Ckptd):
    """Without compression."""

    name = "ckptd raw"
    settings = {"compression": "none"}  # noqa: RUF012 - read only


class CkptdOverlap(Ckptd):
    """The copy runs beside the next forward and backward pass."""

    name = "ckptd overlap"
    settings = {"overlap": True}  # noqa: RUF012 - read only


class CkptdOverlapRaw(Ckptd):
    """The same without compression."""

    name = "ckptd overlap raw"
    settings = {"overlap": True, "compression": "none"}  # noqa: RUF012 - read only
