"""A loop on a thread: deadlines, cancellation, its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ckptd.store import loop as loops
from ckptd.store.loop import LoopThread

WAIT_S = 20.0
SOON_S = 0.01


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("test-loop")
    yield loop
    loop.close()
    assert "test-loop" not in {thread.name for thread in threading.enumerate()}


class Sleeper:
    """Waits for ever, and notes how that ended."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.error: BaseException | None = None

    async def sleep(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ended.set()


async def add(one: int, other: int) -> int:
    await asyncio.sleep(0)
    return one + other


def test_what_a_coroutine_returns_is_returned(loop: LoopThread) -> None:
    assert loop.run(add(1, 2), WAIT_S) == 3


def test_coroutines_run_on_one_thread_that_is_not_the_callers(loop: LoopThread) -> None:
    async def ident() -> int:
        return threading.get_ident()

    found = {loop.run(ident(), WAIT_S) for _ in range(3)}
    assert len(found) == 1
    assert threading.get_ident() not in found


def test_many_threads_run_at_once(loop: LoopThread) -> None:
    met: list[int] = []
    all_met = asyncio.Event()

    async def meet() -> None:
        met.append(1)
        if len(met) == 8:  # nobody goes on before all have come
            all_met.set()
        await all_met.wait()

    threads = [threading.Thread(target=lambda: loop.run(meet(), WAIT_S)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(met) == 8


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "x"), ValueError("x")])
def test_errors_pass(loop: LoopThread, error: Exception) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(type(error)) as caught:
        loop.run(fail(), WAIT_S)
    assert caught.value is error
    assert loop.run(add(1, 1), WAIT_S) == 2


def test_what_takes_too_long_is_cancelled(loop: LoopThread) -> None:
    sleeper = Sleeper()
    with pytest.raises(TimeoutError, match="no answer within"):
        loop.run(sleeper.sleep(), SOON_S)
    assert sleeper.ended.is_set(), "it had ended before the caller heard"
    assert isinstance(sleeper.error, asyncio.CancelledError)
    assert loop.run(add(1, 1), WAIT_S) == 2


def test_one_that_takes_too_long_harms_no_other(loop: LoopThread) -> None:
    sleeper = Sleeper()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            loop.run(sleeper.sleep(), 0.2)
        except TimeoutError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert sleeper.begun.wait(WAIT_S)
    assert [loop.run(add(n, n), WAIT_S) for n in range(20)] == [2 * n for n in range(20)]
    thread.join()
    assert len(raised) == 1


def test_one_that_does_not_let_itself_be_cancelled_is_left(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_GRACE_S", SOON_S)
    go = asyncio.Event()

    async def refuse() -> None:
        while not go.is_set():
            with suppress(asyncio.CancelledError):
                await go.wait()

    with pytest.raises(TimeoutError):
        loop.run(refuse(), SOON_S)
    monkeypatch.undo()
    loop.loop.call_soon_threadsafe(go.set)
    assert loop.run(add(1, 1), WAIT_S) == 2


def test_a_loop_that_is_stuck_does_not_hold_its_callers(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_GRACE_S", SOON_S)
    go, stuck = threading.Event(), threading.Event()

    async def block() -> None:
        stuck.set()
        go.wait(WAIT_S)

    try:
        with pytest.raises(TimeoutError):
            loop.run(block(), SOON_S)
        assert stuck.is_set()
        with pytest.raises(TimeoutError):
            loop.run(add(1, 1), SOON_S)
    finally:
        go.set()
    monkeypatch.undo()
    assert loop.run(add(1, 1), WAIT_S) == 2


def test_closing_ends_the_thread_and_may_be_repeated() -> None:
    loop = LoopThread("closing-loop")
    assert "closing-loop" in {thread.name for thread in threading.enumerate()}
    for _ in range(3):
        loop.close()
    assert "closing-loop" not in {thread.name for thread in threading.enumerate()}
    assert loop.loop.is_closed()


def test_closing_cancels_what_runs_and_its_caller_hears(loop: LoopThread) -> None:
    sleeper = Sleeper()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            loop.run(sleeper.sleep(), WAIT_S)
        except BaseException as error:  # noqa: BLE001 - told on the main thread
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert sleeper.begun.wait(WAIT_S)
    loop.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert isinstance(sleeper.error, asyncio.CancelledError)
    assert [isinstance(error, OSError) for error in raised] == [True], raised


def test_a_loop_that_is_closed_runs_nothing(loop: LoopThread) -> None:
    loop.close()
    with pytest.raises(OSError, match="closed"):
        loop.run(add(1, 1), WAIT_S)


def test_a_process_that_forgets_to_close_still_ends(loop: LoopThread) -> None:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "test-loop"]
    assert thread.daemon
