"""Memory of those that are gone, over a real socket: server, engine and clients in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ckptd.daemon.server import Server
from ckptd.engine import events as ev
from ckptd.engine.runner import Runner
from ckptd.engine.state import Engine
from ckptd.errors import DaemonUnavailableError
from ckptd.shm.arena import Arena
from ckptd.store.local import LocalStore
from ckptd.store.root import create_root
from ckptd.wire import frames
from ckptd.wire import messages as say
from ckptd.wire.address import connect, listen, unlisten
from ckptd.wire.channel import MAX_QUEUE_FDS, Channel
from tests.fakes.jobs import wait_until
from tests.fakes.trainers import FakeTrainer, contents


class Place(NamedTuple):
    socket: str
    root: str
    runner: Runner
    events: list[ev.Event]

    def gone(self, number: int = 1) -> list[bool]:
        """Return what was told of the end of a connection: whether its process was dead."""
        return [
            e.is_dead for e in list(self.events) if isinstance(e, ev.Gone) and e.client == number
        ]

    def trainer(self, attempt: int) -> FakeTrainer:
        return FakeTrainer(self.socket, self.root, attempt=attempt)

    def die(self, number: int) -> None:
        """Let the process behind a connection be dead: all are this one, which lives."""
        self.runner.post(ev.Gone(number, is_dead=True))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    path = str(tmp_path / "s")
    store = LocalStore(str(tmp_path / "root"))
    create_root(store)
    listener = listen(path)
    server = Server(listener.socket, {os.geteuid()})
    runner = Runner(Engine(linger_s=None), server.outlet, workers=1)
    events: list[ev.Event] = []
    post = runner.post
    runner.post = lambda event: (events.append(event), post(event))[1]  # type: ignore[method-assign]
    threads = [
        threading.Thread(target=server.serve, args=[runner]),
        threading.Thread(target=runner.run),
    ]
    for thread in threads:
        thread.start()
    yield Place(path, store.url, runner, events)
    runner.post(ev.StopAsked(0.0))
    threads[1].join()
    server.stop()
    threads[0].join()
    unlisten(path, listener)
    store.close()


def leave(place: Place, *, keeps: bool | None = None) -> None:
    """Let a trainer of attempt 1 save step 10, and hang up, with a goodbye or without."""
    with place.trainer(1) as trainer:
        trainer.connect().save(10, 1)
        assert trainer.outcome(10).state == "committed"
        if keeps is not None:
            trainer.say(say.Goodbye(keeps))


def held(trainer: FakeTrainer, count: int) -> tuple[say.HeldSnapshot, ...]:
    """Ask until so many snapshots are shown: the end of a connection is heard a moment later."""
    shown: list[say.Held] = []

    def ask() -> bool:
        trainer.say(say.Seek())
        shown.append(trainer.wait_for(say.Held))
        return len(shown[-1].snapshots) == count

    wait_until(ask, "it is shown")
    return shown[-1].snapshots


def take_fd(trainer: FakeTrainer) -> int:
    assert trainer._channel is not None
    return trainer._channel.take_fd()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("keeps", [None, True])
def test_d6_a_trainer_reads_what_the_one_before_it_left(place: Place, keeps: bool | None) -> None:
    leave(place, keeps=keeps)
    with place.trainer(2) as trainer:
        trainer.connect()
        (row,) = held(trainer, 1)
        assert (row.attempt, row.token, row.step, row.rank) == (1, "fake", 10, 0)
        trainer.say(say.Borrow(row.arena, row.slot, row.generation))
        lent = trainer.wait_for(say.Lent)
        with Arena.adopt(take_fd(trainer), lent.slots, lent.slot_bytes) as arena:
            slot = arena.slot(lent.handoff.slot)
            assert slot.is_current(row.generation)
            assert lent.recipe == trainer.recipe
            for piece in trainer.packed.pieces:
                tensor = trainer.packed.tensors[piece.tensor]
                at = lent.recipe.chunks[piece.chunk].offset_bytes + piece.offset_bytes
                expected = contents(10)[tensor.fqn][piece.box.slices((0,) * len(tensor.shape))]
                assert slot.view[at : at + piece.length_bytes].tobytes() == expected.tobytes()
            del slot


def test_nothing_is_shown_after_a_plain_goodbye(place: Place) -> None:
    leave(place, keeps=False)
    with place.trainer(2) as trainer:
        trainer.connect()
        assert held(trainer, 0) == ()


class Newcomer(FakeTrainer):
    """One that has announced no arena; with `is_known` it has said hello."""

    def __init__(self, place: Place, attempt: int, *, is_known: bool = True) -> None:
        super().__init__(place.socket, place.root, attempt=attempt)
        self._channel = Channel(connect(self.socket, deadline_s=10.0), say.FromDaemon)
        self._channel.accept_large_frames()
        if is_known:
            self.say(self.hello)
            self.wait_for(say.Welcome)

    def announce(self, arena: Arena) -> None:
        self.say(say.Arena(1, arena.slots, arena.slot_bytes), [arena.fileno()])


def test_p3_memory_is_ceded_once_its_process_is_dead_and_known_again_when_announced(
    place: Place,
) -> None:
    leave(place)
    with Newcomer(place, 2) as trainer:
        (row,) = held(trainer, 1)
        wish = say.Claim(1, trainer.arena.slot_bytes)
        trainer.say(wish)
        assert trainer.wait_for(say.Ceded) == say.Ceded(), "its writer lives"
        place.die(row.arena)
        trainer.say(wish)
        ceded = trainer.wait_for(say.Ceded)
        with Arena.adopt(
            take_fd(trainer), ceded.slots, ceded.slot_bytes, is_writable=True
        ) as arena:
            trainer.announce(arena)
            assert held(trainer, 0) == (), "it is the heir's, who lives"
    with Newcomer(place, 3) as trainer:
        assert [row.attempt for row in held(trainer, 1)] == [1]


def test_p2_lending_leaves_no_descriptor(place: Place) -> None:
    leave(place)
    with place.trainer(2) as trainer:
        trainer.connect()
        (row,) = held(trainer, 1)
        before = open_fds()
        for _ in range(50):
            trainer.say(say.Borrow(row.arena, row.slot, row.generation))
            trainer.wait_for(say.Lent)
            os.close(take_fd(trainer))
        wait_until(lambda: open_fds() == before, "descriptors are closed")


def flood(trainer: FakeTrainer, message: say.Message, most_fds: int) -> None:
    """Say something again and again, and hear no answer."""
    assert trainer._channel is not None
    trainer._channel._socket.settimeout(20.0)
    while True:
        trainer._channel._socket.sendall(frames.encode(message) * 100)
        assert open_fds() < most_fds


def test_s6_a_client_that_borrows_and_never_reads_is_dropped_and_takes_no_descriptors(
    place: Place,
) -> None:
    leave(place)
    with place.trainer(2) as trainer, place.trainer(3) as greedy:
        trainer.connect()
        (row,) = held(trainer, 1)
        greedy.connect()
        before = open_fds()
        with pytest.raises(OSError, match=r"(?i)reset|broken pipe"):
            flood(
                greedy, say.Borrow(row.arena, row.slot, row.generation), before + MAX_QUEUE_FDS + 9
            )
        wait_until(lambda: open_fds() <= before, "descriptors are closed")
        trainer.save(20, 1, slot=1)
        assert trainer.outcome(20).state == "committed"


def test_s6_an_arena_announced_again_and_again_leaves_no_descriptor(place: Place) -> None:
    with place.trainer(1) as trainer:
        trainer.connect().save(10, 1)
        assert trainer.outcome(10).state == "committed"
        before = open_fds()
        for _ in range(50):
            with Arena.create(1, 8192) as other:
                trainer.say(say.Arena(1, 1, 8192), [other.fileno()])
                trainer.report()
        assert open_fds() == before


def test_s6_memory_announced_before_a_hello_leaves_no_descriptor(place: Place) -> None:
    before = open_fds()
    for _ in range(10):
        with Newcomer(place, 1, is_known=False) as trainer:
            trainer.announce(trainer.arena)
            assert "hello" in trainer.wait_for(say.Refused).reason
            with pytest.raises(DaemonUnavailableError):
                trainer.wait_for(say.Welcome)
    wait_until(lambda: open_fds() == before, "descriptors are closed")


LEAVES = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    client.sendall(bytes.fromhex(sys.argv[2]))
    client.recv(1)
input()
"""


