"""How ranks find each other on a board that outlives them."""

from __future__ import annotations

import itertools
import threading
from datetime import timedelta

import msgspec
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import MeetingError
from ckptd.trainer.boards import LocalBoard, TcpBoard
from ckptd.trainer.joining import Answerer, AskPlaces, AskRoll, Caller, Place, Roll, join

WAIT_S = 30.0


class Process:
    """One process of a rank; each step is one operation on the shared board, or none."""

    def __init__(self, rank, world_size, fresh):
        self.rank = rank
        self.state = Caller(world_size, fresh) if rank == 0 else Answerer(rank, fresh)
        self.todo = self.state.begin()
        self.token = self.todo[0].token
        self.confirmed = set()

    @property
    def entered(self):
        """The name under which it entered: it knows one, and has said what is to be said."""
        return None if self.todo else self.state.name

    def step(self, board):
        if self.entered is not None:
            return
        if not self.todo:
            self.todo = self.state.on_poll()
        effect, *self.todo = self.todo
        if isinstance(effect, Place):
            board.places[self.rank] = effect
            self.confirmed.add(effect.name)
        elif isinstance(effect, Roll):
            board.roll = effect
            assert effect.name not in board.rolls
            board.rolls[effect.name] = effect
        elif isinstance(effect, AskPlaces):
            found = board.places[: effect.stop]
            if None not in found:
                self.todo = self.state.on_places(found) + self.todo
        else:
            assert isinstance(effect, AskRoll)
            self.todo = self.state.on_roll(board.roll) + self.todo


class World:
    """Processes of one or several starts over one board."""

    def __init__(self, world_size):
        self.places = [None] * world_size
        self.roll = None
        self.rolls = {}
        self.numbers = itertools.count()
        self.every = []
        self.living = {}  # the newest process of each rank

    def start(self, rank):
        fresh = lambda: f"{next(self.numbers)}"  # noqa: E731
        self.living[rank] = Process(rank, len(self.places), fresh)
        self.every.append(self.living[rank])

    def start_all(self, order):
        for rank in order:
            self.start(rank)

    def run_fairly(self, rounds=60):
        for _ in range(rounds):
            for process in self.living.values():
                process.step(self)

    def has_place(self, rank):
        place, process = self.places[rank], self.living.get(rank)
        return place is not None and process is not None and place.token == process.token

    def names(self):
        return {process.entered for process in self.living.values()}

    def check(self):
        """Who entered under a name stands in its roll, and all of that roll had confirmed it."""
        for process in self.every:
            name = process.entered
            if name is not None:
                roll = self.rolls[name]
                assert roll.tokens[process.rank] == process.token
                by_token = {other.token: other for other in self.every}
                members = [by_token[token] for token in roll.tokens]
                assert [member.rank for member in members] == list(range(len(self.places)))
                assert all(name in member.confirmed for member in members)


@st.composite
def histories(draw):
    size = draw(st.integers(2, 4))
    ranks = st.integers(0, size - 1)
    # ("step", n): process n of all ever started does one operation, dead or replaced as it may be
    step = st.tuples(st.just("step"), st.integers(0, 20))
    event = st.one_of(*[step] * 8, st.tuples(st.just("start"), ranks))
    return size, draw(st.lists(event, max_size=150)), draw(st.permutations(range(size)))


