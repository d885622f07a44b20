"""Saves that have to be committed before the machine goes."""

from __future__ import annotations

import logging
import math
import time

from ckptd.errors import ConfigError, SaveUnknownError
from ckptd.trainer.handle import Handle

log = logging.getLogger("ckptd.trainer")


class Deadline:
    """So many seconds from its making on.

    Raises:
        ConfigError: `limit_s` is no number of seconds.
    """

    def __init__(self, limit_s: float) -> None:
        if not isinstance(limit_s, (int, float)) or math.isnan(limit_s) or limit_s < 0:
            raise ConfigError(f"deadline_s={limit_s!r}: write seconds, 0 or more")
        self.limit_s = min(float(limit_s), 1e7)  # what a handoff may carry
        self._at = time.monotonic() + self.limit_s

    def left_s(self) -> float:
        """Return what is left of it, in seconds; 0 when it is over."""
        return max(0.0, self._at - time.monotonic())


def wait_committed(handle: Handle, deadline: Deadline, *, must: bool) -> None:
    """Wait for the commit until the deadline; then say in the log what is known, or raise with `must`.

    Raises:
        SaveUnknownError: the time is up.
        CkptdError: why the step is not committed and never will be.
    """
    if handle.wait_committed(deadline.left_s()):
        return
    word = f"step {handle.step}: not committed in {deadline.limit_s:.3g} s; {handle.whereabouts}"
    if must:
        raise SaveUnknownError(word, step=handle.step)
    log.warning("%s", word)
