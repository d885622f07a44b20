"""Saves that come faster than slots get free: rank 0 decides which are left out, for all."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from ckptd.errors import MeetingError
from ckptd.trainer.boards import LocalBoard
from ckptd.trainer.busy import REMEMBERED, Decision, Decisions, Said
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.options import Options
from tests.fakes.training import WAIT_S

TIMEOUT_S = 3.0
SKIPPED = Decision(is_taken=False, wait_s=0.0)
AS_IT_IS = Decision(is_taken=True, wait_s=0.0)
TAKEN = Decision(is_taken=True, wait_s=TIMEOUT_S)


class Clock:
    """Time that passes only where somebody waits; `events` happen when it reaches their moment."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses: list[float] = []
        self.events: list[tuple[float, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds
        for event in [e for e in self.events if e[0] <= self.now_s]:
            self.events.remove(event)
            event[1]()

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        self.events.append((self.now_s + seconds, do))


class Board(LocalBoard):
    """Counts requests, knows its keys, and fails each request while it is `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0
        self.broken = False

    @property
    def keys(self) -> set[str]:
        return set(self._values)

    def set(self, key: str, value: bytes) -> None:
        self._ask()
        super().set(key, value)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self._ask()
        return super().get_many(keys)

    def _ask(self) -> None:
        self.requests += 1
        if self.broken:
            raise MeetingError("no answer")


class Job:
    """Ranks that share a board and, unless they run on threads, a clock."""

    def __init__(
        self, world_size: int, on_busy: str = "skip", timeout_s: float = TIMEOUT_S
    ) -> None:
        self.board, self.clock = Board(), Clock()
        self.has_room = True
        options = Options(
            "memory://busy", False, "auto", on_busy, timeout_s, "auto", {}, 600.0, 300.0, False
        )  # type: ignore[arg-type]
        self.ranks = [
            Decisions(
                Meeting(self.board, rank, world_size), options, self._look,
                now_s=self.clock, pause=self.clock.pause,
            )
            for rank in range(world_size)
        ]  # fmt: skip

    def _look(self) -> bool:
        return self.has_room

    def decide(self, sequence: int, *, has_room: bool) -> Decision:
        self.has_room = has_room
        return self.ranks[0].on(sequence)


# --- what is decided ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_waits_for_a_slot_of_its_own_and_tells_nobody(rank: int) -> None:
    job = Job(2, "wait")
    job.has_room = False
    assert job.ranks[rank].on(1) == TAKEN
    assert (job.board.requests, job.clock.pauses) == (0, [])


def test_one_rank_decides_by_itself_without_waiting() -> None:
    job = Job(1)
    assert job.decide(1, has_room=True) == TAKEN
    assert job.decide(2, has_room=False) == SKIPPED
    assert job.decide(3, has_room=True) == TAKEN
    assert (job.board.requests, job.clock.pauses) == (0, [])


def test_a_save_that_must_not_be_left_out_is_taken_on_all_ranks() -> None:
    job = Job(2)
    job.has_room = False
    assert job.ranks[0].on(1, may_skip=False) == TAKEN
    assert job.ranks[1].on(1, may_skip=True) == TAKEN
    assert job.ranks[0].on(2) == SKIPPED
    assert job.ranks[1].on(2, may_skip=False) == SKIPPED, "the word of rank 0 counts, for all"


def test_ranks_on_threads_do_what_rank_0_decided() -> None:
    world_size, saves, rng = 4, 300, random.Random(6)
    room = [rng.random() < 0.6 for _ in range(saves)]
    board, looks = LocalBoard(), iter(room)
    options = Options("memory://x", False, "auto", "skip", WAIT_S, 2, {}, 600.0, 300.0, False)

    def work(rank: int) -> list[bool]:
        decisions = Decisions(Meeting(board, rank, world_size), options, lambda: next(looks))
        return [decisions.on(n).is_taken for n in range(1, saves + 1)]

    # Rank 0 may be far ahead of the others here, so what is older than it remembers counts as taken.
    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(work, range(world_size)))
    assert found[0] == room
    for others in found[1:]:
        assert all(taken >= by_0 for taken, by_0 in zip(others, room, strict=True))
        assert others[-REMEMBERED:] == room[-REMEMBERED:]


def test_the_ranks_use_one_key_which_does_not_grow() -> None:
    job = Job(2)
    sizes = []
    for sequence in range(1, 1000):
        job.decide(sequence, has_room=False)
        assert job.ranks[1].on(sequence) == SKIPPED
        (value,) = job.board.get_many(sorted(job.board.keys))
        assert value is not None
        sizes.append(len(value))
    assert len(job.board.keys) == 1
    assert max(sizes) < 300
    assert job.clock.pauses == []


@pytest.mark.parametrize("behind", [0, 1, REMEMBERED - 1, REMEMBERED, 200])
def test_what_rank_0_no_longer_remembers_counts_as_taken(behind: int) -> None:
    job = Job(2)
    job.decide(10, has_room=False)
    for sequence in range(11, 11 + behind):
        job.decide(sequence, has_room=True)
    assert job.ranks[1].on(10) == (SKIPPED if behind < REMEMBERED else TAKEN)
    if behind:
        requests = job.board.requests
        assert job.ranks[1].on(11) == TAKEN
        assert job.board.requests == requests, "what is known is not asked for again"


# --- waiting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_room", [True, False])
def test_the_others_wait_for_rank_0_and_then_for_a_slot_busy_timeout_s_in_all(
    has_room: bool,
) -> None:
    job = Job(2)
    job.decide(1, has_room=True)
    assert job.ranks[1].on(1) == TAKEN
    began_s = job.clock.now_s
    job.clock.after(2.0, lambda: job.decide(2, has_room=has_room))
    found = job.ranks[1].on(2)
    waited_s = job.clock.now_s - began_s
    assert 2.0 <= waited_s < 2.01
    assert found.is_taken is has_room
    if has_room:
        assert found.wait_s == pytest.approx(TIMEOUT_S - waited_s)


def test_p1_a_rank_that_hears_nothing_goes_on_after_busy_timeout_s_and_says_so_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = Job(2)
    for sequence in (1, 2):
        began_s = job.clock.now_s
        assert job.ranks[1].on(sequence) == AS_IT_IS
        assert job.clock.now_s - began_s == pytest.approx(TIMEOUT_S)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [f"save {n}: rank 0 did not say" in told[n - 1] for n in (1, 2)] == [True, True]
    assert "not in 3 s" in told[0]
    job.decide(3, has_room=False)
    assert job.ranks[1].on(3) == SKIPPED


def test_a_word_that_comes_with_the_deadline_still_counts() -> None:
    job = Job(2)
    job.clock.after(TIMEOUT_S, lambda: job.decide(1, has_room=False))
    assert job.ranks[1].on(1) == SKIPPED


@pytest.mark.parametrize("world_size", [2, 2000])
def test_looks_are_quick_at_first_and_never_too_many_for_the_store(world_size: int) -> None:
    job = Job(world_size)
    job.ranks[1].on(1)
    pauses = job.clock.pauses
    assert pauses[0] == pytest.approx(0.0002)
    assert all(b <= 2 * a + 1e-9 for a, b in itertools.pairwise(pauses))
    assert max(pauses) == pytest.approx(0.005 if world_size == 2 else 0.4)


# --- a board that does not answer ----------------------------------------------------------------


def test_p1_where_the_board_fails_each_rank_goes_on_by_itself_and_lets_it_alone_for_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = Job(2)
    job.board.broken = True
    assert job.decide(1, has_room=False) == SKIPPED
    assert job.ranks[1].on(1) == AS_IT_IS
    assert job.board.requests == 2
    assert "the other ranks cannot be told: no answer" in caplog.text
    assert "rank 0 did not say whether it is left out: no answer" in caplog.text
    caplog.clear()
    assert job.decide(2, has_room=True) == TAKEN
    assert job.ranks[1].on(2) == AS_IT_IS
    assert job.board.requests == 2, "it is not asked again so soon: each time may cost a deadline"
    assert job.clock.pauses == []
    assert len(caplog.records) == 2, "each save that this concerns is told"
    job.board.broken = False
    job.clock.now_s += TIMEOUT_S
    job.decide(3, has_room=False)
    assert job.ranks[1].on(3) == SKIPPED
    assert job.ranks[1].on(1) == SKIPPED, "what could not be told in its time is told later"


@pytest.mark.parametrize(
    "value", [b"", b"\xc1", b"[]", msgspec.msgpack.encode((9, (1.5,))), b"x" * 9]
)
def test_what_makes_no_sense_on_the_board_is_taken_for_silence(
    value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(2)
    job.decide(1, has_room=False)
    (key,) = job.board.keys
    job.board.set(key, value)
    assert job.ranks[1].on(1) == AS_IT_IS
    assert "makes no sense" in caplog.text


def test_what_is_said_names_no_save_twice_and_none_that_is_too_old() -> None:
    said = Said(0, ())
    for sequence in range(1, 500):
        said = said.and_then(sequence, is_taken=sequence % 3 == 0)
        expected = [n for n in range(max(1, sequence - 63), sequence + 1) if n % 3]
        assert (said.latest, list(said.skipped)) == (sequence, expected)
