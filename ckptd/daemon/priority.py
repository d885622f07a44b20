"""Making a daemon the one that waits where a machine is short of something."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys

log = logging.getLogger("ckptd.daemon")

# ioprio_set(2) has no wrapper in libc. Numbers: the kernel's tables of system calls.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_WHO_PROCESS = 1
_IDLE_CLASS = 3 << 13


def step_back(nice: int) -> None:
    """Lower the priority of this process, of its disk requests too; 0 leaves both alone.

    Threads that are made later inherit it: call it before there are any. The idle class of requests
    has meaning to schedulers that have classes (BFQ, mq-deadline), which still serve it now and then
    where others never rest.
    """
    if not nice:
        return
    os.nice(nice)
    number = _IOPRIO_SET.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, _WHO_PROCESS, 0, _IDLE_CLASS) != 0:
        log.info("disk requests keep their class: %s", os.strerror(ctypes.get_errno()))
