"""The process that writes into an arena: which one it is, and whether it still lives."""

from __future__ import annotations

import contextlib
import os
import select
from typing import NamedTuple

_START_TIME = 22  # of proc_pid_stat(5), counted from 1; the name before it may hold spaces


class Holder(NamedTuple):
    """A process, told from any later one with its number by when it started.

    `started` is in ticks since the machine's start; 0 where that, or the process, is not known.
    """

    pid: int
    started: int


class Watch(NamedTuple):
    """Whether a holder is dead, and what becomes readable when it dies: the caller's to close.

    Of a holder that is not known neither is: it may live.
    """

    is_dead: bool
    pidfd: int | None = None


def holder_of(pid: int) -> Holder:
    """Return the process that has a number now; 0 is nobody known, as in another namespace."""
    return Holder(pid, _started(pid) if pid > 0 else 0)


def watch(holder: Holder) -> Watch:
    """Look at a process that somebody else knew."""
    if not holder.started or not hasattr(os, "pidfd_open"):
        return Watch(is_dead=False)
    try:
        pidfd = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return Watch(is_dead=True)
    except (OSError, ValueError, OverflowError):
        return Watch(is_dead=False)
    # The descriptor first, then the look: now the number cannot change hands in between. A zombie
    # is readable.
    started = _started(holder.pid)
    is_another = started not in (0, holder.started)
    if is_another or _is_readable(pidfd):
        os.close(pidfd)
        return Watch(is_dead=True)
    return Watch(is_dead=False, pidfd=pidfd)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _started(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[_START_TIME - 3])
    return 0
