"""Memory as a runner holds it: shown while it is what it was, handed on by descriptor, closed in the end."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator

import msgspec
import pytest

from ckptd.engine import arenas as module
from ckptd.engine import events as ev
from ckptd.engine import runner as runner_module
from ckptd.engine.arenas import Arenas
from ckptd.engine.keeper import NoKeeper
from ckptd.errors import StoreUnavailableError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.pipeline.commit import TOMBSTONE
from ckptd.shm.arena import Arena, round_up
from ckptd.store.memory import MemoryStore
from ckptd.store.root import create_root
from ckptd.wire import messages as say
from tests.fakes.checkpoints import PLAIN, flip_byte, write_checkpoint
from tests.fakes.engines import handoff, hello, recipe
from tests.fakes.runners import Bench
from tests.fakes.saves import Save
from tests.fakes.stores import FailingStore

_numbers = itertools.count(1)
SLOT = round_up(8192)


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(2, SLOT) as made:
        yield made


def fill(arena: Arena, slot: int = 0, text: bytes = b"snapshot") -> int:
    there = arena.slot(slot)
    generation = there.begin(10, 1)
    there.payload[: len(text)] = text
    there.finish()
    return generation


def adopted(arena: Arena) -> Arena:
    return Arena.adopt(os.dup(arena.fileno()), arena.slots, arena.slot_bytes)


# --- arenas by number --------------------------------------------------------------------------


def row(slot: int, generation: int, client: int = 1) -> say.HeldSnapshot:
    return say.HeldSnapshot(1, "t", 10, 1, 0, 1, client, slot, generation)


def test_d2_only_what_lies_where_it_was_handed_off_is_shown(arena: Arena) -> None:
    held = Arenas(NoKeeper())
    held.give(1, 1, arena)
    rows = [row(0, fill(arena)), row(1, fill(arena, 1)), row(0, 77), row(0, 1, client=9)]
    effect = ev.ShowHeld(2, "daemon", tuple((1, each) for each in rows))
    assert held.held(effect) == say.Held("daemon", (rows[0], rows[1]))
    arena.slot(0).begin(20, 2)
    assert held.held(effect).snapshots == (rows[1],)
    arena.slot(0).finish()
    assert held.held(effect).snapshots == (rows[1],), "another snapshot is whole there"
    held.release(1, 1)
    assert held.held(effect).snapshots == ()


def test_a_descriptor_is_a_new_one_of_the_same_memory(arena: Arena) -> None:
    held = Arenas(NoKeeper())
    held.give(1, 1, arena)
    fd = held.share(1, 1)
    assert fd is not None
    assert fd != arena.fileno()
    assert os.fstat(fd).st_ino == os.fstat(arena.fileno()).st_ino
    os.close(fd)


def test_s6_memory_that_has_no_descriptor_is_not_handed_on(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Arenas(NoKeeper())
    assert held.share(1, 1) is None
    with Arena.create(1, SLOT, is_shared=False) as private:
        held.give(1, 1, private)
        assert held.share(1, 1) is None
    held.give(1, 2, arena)

    def refuse(fd: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "dup", refuse)
        assert held.share(1, 2) is None
    held.release(1, 2)
    assert held.share(1, 2) is None


def test_p2_an_arena_in_the_place_of_another_closes_it() -> None:
    held = Arenas(NoKeeper())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        arena = Arena.create(1, SLOT)
        held.give(1, 1, arena)
        held.give(1, 1, arena)  # itself is not another
        assert arena.fileno() >= 0
    held.give(2, 1, Arena.create(1, SLOT))
    held.release(1, 1)
    held.release(1, 1)
    held.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- a runner ----------------------------------------------------------------------------------


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.stop()


def come(bench: Bench, client: int, attempt: int, url: str) -> None:
    bench.say(client, hello(attempt=attempt, root=url))
    bench.wait_for(say.Welcome, client)


@pytest.fixture
def root() -> str:
    url = f"memory://lending-{next(_numbers)}"
    create_root(MemoryStore.shared(url))
    return url


def leave(bench: Bench, arena: Arena, root: str) -> int:
    """Let client 1 hand a snapshot in slot 1 off, and die; return its generation."""
    come(bench, 1, 1, root)
    bench.runner.give_arena(1, 1, adopted(arena))
    shape = say.Arena(1, arena.slots, arena.slot_bytes)
    bench.runner.post(ev.Mapped(1, shape, os.fstat(arena.fileno()).st_ino))
    bench.say(1, recipe())
    generation = fill(arena, 1)
    message = msgspec.structs.replace(handoff(10, 1, slot=1), generation=generation)
    bench.say(1, message)
    bench.wait_for(say.Finished)
    bench.runner.post(ev.Gone(1, is_dead=True))
    return generation


def test_d6_what_a_dead_trainer_left_is_read_by_the_next_one(
    bench: Bench, arena: Arena, root: str
) -> None:
    generation = leave(bench, arena, root)
    come(bench, 2, 2, root)
    bench.say(2, say.Seek())
    held = bench.wait_for(say.Held, 2)
    assert held.snapshots == (say.HeldSnapshot(1, "t1", 10, 1, 0, 1, 1, 1, generation),)
    bench.say(2, say.Borrow(1, 1, generation))
    lent = bench.wait_for(say.Lent, 2)
    with Arena.adopt(bench.fds.pop(), lent.slots, lent.slot_bytes) as theirs:
        assert theirs.slot(lent.handoff.slot).payload[:8].tobytes() == b"snapshot"


def test_d2_what_was_overwritten_meanwhile_is_not_shown(
    bench: Bench, arena: Arena, root: str
) -> None:
    leave(bench, arena, root)
    come(bench, 2, 2, root)
    arena.slot(1).begin(20, 2)
    bench.say(2, say.Seek())
    assert bench.wait_for(say.Held, 2).snapshots == ()


def test_p3_a_ceded_arena_is_written_by_its_new_owner(
    bench: Bench, arena: Arena, root: str
) -> None:
    leave(bench, arena, root)
    come(bench, 2, 2, root)
    bench.say(2, say.Claim(2, SLOT))
    ceded = bench.wait_for(say.Ceded, 2)
    with Arena.adopt(bench.fds.pop(), ceded.slots, ceded.slot_bytes, is_writable=True) as mine:
        fill(mine, 0, b"anew")
        assert arena.slot(0).payload[:4].tobytes() == b"anew"


def test_s6_a_runner_that_has_no_descriptor_left_answers_without_memory(
    bench: Bench, arena: Arena, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = leave(bench, arena, root)
    come(bench, 2, 2, root)
    monkeypatch.setattr(Arenas, "share", lambda *_: None)
    bench.say(2, say.Borrow(1, 1, generation))
    assert bench.wait_for(say.Lent, 2) == say.Lent(1)
    bench.say(2, say.Claim(1, SLOT))
    assert bench.wait_for(say.Ceded, 2) == say.Ceded()
    bench.say(2, say.Ask())
    assert bench.wait_for(say.Report, 2)


# --- what stands before a step that came from memory -------------------------------------------

BASIS, STEP = StepId(1, 8), StepId(2, 10)


def based_on(store: MemoryStore) -> str | None:
    record = msgspec.structs.replace(Save(STEP, 1).record(0), previous=str(StepId(1, 5)))
    part = ev.PartKey(ev.StepKey("/root", STEP), 0, 1)
    found = runner_module._based(store, ev.PutRank(part, record, BASIS))
    assert msgspec.structs.replace(found, previous=None) == msgspec.structs.replace(
        record, previous=None
    )
    return found.previous


def test_r1_a_step_from_memory_that_was_committed_since_is_the_one_before() -> None:
    store = MemoryStore()
    assert based_on(store) == str(StepId(1, 5)), "it was not"
    write_checkpoint(store, BASIS, PLAIN)
    assert based_on(store) == str(BASIS)


def test_r1_a_step_from_memory_that_failed_or_is_damaged_is_not_on_the_line() -> None:
    store = MemoryStore()
    store.put(keys.checkpoint(BASIS), TOMBSTONE)
    assert based_on(store) == str(StepId(1, 5))
    store.delete(keys.checkpoint(BASIS))
    write_checkpoint(store, BASIS, PLAIN)
    flip_byte(store, keys.checkpoint(BASIS), 3)
    assert based_on(store) == str(StepId(1, 5))


def test_r1_a_store_that_does_not_answer_is_not_taken_for_a_step_that_is_not_there() -> None:
    store = MemoryStore()
    write_checkpoint(store, BASIS, PLAIN)
    error = StoreUnavailableError("checkpoints/", "no answer")
    with pytest.raises(StoreUnavailableError):
        based_on(FailingStore(store, frozenset({"get"}), error))
