"""Getting ready for the first save: slots of the right size, in a dead trainer's memory if there is some."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ckptd.errors import LayoutError
from ckptd.model.tensor import Layout
from ckptd.shm.arena import Arena, round_up
from ckptd.trainer.link import Link
from ckptd.trainer.options import Options
from ckptd.trainer.preparing import Preparation
from ckptd.trainer.snapshots import Snapshots
from ckptd.units import MIB
from ckptd.wire import messages as say
from tests.fakes.engines import hello
from tests.fakes.ports import FakeDaemon, FakePort, welcome

STATE = {"w": torch.ones(1000), "epoch": 1}


class NoAgreement:
    """Of a rank that never agrees with anybody."""

    is_planned = False

    def __init__(self) -> None:
        self.offers: list[Layout] = []

    def prepare(self, layout: Layout, rows: bytes) -> None:
        self.offers.append(layout)

    def wait_planned(self, timeout_s: float) -> None:
        pass

    def planned(self, layout: Layout) -> None:
        return None


class Ready:
    """A preparation over a daemon that cedes one arena, or none."""

    def __init__(self, slots: Any = 2, arena: Arena | None = None, is_silent: bool = False) -> None:
        options = Options("memory://x", True, "auto", "wait", 20.0, slots, {}, 60.0, 60.0, False)
        self.snapshots = Snapshots(slots=slots, local_ranks=1, is_shared=True, chunk_bytes=MIB)
        self.agreement = NoAgreement()
        self.preparation = Preparation(options, self.agreement, self.snapshots)  # type: ignore[arg-type]
        self.daemon = FakeDaemon(self._answer)
        self.link = Link(self.daemon.open, hello(attempt=2), give_up_s=5.0)
        self._arena = arena
        self._is_silent = is_silent

    def _answer(self, port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, say.Claim) and not self._is_silent:
            if self._arena is None:
                port.answer(say.Ceded())
            else:
                port.fds.append(os.dup(self._arena.fileno()))
                port.answer(say.Ceded(self._arena.slots, self._arena.slot_bytes))

    def claims(self) -> list[say.Claim]:
        heard = self.daemon.ports[0].heard if self.daemon.ports else []
        return [message for message in heard if isinstance(message, say.Claim)]

    def shelf(self) -> Arena | None:
        return self.snapshots._shelf.arena if self.snapshots._shelf else None

    def close(self) -> None:
        self.link.close()
        self.preparation.join()
        self.snapshots.close()


@pytest.fixture
def ready() -> Iterator[Callable[..., Ready]]:
    made: list[Ready] = []

    def begin(**options: Any) -> Ready:
        made.append(Ready(**options))
        return made[-1]

    yield begin
    for each in made:
        each.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(2, round_up(1 << 16)) as made:
        yield made


def inode_of(arena: Arena | None) -> int:
    assert arena is not None
    return os.fstat(arena.fileno()).st_ino


def test_slots_are_reserved_and_laid_out_ahead(ready) -> None:
    fresh = ready()
    fresh.preparation.start(STATE)
    fresh.preparation.join()
    assert len(fresh.agreement.offers) == 1
    assert fresh.snapshots._shelf.destinations
    assert fresh.claims() == [], "nothing is left by anybody"


@pytest.mark.parametrize(("slots", "asked"), [(2, 2), (1, 1), ("auto", 1)])
def test_p3_an_heir_takes_the_dead_trainers_arena_and_makes_none(
    ready, arena: Arena, slots: Any, asked: int
) -> None:
    fresh = ready(slots=slots, arena=arena)
    fresh.preparation.heir_of(fresh.link)
    fresh.preparation.start(STATE)
    fresh.preparation.join()
    assert [claim.slots for claim in fresh.claims()] == [asked]
    assert inode_of(fresh.shelf()) == inode_of(arena)
    assert fresh.snapshots._shelf.destinations
    assert fresh.snapshots.has_room()


def test_where_there_is_no_arena_an_heir_makes_one(ready) -> None:
    fresh = ready()
    fresh.preparation.heir_of(fresh.link)
    fresh.preparation.start(STATE)
    fresh.preparation.join()
    assert len(fresh.claims()) == 1
    assert fresh.shelf() is not None


def test_p3_the_first_save_does_not_make_an_arena_beside_the_one_that_is_awaited(ready) -> None:
    fresh = ready(is_silent=True)
    fresh.preparation.heir_of(fresh.link)
    fresh.preparation.start(STATE)
    assert not fresh.snapshots.has_room()
    fresh.daemon.until_heard(say.Claim)
    assert fresh.shelf() is None
    fresh.link.close()  # nobody answers any more
    fresh.preparation.join()
    assert fresh.shelf() is not None


def test_an_arena_is_asked_for_once(ready, arena: Arena) -> None:
    fresh = ready(arena=arena)
    fresh.preparation.heir_of(fresh.link)
    for _ in range(2):
        fresh.preparation.start(STATE)
        fresh.preparation.join()
    assert len(fresh.claims()) == 1


def test_a_state_that_cannot_be_stored_asks_for_nothing_and_lets_nobody_wait(
    ready, arena: Arena
) -> None:
    fresh = ready(arena=arena)
    fresh.preparation.heir_of(fresh.link)
    with pytest.raises(LayoutError):
        fresh.preparation.start({"odd": object()})
    assert fresh.snapshots.has_room()
    assert fresh.claims() == []


def test_an_arena_that_is_too_small_is_not_the_end(ready) -> None:
    with Arena.create(2, round_up(1)) as small:
        fresh = ready(arena=small)
        fresh.preparation.heir_of(fresh.link)
        fresh.preparation.start({"w": torch.ones(50_000)})
        fresh.preparation.join()
        shelf = fresh.shelf()
        assert shelf is not None
        assert shelf.slot_bytes > 200_000
