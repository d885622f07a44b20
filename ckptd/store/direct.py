"""Writing a buffer to a file whole, past the page cache where the file system takes that.

O_DIRECT wants memory, offsets and lengths in whole blocks (open(2), NOTES). Buffered writes of
checkpoints push everything else out of the page cache and run at a fraction of the disk's speed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading

import numpy as np

from ckptd.units import MIB

BLOCK_BYTES = 4096
BOUNCE_BYTES = 4 * MIB
MIN_DIRECT_BYTES = MIB
HAS_DIRECT = hasattr(os, "O_DIRECT")

_per_thread = threading.local()


def write_all(fd: int, data: memoryview, offset: int = 0, *, unit: int = 1) -> None:
    """Write all of `data` at `offset`, going on after short writes from the last whole `unit`.

    Raises:
        OSError: as `pwrite` says, or EIO where it makes no progress.
    """
    done = 0
    while done < len(data):
        written = os.pwrite(fd, data[done:], offset + done)
        written -= written % unit
        if written <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        done += written


def write_direct(fd: int, data: memoryview) -> bool:
    """Write `data` as the whole content of `fd`, an empty file; False if O_DIRECT does not work.

    A page-aligned buffer goes to the device as it is; another one through a buffer of this thread.
    After False the file is empty again and open for buffered writes.

    Raises:
        OSError: if the write fails for another reason.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        _write_blocks(fd, data)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        os.ftruncate(fd, 0)
        return False
    return True


def flush(fd: int) -> None:
    """Make a file or a folder durable.

    Raises:
        OSError: it may not be; do not call again on the same `fd`, the kernel reports an error once
            and drops the pages (https://lwn.net/Articles/752063/).
    """
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync stops at the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _write_blocks(fd: int, data: memoryview) -> None:
    at = 0
    if np.frombuffer(data, np.uint8).ctypes.data % BLOCK_BYTES == 0:
        at = len(data) - len(data) % BLOCK_BYTES
        write_all(fd, data[:at], unit=BLOCK_BYTES)
    while at < len(data):
        at += _write_bounced(fd, data[at : at + BOUNCE_BYTES], at)
    if len(data) % BLOCK_BYTES:
        os.ftruncate(fd, len(data))


def _write_bounced(fd: int, piece: memoryview, offset: int) -> int:
    bounce = _bounce()
    padded = -(-len(piece) // BLOCK_BYTES) * BLOCK_BYTES
    bounce[: len(piece)] = piece
    bounce[len(piece) : padded] = bytes(padded - len(piece))
    write_all(fd, bounce[:padded], offset, unit=BLOCK_BYTES)
    return len(piece)


def _bounce() -> memoryview:
    """Return this thread's buffer; it starts on a page, and goes when the thread ends."""
    view: memoryview | None = getattr(_per_thread, "view", None)
    if view is None:
        # Private memory: a shared anonymous mapping would count as shmem of the cgroup.
        view = memoryview(mmap.mmap(-1, BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        _per_thread.view = view
    return view
