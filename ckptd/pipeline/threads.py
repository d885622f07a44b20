"""Worker threads that still do their work while the interpreter ends."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

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
