"""A save on its way to a daemon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ckptd.errors import CkptdError, DaemonUnavailableError, SaveUnknownError
from ckptd.model.keys import StepId
from ckptd.shm.arena import Arena
from ckptd.trainer.handle import Handle
from ckptd.wire import messages as say


@dataclass
class Pending:
    """A save without its final word. `release` gives its slot back, once."""

    handle: Handle
    message: say.Handoff | say.Forfeit
    recipe: say.Recipe | None = None
    arena: tuple[int, Arena] | None = None
    release: Callable[[], None] | None = None
    since: float = 0.0
    is_sent: bool = False
    is_written: bool = False

    def let_go(self) -> None:
        """Give the slot back, if it was not already."""
        release, self.release = self.release, None
        if release is not None:
            release()

    def part(self) -> None:
        """Note that the daemon that had it is gone, or will not say more."""
        if not self.is_written:
            self.handle.taken(is_taken=False)

    def message_after(self, newest: StepId | None) -> say.Handoff | say.Forfeit:
        """Return the message as it is to be sent now, with `newest` committed in this attempt.

        A daemon that took the place of another knows of no earlier step but what it is told here.
        """
        message = self.message
        if isinstance(message, say.Forfeit) or newest is None or newest.step >= message.step:
            return message
        return msgspec.structs.replace(message, previous=str(newest))

    def abandoned(self, waited_s: float) -> CkptdError:
        """Return what to tell of a save for which no daemon was found in so many seconds."""
        step, waited = self.handle.step, f"{waited_s:g} s"
        if not self.is_sent:
            return DaemonUnavailableError(f"step {step}: no daemon took the snapshot in {waited}")
        reason = f"step {step}: the daemon that had it is gone and no other took it in {waited}"
        return SaveUnknownError(f"{reason}; it may be committed all the same", step=step)
