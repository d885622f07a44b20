"""Signals are taken over, passed on, and given back in any order. The signals are real."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from ckptd.trainer import signals as module
from ckptd.trainer.signals import take_over

NAMES = ("SIGTERM", "SIGUSR1")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    after = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)
    module._standing.clear()
    assert after == before, "a test gives back what it took"


class Ear:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def hear(self, name: str) -> None:
        self.heard.append(name)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def theirs(log: list[str], name: str) -> Callable[[int, FrameType | None], None]:
    return lambda number, frame: log.append(f"{name} {signal.Signals(number).name}")


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def in_a_child(work: Callable[[], object]) -> int:
    """Return how a forked child ends that does something; 3 if it comes to the end of it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_comes_is_heard_until_it_is_given_back() -> None:
    ear = Ear()
    give_back = take_over(NAMES, ear.hear)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        send(number)
    give_back()
    give_back()
    assert ear.heard == ["SIGTERM", "SIGUSR1", "SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_signals_are_no_change() -> None:
    take_over((), Ear().hear)()
    in_a_thread(lambda: take_over((), Ear().hear))


def test_a_handler_that_was_there_is_called_afterwards_and_put_back() -> None:
    ear, order = Ear(), []
    before = theirs(order, "theirs")
    signal.signal(signal.SIGTERM, before)
    give_back = take_over(("SIGTERM",), lambda name: (ear.hear(name), order.append("ours")))
    send(signal.SIGTERM)
    give_back()
    assert order == ["ours", "theirs SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_default_action_is_not_taken(number: signal.Signals) -> None:
    ear = Ear()
    give_back = take_over((number.name,), ear.hear)
    send(number)  # of SIGINT a function, which would raise KeyboardInterrupt
    give_back()
    assert ear.heard == [number.name]


def test_an_ignored_signal_is_heard_and_ignored_again() -> None:
    ear = Ear()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    give_back = take_over(("SIGUSR1",), ear.hear)
    send(signal.SIGUSR1)
    give_back()
    send(signal.SIGUSR1)
    assert ear.heard == ["SIGUSR1"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_hear_and_leave_in_any_order(order: tuple[int, ...]) -> None:
    log: list[str] = []
    before = theirs(log, "theirs")
    signal.signal(signal.SIGTERM, before)
    ears = [Ear() for _ in range(3)]
    give_backs = [take_over(("SIGTERM",), ear.hear) for ear in ears]
    left: list[int] = []
    for leaving in order:
        send(signal.SIGTERM)
        for number, ear in enumerate(ears):
            assert len(ear.heard) == (0 if number in left else 1)
            ear.heard.clear()
        give_backs[leaving]()
        left.append(leaving)
    assert log == ["theirs SIGTERM"] * 3
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_handler_that_came_later_and_passes_on_is_left_in_place() -> None:
    ear, log = Ear(), []
    give_back = take_over(("SIGTERM",), ear.hear)
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    later = lambda number, frame: (log.append("later"), ours(number, frame))  # noqa: E731
    signal.signal(signal.SIGTERM, later)
    send(signal.SIGTERM)
    give_back()
    assert signal.getsignal(signal.SIGTERM) is later
    send(signal.SIGTERM)  # the default is not taken: it is not ours to decide any more
    assert (ear.heard, log) == (["SIGTERM"], ["later", "later"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("is_first_first", [True, False])
def test_one_that_listens_after_a_foreign_handler_came_stands_before_that(
    is_first_first: bool,
) -> None:
    first, second, log = Ear(), Ear(), []
    give_backs = [take_over(("SIGTERM",), first.hear)]
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    later = lambda number, frame: (log.append("later"), ours(number, frame))  # noqa: E731
    signal.signal(signal.SIGTERM, later)
    give_backs.append(take_over(("SIGTERM",), second.hear))
    send(signal.SIGTERM)
    assert (first.heard, second.heard, log) == (["SIGTERM"], ["SIGTERM"], ["later"])
    for give_back in give_backs if is_first_first else reversed(give_backs):
        give_back()
    assert signal.getsignal(signal.SIGTERM) is later
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_another_thread_than_the_main_one_hears_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    def listen() -> None:
        take_over(NAMES, Ear().hear)()

    in_a_thread(listen)
    assert "notify_preemption" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("handler", "code"), [(signal.SIG_DFL, -signal.SIGUSR1), (signal.SIG_IGN, 3), (None, 3)]
)
def test_what_is_given_back_on_another_thread_does_what_it_did_before(
    handler: signal.Handlers | None, code: int
) -> None:
    def check() -> None:
        log: list[str] = []
        signal.signal(signal.SIGUSR1, theirs(log, "theirs") if handler is None else handler)
        ear = Ear()
        in_a_thread(take_over(("SIGUSR1",), ear.hear))
        send(signal.SIGUSR1)
        again = take_over(("SIGUSR1",), ear.hear)
        send(signal.SIGUSR1)
        again()
        if (ear.heard, log) != (["SIGUSR1"], ["theirs SIGUSR1"] * 2 * (handler is None)):
            os._exit(4)

    assert in_a_child(check) == code


def test_a_forked_child_does_what_it_would_have_done_before() -> None:
    ear, log = Ear(), []
    signal.signal(signal.SIGUSR1, theirs(log, "theirs"))
    give_backs = [take_over(NAMES, ear.hear) for _ in range(2)]

    def check() -> None:
        send(signal.SIGUSR1)
        is_right = (ear.heard, log) == ([], ["theirs SIGUSR1"])
        send(signal.SIGTERM if is_right else signal.SIGKILL)

    assert in_a_child(check) == -signal.SIGTERM
    send(signal.SIGTERM)
    assert ear.heard == ["SIGTERM", "SIGTERM"]
    for give_back in give_backs:
        give_back()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
