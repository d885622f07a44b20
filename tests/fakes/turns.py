"""Threads that share a store and take turns: one call at a time, in an order that a test draws."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ckptd.store.base import Store
from tests.fakes.stores import Op, _Around


class _TurnStore(_Around):
    """Waits for the actor's turn before each call."""

    def __init__(self, inner: Store, wait_for_turn: Callable[[], None]) -> None:
        super().__init__(inner)
        self.traits = inner.traits._replace(requests=1)  # one call at a time, in a given order
        self._wait_for_turn = wait_for_turn

    def _before(self, op: Op) -> None:
        self._wait_for_turn()


class Turns:
    """Runs actors on threads of their own; between two calls of the store only one of them runs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()  # guards all below
        self._ready: set[int] = set()
        self._running: set[int] = set()
        self._turn: int | None = None

    def play(
        self, actors: Iterable[Callable[[Store], Any]], schedule: Iterator[int]
    ) -> list[Any | Exception]:
        """Run the actors, each with its own view of the store; return what they returned or raised.

        Each number of `schedule` picks one of those that wait, modulo their count.
        """
        work = list(actors)
        results: list[Any | Exception] = [None] * len(work)
        self._running = set(range(len(work)))

        def run(number: int) -> None:
            try:
                results[number] = work[number](_TurnStore(self._store, lambda: self._wait(number)))
            except Exception as error:  # noqa: BLE001 - the test judges it
                results[number] = error
            with self._changed:
                self._running.discard(number)
                self._changed.notify_all()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        self._conduct(schedule)
        for thread in threads:
            thread.join()
        return results

    def _conduct(self, schedule: Iterator[int]) -> None:
        with self._changed:
            while True:
                assert self._changed.wait_for(lambda: not self._running, 20)
                if not self._ready:
                    return
                waiting = sorted(self._ready)
                self._turn = waiting[next(schedule) % len(waiting)]
                self._ready.discard(self._turn)
                self._running.add(self._turn)
                self._changed.notify_all()

    def _wait(self, number: int) -> None:
        with self._changed:
            self._running.discard(number)
            self._ready.add(number)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._turn == number, 20)
            self._turn = None
