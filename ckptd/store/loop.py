"""An event loop on a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_GRACE_S = 5.0
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for any number of threads; ended by `close`.

    The thread is a daemon thread: a process that forgets `close` still ends.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Return what `coroutine` returns; it is cancelled after `timeout_s`.

        Raises:
            TimeoutError: it took too long. If the loop itself hangs, what it was doing may go on.
            ConnectionAbortedError: the loop was closed, before or meanwhile.
        """
        bounded = _bounded(coroutine, timeout_s)
        try:
            future = asyncio.run_coroutine_threadsafe(bounded, self.loop)
        except RuntimeError as error:
            bounded.close()
            coroutine.close()
            raise ConnectionAbortedError("it is closed") from error
        try:
            return future.result(timeout_s + _GRACE_S)
        except concurrent.futures.CancelledError:
            raise ConnectionAbortedError("it was closed meanwhile") from None
        except _TIMEOUTS as error:
            raise TimeoutError(f"no answer within {timeout_s:.0f} s") from error
        finally:
            future.cancel()  # an interrupt leaves nothing running

    def close(self) -> None:
        """Cancel what still runs, end the thread and close the loop. May be repeated."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_GRACE_S)
        if not self._thread.is_alive():
            self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        # Closed, a connection still waits for a peer that does not read what was sent before.
        for transport in list(getattr(self.loop, "_transports", {}).values()):
            transport.abort()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())


async def _bounded(coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
    return await asyncio.wait_for(coroutine, timeout_s)
