"""Worker threads that still do their work while the interpreter ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar


def usable_cores() -> int:
    """Return how many cores this process may use: the affinity, not what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


_P = ParamSpec("_P")
_T = TypeVar("_T")


def submit(
    pool: ThreadPoolExecutor, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> Future[_T]:  # fmt: skip
    """Run `work` on the pool, or on this thread once the pool takes nothing any more.

    Python closes every pool before it runs the functions of `atexit`, and a script that ends without
    closing its Checkpointer (``daemon=False``) finishes its snapshots there.
    """
    try:
        return pool.submit(work, *args, **kwargs)
    except RuntimeError:
        future: Future[_T] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as a pool does
            future.set_exception(error)
        return future