@given(histories(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whoever_enters_together_came_together_and_all_living_ranks_enter(history, is_new_start):
    size, events, order = history
    world = World(size)
    for what, which in events:
        if what == "start":
            world.start(which)
        elif world.every:
            world.every[which % len(world.every)].step(world)
        world.check()
    # From here on only the newest process of each rank lives, and those that lost their place to
    # an older one, or that one of them entered without, are started again.
    before = set()
    if is_new_start or any(p.state.name is not None for p in world.every):
        before = set(world.rolls)
        world.start_all(order)
    else:
        world.start_all(rank for rank in order if not world.has_place(rank))
    world.run_fairly()
    world.check()
    (name,) = world.names()
    assert name is not None
    assert name not in before


def test_what_an_earlier_start_left_is_called_but_never_entered():
    world = World(3)
    world.start_all(range(3))
    world.run_fairly()
    (old,) = world.names()
    world.living.clear()
    world.start_all([0, 1])  # rank 2 is late, and its old place still stands
    world.run_fairly()
    assert world.names() == {None}
    assert world.places[1].name == world.places[0].name != old
    world.start(2)
    world.run_fairly()
    (new,) = world.names()
    assert new not in (None, old)


def called_and_confirmed_by_rank_1():
    """Three ranks came; rank 1 has confirmed, rank 2 hangs."""
    world = World(3)
    world.start_all(range(3))
    world.living[2].step(world)
    while world.places[1] is None or not world.places[1].name:
        world.living[0].step(world)
        world.living[1].step(world)
    return world


@pytest.mark.parametrize("again", [0, 1])
def test_a_rank_that_starts_again_is_waited_for_anew(again):
    world = called_and_confirmed_by_rank_1()
    left = world.places[1].name
    dead = world.living[again]
    world.start(again)
    world.run_fairly()
    (name,) = world.names()
    assert name not in (None, left)
    for _ in range(60):
        dead.step(world)  # it wakes up too late
    assert dead.entered is None
    world.check()


def test_a_caller_that_lost_its_place_calls_and_opens_nothing():
    world = called_and_confirmed_by_rank_1()
    old = world.living[0]
    for _ in range(5):
        world.living[2].step(world)
    assert world.places[2].name == world.places[0].name  # so it could be opened now
    world.start(0)
    world.living[0].step(world)
    calls = len(world.rolls)
    for _ in range(20):
        old.step(world)
    assert old.entered is None
    assert len(world.rolls) == calls


# --- over a board ------------------------------------------------------------------------------


def in_threads(jobs):
    """Run all at once; return the results or errors."""
    results = [None] * len(jobs)

    def run(at):
        try:
            results[at] = jobs[at]()
        except MeetingError as error:
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def joiners(boards, size, timeout_s=WAIT_S):
    return [
        lambda rank=rank, board=board: join(board, "p", rank, size, timeout_s)
        for rank, board in enumerate(boards)
    ]


def test_starts_over_one_board_enter_under_names_of_their_own():
    board = LocalBoard()
    names = [in_threads(joiners([board] * 5, 5)) for _ in range(3)]
    assert all(len(set(start)) == 1 for start in names)
    assert len({start[0] for start in names}) == 3


def test_starts_over_a_server_of_torch_enter_under_names_of_their_own():
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False
    )
    names = []
    for _ in range(2):
        boards = [TcpBoard("127.0.0.1", server.port, 10) for _ in range(3)]
        names.append(in_threads(joiners(boards, 3)))
        for board in boards:
            board.close()
    assert [len(set(start)) for start in names] == [1, 1]
    assert names[0] != names[1]


def test_a_late_rank_is_waited_for():
    has_called = threading.Event()

    class Watched(LocalBoard):
        def set(self, key, value):
            super().set(key, value)
            if key == "p/joined":
                has_called.set()

    board = Watched()
    in_threads(joiners([board] * 3, 3))
    has_called.clear()
    jobs = joiners([board] * 3, 3)

    def late():
        assert has_called.wait(WAIT_S)  # rank 0 called the place that the earlier start left
        return jobs[2]()

    assert len(set(in_threads([*jobs[:2], late]))) == 1


def test_the_ranks_that_never_came_are_named():
    errors = in_threads(joiners([LocalBoard()] * 2, 12, 0.05))
    for error in errors:
        assert isinstance(error, MeetingError)
        assert str(error).startswith(
            "ranks 2, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 did not join in 0.05 s"
        )
        assert "Checkpointers for this root" in str(error)


def test_a_rank_of_which_only_an_earlier_start_left_something_is_named():
    board = LocalBoard()
    in_threads(joiners([board] * 3, 3))
    for error in in_threads(joiners([board] * 2, 3, 0.3)):
        assert str(error).startswith("rank 2 of 3 did not join in 0.3 s")
    in_threads(joiners([board] * 3, 3))
    with pytest.raises(MeetingError, match=r"^rank 0 of 3 did not join"):
        join(board, "p", 1, 3, 0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_place_was_taken_is_told_so(rank):
    class Robbed(LocalBoard):
        def set(self, key, value):
            place = key.startswith("p/join/")
            super().set(key, msgspec.msgpack.encode(Place("other")) if place else value)

    with pytest.raises(MeetingError, match=f"another process came as rank {rank} while"):
        join(Robbed(), "p", rank, 2, 0.02)


def test_a_place_that_does_not_unpack_is_a_meeting_error():
    board = LocalBoard()
    board.set("p/join/0", b"\xc1")
    with pytest.raises(MeetingError, match="does not unpack"):
        join(board, "p", 1, 2, 1)


def test_looking_at_the_board_takes_few_requests_however_many_ranks():
    class Counting(LocalBoard):
        requests = 0

        def has_all(self, keys):
            self.requests += 1
            return super().has_all(keys)

        def get_many(self, keys):
            self.requests += 1
            return super().get_many(keys)

    board = Counting()
    for rank in range(1, 1024):
        board.set(f"p/join/{rank}", msgspec.msgpack.encode(Place("old")))
    with pytest.raises(MeetingError, match="and 1015 more of 1024"):
        join(board, "p", 0, 1024, 0.02)
    assert board.requests < 50
