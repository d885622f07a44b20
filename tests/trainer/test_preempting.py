"""A warning to one rank is one to all, and all stop at the same call; threads stand for ranks."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ckptd.errors import ConfigError, MeetingError
from ckptd.trainer import preempting as module
from ckptd.trainer.boards import Board, LocalBoard, TcpBoard
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.preempting import Notice, Preemption, Sources
from tests.fakes.jobs import wait_until

WAIT_S = 60.0
DEFAULT = Sources()
SOON = Sources(grace_s=0.2)  # half of that is the patience of a decision

Make = Callable[..., list[Preemption]]


class Mute(LocalBoard):
    """A board that can stop answering."""

    def __init__(self) -> None:
        super().__init__()
        self.is_mute = False
        self.asked = threading.Event()

    def _check(self) -> None:
        self.asked.set()
        if self.is_mute:
            raise MeetingError("mute")

    def set(self, key: str, value: bytes) -> None:
        self._check()
        super().set(key, value)

    def has_all(self, keys: Sequence[str]) -> bool:
        self._check()
        return super().has_all(keys)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self._check()
        return super().get_many(keys)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    monkeypatch.setattr(module, "_LOST_POLL_S", 0.01)
    monkeypatch.setattr(module, "_OVERTIME_S", 0.01)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False
    )


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Preemption] = []

    def make(ranks: int, sources: Sources = DEFAULT, board: Any = None) -> list[Preemption]:
        boards = board if isinstance(board, list) else [board or LocalBoard()] * ranks
        made.extend(
            Preemption(Meeting(boards[rank], rank, ranks), sources) for rank in range(ranks)
        )
        return made[-ranks:]

    yield make
    for preemption in made:
        preemption.close()
        preemption.close()
    assert not [t for t in threading.enumerate() if t.name == "ckptd-preempt"]


def first_true(preemption: Preemption, between: Callable[[], object]) -> int:
    """Ask once per step until the answer is to stop; return how many steps that took."""
    for call in itertools.count(1):
        if preemption.ask():
            assert preemption.ask(), "once True, always True"
            return call
        between()
    raise AssertionError


def at_the_same_call(ranks: Sequence[Preemption], warn: Callable[[], object]) -> int:
    """Let the ranks train in step, and warn them after five steps; return the call where all stop."""
    steps = itertools.count(1)
    barrier = threading.Barrier(len(ranks), lambda: next(steps) == 5 and warn())

    def step() -> None:
        barrier.wait(WAIT_S)
        time.sleep(0.001)  # a step of training

    with ThreadPoolExecutor(len(ranks)) as pool:
        calls = list(pool.map(lambda rank: first_true(rank, step), ranks))
    assert len(set(calls)) == 1
    return calls[0]


def noticed(rank: Preemption) -> Preemption:
    """Wait until the rank's thread has taken notice: calls are not answered at once any more."""
    wait_until(lambda: not rank._stopping.is_quiet, "the thread takes notice")
    return rank


@pytest.mark.parametrize("kind", ["local", "tcp"])
def test_a_notice_to_one_rank_stops_all_at_the_same_call(
    make: Make, server: dist.TCPStore, kind: str
) -> None:
    boards: list[Board] = [LocalBoard()] * 4
    if kind == "tcp":
        boards = [TcpBoard("127.0.0.1", server.port, 5) for _ in range(4)]
    ranks = make(4, board=boards)
    at_the_same_call(ranks, lambda: ranks[2].notify("SIGTERM"))
    assert ranks[2].reason == "SIGTERM"
    assert [rank.reason for rank in ranks if rank is not ranks[2]] == ["rank 2: SIGTERM"] * 3


def test_a_notice_to_all_at_once_stops_all_at_the_same_call(make: Make) -> None:
    ranks = make(4)
    at_the_same_call(ranks, lambda: [rank.notify("SIGTERM") for rank in ranks])


