"""Reused, page-aligned buffers under one byte budget."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckptd.errors import ConfigError
from ckptd.pipeline.lanes import GiveWay


def _never() -> bool:
    return False


class BufferPool:
    """Lends buffers, at most `budget_bytes` at a time, and keeps them for the next borrower.

    Fresh memory costs far more than reused memory (the kernel zeroes and maps each page), so
    buffers come back to the pool; `trim` gives them to the system when there is nothing to do.
    All methods may be called from any thread.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._idle: list[mmap.mmap] = []
        self._lent_bytes = 0
        self._urgent = 0  # how many urgent borrowers wait
        self._changed = threading.Condition()  # guards the three above

    @contextmanager
    def borrow(
        self,
        count: int,
        *,
        within_bytes: int | None = None,
        is_urgent: bool = False,
        gives_way: Callable[[], bool] = _never,
    ) -> Iterator[memoryview]:
        """Lend a writable buffer of `count` bytes whose address is page-aligned.

        Waits until all that is lent stays within the budget, and within `within_bytes` unless
        nothing else is lent; and, unless `is_urgent`, until no urgent borrower waits. `gives_way` is
        looked at then and at each `wake`. The view must not be used after the block.

        Raises:
            ConfigError: if `count` alone is over the budget.
            GiveWay: nothing was lent, since `gives_way` said so.
        """
        size = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        if size > self.budget_bytes:
            raise ConfigError(
                f"one buffer of {size} bytes is over the budget of {self.budget_bytes}; raise it"
            )
        limit = min(self.budget_bytes, max(size, within_bytes or self.budget_bytes))
        with self._changed:
            self._wait_for_room(limit - size, gives_way, is_urgent=is_urgent)
            buffer = self._take(size)
        try:
            with memoryview(buffer) as whole, whole[:count] as view:
                yield view
        finally:
            self._give_back(buffer)

    def trim(self) -> None:
        """Free the buffers that nobody has borrowed."""
        with self._changed:
            self._idle.clear()

    def wake(self) -> None:
        """Let those who wait look again whether they give way."""
        with self._changed:
            self._changed.notify_all()

    def _wait_for_room(
        self, most_bytes: int, gives_way: Callable[[], bool], *, is_urgent: bool
    ) -> None:
        """Wait until no more than so much is lent. The lock is held."""
        self._urgent += is_urgent
        try:
            while not gives_way():
                if self._lent_bytes <= most_bytes and (is_urgent or not self._urgent):
                    return
                self._changed.wait()
            raise GiveWay
        finally:
            self._urgent -= is_urgent
            if is_urgent:
                self._changed.notify_all()  # who waited for this one may go on, where there is room

    def _take(self, size: int) -> mmap.mmap:
        """Take a buffer, kept or new. The lock is held."""
        fitting = [buffer for buffer in self._idle if len(buffer) >= size]
        if fitting:
            buffer = min(fitting, key=len)
            self._idle.remove(buffer)
        else:
            # The pool never holds more than the budget: a smaller one makes room.
            self._idle.clear()
            buffer = mmap.mmap(-1, max(size, mmap.PAGESIZE))
        self._lent_bytes += len(buffer)
        return buffer

    def _give_back(self, buffer: mmap.mmap) -> None:
        with self._changed:
            self._lent_bytes -= len(buffer)
            self._idle.append(buffer)
            self._changed.notify_all()
