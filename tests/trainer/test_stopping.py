"""All ranks stop at the same call, whatever the order of counting, notice and publishing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.trainer.stopping import Stopping


def listening() -> Stopping:
    stopping = Stopping()
    stopping.listen()
    return stopping


def test_calls_are_answered_at_once_while_it_is_quiet() -> None:
    stopping = listening()
    assert [stopping.ask() for _ in range(3)] == [False] * 3
    assert stopping.calls == 3


def test_the_first_call_has_to_begin_listening() -> None:
    assert Stopping().ask() is None


def test_a_rank_is_frozen_from_the_notice_until_all_counts_are_known() -> None:
    stopping = listening()
    stopping.ask()
    assert stopping.freeze() == 1
    assert stopping.ask() is None
    assert stopping.answer() is None
    stopping.decide([1, 3])
    assert stopping.answer() is False
    assert [stopping.ask() for _ in range(4)] == [False, True, True, True]


def test_the_first_decision_stands() -> None:
    stopping = listening()
    stopping.freeze()
    stopping.decide([1])
    stopping.stop_alone()
    stopping.decide([9])
    assert [stopping.ask() for _ in range(3)] == [False, True, True]
    alone = listening()
    alone.freeze()
    alone.stop_alone()
    alone.decide([9])
    assert alone.ask() is True


# --- every order of the accesses -----------------------------------------------------------------


class Turns:
    """Threads that run one at a time, in a given order; each asks for a turn before each access."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._back = threading.Semaphore(0)
        self._goes: list[threading.Semaphore] = []
        self._done: list[bool] = []

    def wait(self) -> None:
        """Let the others run until it is this thread's turn. Nothing for any other thread."""
        number = getattr(self._local, "number", None)
        if number is not None:
            self._back.release()
            assert self._goes[number].acquire(timeout=20)

    def play(self, actors: list[Callable[[], None]], order: list[int]) -> None:
        """Run the actors; each number picks one of those left, then all go on in turn."""
        self._goes = [threading.Semaphore(0) for _ in actors]
        self._done = [False] * len(actors)

        def run(number: int) -> None:
            self._local.number = number
            assert self._goes[number].acquire(timeout=20)
            try:
                actors[number]()
            finally:
                self._done[number] = True
                self._back.release()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(actors))]
        for thread in threads:
            thread.start()
        for pick in itertools.chain(order, itertools.count()):
            left = [number for number, is_done in enumerate(self._done) if not is_done]
            if not left:
                break
            self._goes[left[pick % len(left)]].release()
            assert self._back.acquire(timeout=20)
        for thread in threads:
            thread.join()


class SlowStopping(Stopping):
    """Lets other threads run before each access to what two threads touch."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._values: dict[str, int | bool] = {}
        super().__init__()

    @property
    def calls(self) -> int:  # type: ignore[override]
        self._turns.wait()
        return int(self._values["calls"])

    @calls.setter
    def calls(self, value: int) -> None:
        self._turns.wait()
        self._values["calls"] = value

    @property
    def is_quiet(self) -> bool:  # type: ignore[override]
        self._turns.wait()
        return bool(self._values["is_quiet"])

    @is_quiet.setter
    def is_quiet(self, value: bool) -> None:
        self._turns.wait()
        self._values["is_quiet"] = value


class World:
    """Ranks with a thread that trains and one that listens each, and a board."""

    def __init__(self, ranks: int, stopping: type[SlowStopping]) -> None:
        self.turns = Turns()
        self.ranks = [stopping(self.turns) for _ in range(ranks)]
        self.board: dict[int, int] = {}
        self.stopped: dict[int, int] = {}
        for rank in self.ranks:
            rank.listen()

    def train(self, rank: int) -> None:
        for call in itertools.count(1):
            answer = self.ranks[rank].ask()
            while answer is None:
                self.turns.wait()
                answer = self.ranks[rank].answer()
            if answer:
                self.stopped[rank] = call
                return

    def listen(self, rank: int) -> None:
        self.turns.wait()
        count = self.ranks[rank].freeze()
        self.turns.wait()
        self.board[rank] = count
        while len(self.board) < len(self.ranks):
            self.turns.wait()
        self.ranks[rank].decide(self.board.values())

    def play(self, order: list[int], *, has_signal: bool = False) -> set[int]:
        """Return the calls at which ranks stopped."""
        each = range(len(self.ranks))
        actors = [lambda r=rank: self.train(r) for rank in each]
        actors += [lambda r=rank: self.listen(r) for rank in each]
        if has_signal:  # its handler ends the quiet of a rank, whatever the two threads do
            actors.append(self.ranks[0].end_quiet)
        self.turns.play(actors, order)
        assert len(self.stopped) == len(self.ranks)
        return set(self.stopped.values())


ORDERS = st.lists(st.integers(0, 11), max_size=120)


@settings(max_examples=150)
@given(ranks=st.integers(1, 3), order=ORDERS, has_signal=st.booleans())
def test_all_ranks_stop_at_the_same_call_in_every_order(
    ranks: int, order: list[int], has_signal: bool
) -> None:
    world = World(ranks, SlowStopping)
    assert len(world.play(order, has_signal=has_signal)) == 1
    (call,) = set(world.stopped.values())
    assert call == max(world.board.values()) + 1


def test_reading_the_count_before_the_quiet_ends_would_part_the_ranks() -> None:
    """The order in `freeze` matters: the other way round there is a schedule that splits."""

    class Wrong(SlowStopping):
        def freeze(self) -> int:
            count = self.calls
            self.is_quiet = False
            return count

    # Rank 0 listens up to its read of the count and trains some calls; then everybody goes on.
    order = [2] * 3 + [0] * 15
    assert len(World(2, SlowStopping).play(order)) == 1
    assert len(World(2, Wrong).play(order)) == 2