def test_a_file_is_a_notice(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "stop"
    ranks = make(2, Sources(stop_file=str(path)))
    at_the_same_call(ranks, path.touch)
    assert {str(path) in str(rank.reason) for rank in ranks} == {True}


def test_one_rank_needs_no_board(make: Make) -> None:
    board = Mute()
    board.is_mute = True
    (rank,) = make(1, board=board)
    at_the_same_call([rank], lambda: rank.notify("enough"))
    assert not board.asked.is_set()


def test_a_notice_before_the_first_call_is_remembered(make: Make) -> None:
    ranks = make(2)
    ranks[1].notify("early")
    at = ranks[1].noticed_at
    assert [rank._thread for rank in ranks] == [None, None]
    at_the_same_call(ranks, lambda: None)
    assert ranks[1].noticed_at == at
    ranks[1].notify("late")
    assert ranks[1].reason == "early"


def test_a_rank_that_is_busy_answers_the_others_and_stops_where_they_do(make: Make) -> None:
    """Compiling, warming up, evaluating: the thread says for it how often it asked."""
    busy, other = make(2)
    assert busy.ask() is False
    other.begin()
    other.notify("SIGTERM")
    assert first_true(noticed(other), lambda: None) == 2
    assert busy.ask() is True


def test_the_grace_of_others_began_when_the_first_was_warned(make: Make) -> None:
    first, second = make(2, Sources(grace_s=1000.0))
    assert first.grace_left_s() == 1000.0
    first._heard = Notice("long ago", time.monotonic() - 300.0)
    for rank in (first, second):
        rank.begin()
    wait_until(lambda: second.noticed_at, "the second rank hears of it")
    assert 600.0 < second.grace_left_s() <= 700.0
    first._heard = Notice("too long ago", time.monotonic() - 3000.0)
    assert first.grace_left_s() == 0.0


def test_a_rank_that_is_dead_is_named_and_the_others_stop_alone(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = make(3, SOON)
    ranks[0].begin()
    ranks[0].notify("SIGTERM")
    assert noticed(ranks[0]).ask() is True
    wait_until(lambda: any(r.levelno == logging.ERROR for r in caplog.records), "it is said")
    (error,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert "rank 1, 2 did not say within 0.1 s" in error
    ranks[1].begin()  # the late one hears of it, and is not held up by the dead one either
    assert noticed(ranks[1]).ask() is True


@pytest.mark.parametrize("when", ["before", "after"])
def test_with_a_board_that_fails_a_rank_stops_on_its_own_notice(
    make: Make, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    board = Mute()
    (rank, _) = make(2, SOON, board)
    board.is_mute = when == "before"
    assert rank.ask() is False
    assert board.asked.wait(WAIT_S)
    board.is_mute = True
    assert rank.ask() is False
    rank.notify("SIGTERM")
    assert noticed(rank).ask() is True
    # The call may return before the thread has said so.
    wait_until(
        lambda: any("mute" in r.getMessage() for r in caplog.records if r.levelno == logging.ERROR),
        "the thread says why",
    )


def test_a_thread_that_hangs_does_not_hold_a_rank_up_that_was_told(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()

    class Hanging(Mute):
        def _check(self) -> None:
            self.asked.set()
            assert goes_on.wait(WAIT_S)

    board = Hanging()
    rank, _ = make(2, SOON, board)
    assert rank.ask() is False
    assert board.asked.wait(WAIT_S)
    rank.notify("SIGTERM")
    assert rank.ask() is True
    goes_on.set()
    assert "does not answer" in caplog.text


def test_a_board_that_answers_again_is_heard_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    board, other = Mute(), LocalBoard()
    other._values = board._values  # the same keys, always in reach
    deaf, loud = make(2, board=[board, other])
    board.is_mute = True
    deaf.begin()
    wait_until(lambda: "hears of no preemption but its own" in caplog.text, "it says so")
    board.is_mute = False
    at_the_same_call([deaf, loud], lambda: loud.notify("SIGTERM"))
    assert caplog.text.count("hears of no preemption") == 1


def test_a_thread_that_fails_leaves_local_notices_working(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Preemption) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Preemption, "_look", fail)
    (rank,) = make(1)
    rank.begin()
    wait_until(lambda: rank._is_over, "the thread fails")
    assert "a bug" in caplog.text
    assert rank.ask() is False
    rank.notify("SIGTERM")
    assert rank.ask() is True


def test_after_close_the_last_word_stays(make: Make) -> None:
    quiet, told, early = make(1)[0], make(1)[0], make(1)[0]
    quiet.ask()
    told.begin()
    told.notify("SIGTERM")
    first_true(told, lambda: None)
    early.notify("SIGTERM")
    for rank in (quiet, told, early):
        rank.close()
    assert [rank.ask() for rank in (quiet, told, early)] == [False, True, True]
    assert early._thread is None


def test_close_ends_a_wait_for_others(make: Make) -> None:
    rank, _ = make(2, Sources(grace_s=2 * WAIT_S))
    rank.begin()
    rank.notify("SIGTERM")
    noticed(rank)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(rank.ask)
        wait_until(lambda: rank._stopping.calls, "it asks")
        rank.close()
        assert answer.result(WAIT_S) is True


def test_a_signal_is_a_notice_from_the_first_call_until_close(make: Make) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    (rank,) = make(1, Sources(("SIGTERM", "SIGUSR1")))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert rank.ask() is False
    os.kill(os.getpid(), signal.SIGUSR1)
    first_true(rank, lambda: None)
    assert rank.reason == "SIGUSR1"
    rank.close()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_all_ranks_together_ask_the_store_a_thousand_times_a_second_at_most(make: Make) -> None:
    board = LocalBoard()
    for ranks, pause_s in ((2, 0.5), (500, 0.5), (4000, 4.0)):
        rank = Preemption(Meeting(board, 0, ranks), Sources())
        assert rank._no_faster_than(0.5) == pause_s


def test_sources_are_read_from_the_environment() -> None:
    assert Sources.of(("SIGTERM",), {}) == Sources(("SIGTERM",), None, 25.0)
    env = {"CKPTD_GRACE_S": "110", "CKPTD_STOP_FILE": "/tmp/stop"}
    assert Sources.of([], env) == Sources((), "/tmp/stop", 110.0)
    assert Sources.of([], {"CKPTD_GRACE_S": "", "CKPTD_STOP_FILE": ""}) == Sources()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_grace_that_is_no_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="CKPTD_GRACE_S"):
        Sources.of([], {"CKPTD_GRACE_S": text})
