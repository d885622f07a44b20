"""Pools of threads whose most urgent work goes first."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")


class GiveWay(Exception):  # noqa: N818 - no error: nobody but a lane ever sees it
    """Raised by work that would keep more urgent work waiting: it begins anew after that."""


class _Entry:
    """Work that waits. The urgent comes first, then what came first."""

    def __init__(self, order: tuple[bool, int], work: Callable[[], Any]) -> None:
        self.order = order
        self.future: Future[Any] = Future()
        self._work: Callable[[], Any] | None = work
        self._is_begun = False

    def __lt__(self, other: _Entry) -> bool:
        return self.order < other.order

    @property
    def is_urgent(self) -> bool:
        return not self.order[0]

    def run(self) -> bool:
        """Do the work, unless it was cancelled; False if it gave way."""
        self._is_begun = self._is_begun or self.future.set_running_or_notify_cancel()
        if not self._is_begun or self._work is None:
            return True
        try:
            result = self._work()
        except GiveWay:
            return False
        except BaseException as error:  # noqa: BLE001 - as a pool does
            self._work = None  # it may hold a slot, and nobody is to find that held once he hears
            self.future.set_exception(error)
            del self  # which the error's traceback would hold, and the other way round
        else:
            self._work = None
            self.future.set_result(result)
        return True

    def cancel(self) -> None:
        """Let go of whoever waits for it."""
        self._work = None
        if self.future.cancel():
            self.future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` hangs
        else:
            self.future.set_exception(CancelledError())


class Lane:
    """Puts work on a pool, urgent work before all that waits. For any thread.

    What runs already is not interrupted, but it may raise `GiveWay` where it would have to wait itself.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._turns = itertools.count()
        self._waiting: list[_Entry] = []  # a heap
        self._lock = threading.Lock()  # guards _waiting; one turn of the pool goes with each entry

    @property
    def has_urgent(self) -> bool:
        """Tell whether urgent work waits for a thread."""
        with self._lock:
            return bool(self._waiting) and self._waiting[0].is_urgent

    def submit(self, work: Callable[[], _T], *, is_urgent: bool = False) -> Future[_T]:
        """Run `work` on the pool; once that takes nothing any more, this thread takes its turn.

        See `ckptd.pipeline.threads.submit` for when that is.
        """
        entry = _Entry((not is_urgent, next(self._turns)), work)
        with self._lock:
            heapq.heappush(self._waiting, entry)
            try:
                self._pool.submit(self._take_turn)
                is_closed = False
            except RuntimeError:
                is_closed = True
        if is_closed:
            self._take_turn()
        return entry.future

    def close(self, *, wait: bool = True) -> None:
        """End the threads after what each is at, which `wait` False does not wait for.

        Whoever waits for work that has not begun, or gave way, gets a `CancelledError`.
        """
        with self._lock:
            self._pool.shutdown(wait=False, cancel_futures=True)
            left, self._waiting = self._waiting, []
        for entry in left:
            entry.cancel()
        self._pool.shutdown(wait=wait)

    def _take_turn(self) -> None:
        """Do the most urgent work that waits, to its end."""
        while True:
            with self._lock:
                if not self._waiting:  # closed meanwhile
                    return
                entry = heapq.heappop(self._waiting)
            if entry.run():
                return
            with self._lock:
                heapq.heappush(
                    self._waiting, entry
                )  # the turn that goes with it is this one, still
