"""Deferred copies run on a thread, and no optimizer steps before they are done."""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptd.trainer.copies import Deferred

log = logging.getLogger("ckptd.trainer")

After = Callable[[BaseException | None], None]


class Overlap:
    """The one copy of a trainer that may be under way beside its next step.

    From construction to `close`, each `step` of any optimizer of this process waits for it first.
    `start`, `settle` and `close` belong to the thread that trains; `fence` to any, since optimizers
    also step on the threads of the backward pass.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._current: Deferred | None = None
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._jobs: queue.SimpleQueue[tuple[Deferred, After] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._hook: Any = register_optimizer_step_pre_hook(_hook_of(self))

    def start(self, deferred: Deferred, after: After) -> None:
        """Let a thread do the copies and then call `after` with what went wrong, None if nothing.

        What was started before must have settled. Whatever `after` raises is only logged.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckptd-capture", daemon=True)
            self._thread.start()
        self._is_idle.clear()
        self._current = deferred
        self._jobs.put((deferred, after))

    def fence(self) -> None:
        """Wait until parameters and optimizer tensors may be changed.

        Where a GPU does the copy its current stream waits, and not the caller. Returns at once if no
        copy is under way, and in a forked child, which has none.
        """
        current = self._current
        if current is not None and os.getpid() == self._pid:
            current.wait()

    def settle(self) -> None:
        """Wait until what was started is copied and `after` has returned."""
        if os.getpid() == self._pid:
            self._is_idle.wait()

    def close(self) -> None:
        """Settle, let optimizers go, and end the thread. May be repeated."""
        self.settle()
        self._hook.remove()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            deferred, after = job
            error: BaseException | None = None
            try:
                deferred.run()
            except BaseException as caught:  # noqa: BLE001 - the save must hear of it
                error = caught
            self._current = None
            try:
                after(error)
            except Exception:
                log.exception("a snapshot that was copied beside training was lost")
            del job, deferred, after, error  # they hold views of a slot, until the next save comes
            self._is_idle.set()


def _hook_of(overlap: Overlap) -> Callable[..., None]:
    """Return a hook that does not keep alive what nobody closed."""
    found = weakref.ref(overlap)

    def fence_before_step(*_: object) -> None:
        here = found()
        if here is not None:
            here.fence()

    return fence_before_step
