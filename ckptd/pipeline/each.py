"""The same request for many objects, several under way at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ckptd.pipeline.threads import submit
from ckptd.store.base import Store

_LEAST = 8

T = TypeVar("T")
R = TypeVar("R")


def each(store: Store, work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Yield what `work` returns for each item, in order; threads run as many as the store likes.

    The first error ends it. When the iterator is done or closed, no thread runs any more.
    """
    rows = list(items)
    if len(rows) <= 1 or store.traits.requests == 1:
        yield from map(work, rows)
        return
    threads = min(len(rows), max(_LEAST, store.traits.requests))
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-each") as pool:
        try:
            futures = [submit(pool, work, row) for row in rows]
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
