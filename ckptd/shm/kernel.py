"""Calls that Python's `mmap` does not have, or makes while it holds the interpreter lock.

Numbers are Linux's, the same on all architectures that torch runs on. Elsewhere each call says that
it did nothing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys

import numpy as np

IS_LINUX = sys.platform == "linux"

_MADV_DONTNEED, _MADV_DONTFORK, _MADV_DONTDUMP, _MADV_POPULATE_WRITE = 4, 10, 16, 23
_MFD_NOEXEC_SEAL = 8  # Linux 6.3
_TMPFS_MAGIC = 0x01021994

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def address_of(mapping: mmap.mmap) -> int:
    """Return where a mapping begins; good until it is unmapped."""
    return int(np.frombuffer(mapping, dtype=np.uint8).__array_interface__["data"][0])


def hide_from_children_and_dumps(address: int, length: int) -> None:
    """Keep a mapping out of forked children and core dumps, where the kernel can.

    A child that inherited it would keep the memory alive, and copying its page tables would make
    each fork slow.
    """
    _madvise(address, length, _MADV_DONTFORK)
    _madvise(address, length, _MADV_DONTDUMP)


def drop_page_tables(address: int, length: int) -> None:
    """Forget which pages are mapped. Harmless for a shared file mapping, deadly for an anonymous one."""
    _madvise(address, length, _MADV_DONTNEED)


def populate(address: int, length: int) -> bool:
    """Fault pages in for writing, contents kept, without the interpreter lock.

    False where the kernel does not know how (before Linux 5.14).

    Raises:
        OSError: if there is no memory to give.
    """
    if not IS_LINUX:
        return False
    if _madvise(address, length, _MADV_POPULATE_WRITE) == 0:
        return True
    number = ctypes.get_errno()
    if number != errno.EINVAL:
        raise OSError(number, os.strerror(number))
    return False


def create_memfd(name: str) -> int:
    """Return a new sealable, non-executable memfd.

    Raises:
        OSError: where the system has none, or no descriptor is left.
    """
    if not IS_LINUX:
        raise OSError(errno.ENOSYS, "there is no memfd on this system")
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def is_tmpfs(fd: int) -> bool:
    """Tell whether a descriptor's pages are plain shared memory, not huge pages or a disk's."""
    record = (ctypes.c_long * 64)()  # struct statfs begins with f_type, and is shorter than this
    return _libc.fstatfs(fd, record) == 0 and record[0] == _TMPFS_MAGIC


def _madvise(address: int, length: int, advice: int) -> int:
    if not IS_LINUX:
        return -1
    return int(_libc.madvise(address, length, advice))
