"""Urgent work goes first, and nobody waits for ever for work that will not be done."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial

import pytest

from ckptd.pipeline.lanes import GiveWay, Lane

WAIT_S = 20.0


class Busy:
    """A lane of one thread that is at something until it is let go."""

    def __init__(self) -> None:
        self.lane = Lane(ThreadPoolExecutor(1))
        self.done: list[str] = []
        self._go = threading.Event()
        is_at_it = threading.Event()

        def work() -> None:
            is_at_it.set()
            assert self._go.wait(WAIT_S)

        self.first = self.lane.submit(work)
        assert is_at_it.wait(WAIT_S)

    def submit(self, name: str, *, is_urgent: bool = False) -> Future[None]:
        return self.lane.submit(lambda: self.done.append(name), is_urgent=is_urgent)

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def busy() -> Iterator[Busy]:
    busy = Busy()
    yield busy
    busy.let_go()
    busy.lane.close()


def test_urgent_work_goes_ahead_of_all_that_waits_and_the_rest_in_the_order_in_which_it_came(
    busy: Busy,
) -> None:
    assert not busy.lane.has_urgent
    order = [("a", False), ("b", False), ("U", True), ("c", False), ("V", True)]
    futures = [busy.submit(name, is_urgent=is_urgent) for name, is_urgent in order]
    assert busy.lane.has_urgent
    busy.let_go()
    for future in futures:
        future.result(WAIT_S)
    assert busy.done == ["U", "V", "a", "b", "c"]
    assert not busy.lane.has_urgent


def test_what_work_returns_or_raises_comes_with_its_own_future(busy: Busy) -> None:
    def fail() -> None:
        raise ZeroDivisionError("mine")

    failed = busy.lane.submit(fail)
    good = busy.lane.submit(lambda: 7, is_urgent=True)
    busy.let_go()
    assert good.result(WAIT_S) == 7
    with pytest.raises(ZeroDivisionError, match="mine"):
        failed.result(WAIT_S)


def test_work_that_gives_way_begins_anew_after_the_urgent(busy: Busy) -> None:
    def polite() -> str:
        busy.done.append("tried")
        if len(busy.done) == 1:
            urgent.append(busy.submit("U", is_urgent=True))
            raise GiveWay
        return "in the end"

    urgent: list[Future[None]] = []
    future = busy.lane.submit(polite)
    after = busy.submit("after")
    busy.let_go()
    assert future.result(WAIT_S) == "in the end"
    urgent[0].result(WAIT_S)
    after.result(WAIT_S)
    assert busy.done == ["tried", "U", "tried", "after"]


def test_all_threads_of_the_pool_work(busy: Busy) -> None:
    lane = Lane(ThreadPoolExecutor(3))
    barrier = threading.Barrier(3)
    futures = [lane.submit(lambda: barrier.wait(WAIT_S)) for _ in range(6)]
    assert sorted(future.result(WAIT_S) for future in futures) == [0, 0, 1, 1, 2, 2]
    lane.close()


def test_work_that_is_cancelled_is_not_done(busy: Busy) -> None:
    future = busy.submit("a")
    other = busy.submit("b")
    assert future.cancel()
    busy.let_go()
    other.result(WAIT_S)
    assert busy.done == ["b"]
    assert wait([future], WAIT_S).done == {future}


def test_closing_lets_everybody_go_who_waits_for_what_was_not_begun(busy: Busy) -> None:
    waiting = [busy.submit("a"), busy.submit("U", is_urgent=True)]
    heard: list[type] = []

    def listen(future: Future[None]) -> None:
        try:
            future.result(WAIT_S)
        except CancelledError as error:
            heard.append(type(error))

    threads = [threading.Thread(target=listen, args=(future,)) for future in waiting]
    for thread in threads:
        thread.start()
    busy.lane.close(wait=False)
    for thread in threads:
        thread.join(WAIT_S)
    assert heard == [CancelledError] * 2
    assert wait(waiting, WAIT_S).not_done == set()
    assert not busy.first.done()
    busy.let_go()
    busy.first.result(WAIT_S)
    busy.lane.close()
    assert busy.done == []


def test_closing_lets_go_of_work_that_gave_way_and_did_not_begin_again() -> None:
    lane = Lane(ThreadPoolExecutor(1))
    is_at_it, go = threading.Event(), threading.Event()

    def urgent() -> None:
        is_at_it.set()
        assert go.wait(WAIT_S)

    def polite() -> None:
        lane.submit(urgent, is_urgent=True)
        raise GiveWay

    future = lane.submit(polite)
    assert is_at_it.wait(WAIT_S)
    lane.close(wait=False)
    with pytest.raises(CancelledError):
        future.result(WAIT_S)
    assert wait([future], WAIT_S).done == {future}
    go.set()
    lane.close()


def test_a_closed_lane_works_on_the_thread_that_asks() -> None:
    lane = Lane(ThreadPoolExecutor(1))
    lane.close()
    assert lane.submit(threading.current_thread).result(0) is threading.current_thread()


def test_a_future_that_failed_keeps_nothing_of_its_work_alive() -> None:
    """It may hold a slot, which must be unmapped at once and not by the garbage collector."""

    class Slot:
        pass

    def work(slot: Slot) -> None:
        del slot
        raise ZeroDivisionError

    lane = Lane(ThreadPoolExecutor(1))
    slot = Slot()
    is_there = weakref.ref(slot)
    gc.disable()
    try:
        future = lane.submit(partial(work, slot))
        del slot
        assert isinstance(future.exception(WAIT_S), ZeroDivisionError)
        lane.close()
        assert is_there() is None
    finally:
        gc.enable()


def test_work_is_done_in_atexit_when_python_has_closed_all_pools() -> None:
    script = """
import atexit
from concurrent.futures import ThreadPoolExecutor
from ckptd.pipeline.lanes import Lane
lane = Lane(ThreadPoolExecutor(1))
lane.submit(int).result()
atexit.register(lambda: print(lane.submit(lambda: "done").result()))
"""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout == "done\n"
