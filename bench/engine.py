"""What the benchmark asks of an engine; each peer is a small class of this kind."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.content import Job

WAIT_S = 120.0

Undo = Callable[[], None]
Restore = Callable[[int], Undo | None]


class Ticket:
    """One save on its way to the disk: `done` when a crash of the machine could not undo it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.done_at = 0.0
        self.error: BaseException | None = None

    @classmethod
    def now(cls) -> Ticket:
        """Return the ticket of a save that is durable already."""
        ticket = cls()
        ticket._finish()
        return ticket

    @classmethod
    def after(cls, wait: Callable[[], object]) -> Ticket:
        """Return the ticket of a save that is durable when `wait`, called on a thread, returns."""
        ticket = cls()

        def follow() -> None:
            try:
                wait()
            except BaseException as error:  # noqa: BLE001 - raised by `wait_durable`
                ticket.error = error
            ticket._finish()

        threading.Thread(target=follow, daemon=True).start()
        return ticket

    def wait_durable(self) -> float:
        """Wait, and return the moment (`time.perf_counter`) at which the save was durable."""
        if not self.done.wait(WAIT_S):
            raise TimeoutError(f"not durable within {WAIT_S:.0f} s")
        if self.error is not None:
            raise self.error
        return self.done_at

    def _finish(self) -> None:
        self.done_at = time.perf_counter()
        self.done.set()


class Engine:
    """One way to save and restore the state of a job.

    Attributes:
        name: what tables call it.
        needs: the distribution that it comes from, None for torch itself.
        note: settings that are not the engine's own defaults, and why.
        does_sync: whether the engine itself makes its files durable; if not, the benchmark does it
            and counts the time.
    """

    name = ""
    needs: str | None = None
    note = ""
    does_sync = True

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder

    def prepare(self) -> None:
        """Get ready, as a job would before it trains. Not timed."""

    def save(self, step: int) -> Ticket:
        """Save; return when training may go on."""
        raise NotImplementedError

    def fence(self) -> None:
        """Wait until weights may change; called before each step of the optimizer."""

    def restores(self) -> dict[str, Restore]:
        """Return the ways to fill the job's live objects, by name; "" is the usual one.

        Each is called with a step; what it returns is called afterwards, untimed.
        """
        raise NotImplementedError

    def discard(self, step: int) -> None:
        """Delete a checkpoint. Not timed."""
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.exists():
            os.unlink(path)

    def close(self) -> None:
        """Let go of processes and memory."""

    def path(self, step: int) -> Path:
        """Return where the engine is told to put a checkpoint."""
        return self.folder / f"step-{step}"