@pytest.mark.parametrize("keeps", [True, False])
def test_p3_the_death_of_who_will_come_again_is_told_after_its_goodbye(
    place: Place, keeps: bool
) -> None:
    with place.trainer(1) as trainer:
        words = [trainer.hello, say.Goodbye(keeps), say.Ask()]
        data = b"".join(frames.encode(message) for message in words)
        child = subprocess.Popen(
            [sys.executable, "-c", LEAVES, place.socket, data.hex()], stdin=subprocess.PIPE
        )
        wait_until(place.gone, "its connection has ended")
        assert place.gone() == [False]
        child.communicate(b"\n")
        with Newcomer(place, 2):  # heard by the thread that would hear of the death, and after it
            pass
    if keeps:
        wait_until(lambda: place.gone() == [False, True], "its process has ended")
    else:
        wait_until(lambda: len(place.gone(2)) > 0, "the other one has left")
        assert place.gone() == [False]


def test_a_word_to_stop_reaches_a_trainer_over_another_connection(place: Place) -> None:
    with place.trainer(1) as trainer, Newcomer(place, 2) as other:
        trainer.connect()
        other.say(say.Preempt(place.root, "the node goes"))
        assert other.wait_for(say.Told) == say.Told(2)
        assert trainer.wait_for(say.Stop) == say.Stop("the node goes")
