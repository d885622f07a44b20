"""The slots of one rank: reserved once, grown when the state grows, given back in the end."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ckptd.errors import ConfigError
from ckptd.plan.split import whole_share
from ckptd.shm.arena import Arena
from ckptd.shm.slots import SLOT_HEADER_BYTES, SlotPool
from ckptd.trainer import snapshots as module
from ckptd.trainer.flatten import Flat, flatten
from ckptd.trainer.layouts import layout_of
from ckptd.trainer.snapshots import Captured, Cut, Snapshots
from ckptd.units import MIB

WAIT_S = 20.0


@pytest.fixture
def snapshots() -> Iterator[Snapshots]:
    snapshots = Snapshots(slots=2, local_ranks=1, is_shared=False, chunk_bytes=MIB)
    yield snapshots
    snapshots.close()


def state(value: float, count: int = 100) -> Flat:
    return flatten({"a": torch.full((count,), value), "b": torch.full((3, 2), value)})


def cut_of(snapshots: Snapshots, flat: Flat, plan: str | None = None) -> Cut:
    layout = layout_of(flat)
    return snapshots.cut(layout, plan, whole_share(layout))


def capture(snapshots: Snapshots, flat: Flat, sequence: int = 1, **more: Any) -> Captured | None:
    cut = cut_of(snapshots, flat)
    options = {"step": 10 * sequence, "sequence": sequence, "timeout_s": 0.0, **more}
    return snapshots.capture(cut, flat.leaves, **options)


def contents(captured: Captured, snapshots: Snapshots, flat: Flat) -> set[float]:
    """Return the different numbers that lie in a slot where the recipe says that chunks are."""
    found: set[float] = set()
    for chunk in cut_of(snapshots, flat).recipe.chunks:
        raw = captured.slot.view[chunk.offset_bytes : chunk.offset_bytes + chunk.raw_bytes]
        found |= set(raw.cast("f").tolist())
    return found


def test_a_capture_is_a_whole_snapshot_with_its_header(snapshots: Snapshots) -> None:
    flat = state(3.0)
    captured = capture(snapshots, flat)
    assert captured is not None
    assert captured.bytes == 4 * 106
    header = captured.slot.read_header()
    assert (header.step, header.sequence) == (10, 1)
    assert captured.slot.is_current(captured.generation)
    assert contents(captured, snapshots, flat) == {3.0}
    for chunk in cut_of(snapshots, flat).recipe.chunks:
        assert chunk.offset_bytes >= SLOT_HEADER_BYTES
        assert chunk.offset_bytes + chunk.raw_bytes <= captured.arena.slot_bytes


def test_slots_are_taken_in_turn_and_none_is_left_when_all_are_held(snapshots: Snapshots) -> None:
    flat = state(1.0)
    first, second = capture(snapshots, flat, 1), capture(snapshots, flat, 2)
    assert first is not None
    assert second is not None
    assert first.slot.index != second.slot.index
    assert capture(snapshots, flat, 3) is None
    first.pool.release(first.slot)
    third = capture(snapshots, flat, 3)
    assert third is not None
    assert third.slot.index == first.slot.index
    assert third.generation == first.generation + 1
    assert not first.slot.is_current(first.generation)


def test_a_capture_that_fails_gives_its_slot_back_marked_as_empty(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = state(1.0)
    first = capture(snapshots, flat)
    assert first is not None
    first.pool.release(first.slot)

    def fail(self: object, leaves: object) -> int:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(module.Destination, "copy", fail)
        with pytest.raises(ZeroDivisionError):
            capture(snapshots, flat, 2)
    assert first.pool.free_count == 2
    again = capture(snapshots, flat, 3)
    assert again is not None
    assert again.slot.is_current(again.generation)


def test_a_cut_is_made_once_per_layout_and_plan(snapshots: Snapshots) -> None:
    one, two = state(1.0), state(1.0, 200)
    assert cut_of(snapshots, one) is cut_of(snapshots, state(2.0))
    cuts = [cut_of(snapshots, one), cut_of(snapshots, two), cut_of(snapshots, one, "a" * 32)]
    assert len({cut.recipe.recipe for cut in cuts}) == 3
    assert [cut.recipe.plan for cut in cuts] == [None, None, "a" * 32]


def test_a_cut_that_was_forgotten_gets_a_new_number(snapshots: Snapshots) -> None:
    """The daemon may still know the old number with other contents."""
    first = cut_of(snapshots, state(1.0, 10)).recipe.recipe
    others = {cut_of(snapshots, state(1.0, 10 + i)).recipe.recipe for i in range(1, 5)}
    again = cut_of(snapshots, state(1.0, 10)).recipe.recipe
    assert len({first, again, *others}) == 6


def test_a_larger_state_gets_larger_slots_and_the_old_ones_go_when_nobody_needs_them(
    snapshots: Snapshots,
) -> None:
    small, large = state(1.0), state(2.0, 50_000)
    held = capture(snapshots, small, 1)
    grown = capture(snapshots, large, 2)
    assert held is not None
    assert grown is not None
    assert grown.arena_number == held.arena_number + 1
    assert contents(held, snapshots, small) == {1.0}, "what was handed off stays where it is"
    assert contents(grown, snapshots, large) == {2.0}
    held.pool.release(held.slot)
    grown.pool.release(grown.slot)
    assert capture(snapshots, state(3.0, 200_000), 3) is not None
    with pytest.raises(ValueError, match="closed"):
        held.arena.slot(0)


def test_a_smaller_state_stays_in_the_slots_there_are(snapshots: Snapshots) -> None:
    large, small = state(1.0, 50_000), state(2.0)
    first = capture(snapshots, large, 1)
    second = capture(snapshots, small, 2)
    assert first is not None
    assert second is not None
    assert second.arena is first.arena
    assert contents(second, snapshots, small) == {2.0}


def test_p3_slots_that_do_not_fit_are_refused_with_the_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 10_000)
    snapshots = Snapshots(slots=2, local_ranks=4, is_shared=False, chunk_bytes=MIB)
    with pytest.raises(ConfigError, match="4 ranks"):
        capture(snapshots, state(1.0))
    snapshots.close()


def test_reserving_on_another_thread_makes_one_arena(snapshots: Snapshots) -> None:
    flat = state(1.0)
    size = cut_of(snapshots, flat).packed.slot_bytes
    threads = [
        threading.Thread(target=lambda: snapshots.reserve(size, is_faulted=True)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    captured = capture(snapshots, flat)
    for thread in threads:
        thread.join(WAIT_S)
    assert captured is not None
    assert captured.arena_number == 1
    assert snapshots._shelf is not None
    assert snapshots._shelf.number == 1


def test_slots_that_were_laid_out_ahead_take_the_capture(snapshots: Snapshots) -> None:
    flat = state(4.0)
    cut = cut_of(snapshots, flat)
    snapshots.lay_out(cut)  # before there is anything: nothing happens
    snapshots.reserve(cut.packed.slot_bytes)
    snapshots.lay_out(cut)
    assert snapshots._shelf is not None
    laid = dict(snapshots._shelf.destinations)
    assert len(laid) == 2
    captured = capture(snapshots, flat)
    assert captured is not None
    assert contents(captured, snapshots, flat) == {4.0}
    assert snapshots._shelf.destinations == laid


def test_laying_out_for_another_state_does_not_disturb_a_snapshot_in_a_slot(
    snapshots: Snapshots,
) -> None:
    flat, other = state(1.0, 50_000), state(2.0)
    captured = capture(snapshots, flat)
    assert captured is not None
    snapshots.lay_out(cut_of(snapshots, other))
    assert contents(captured, snapshots, flat) == {1.0}
    assert captured.slot.is_current(captured.generation)


def test_after_close_nothing_is_reserved_and_the_memory_is_gone() -> None:
    snapshots = Snapshots(slots=1, local_ranks=1, is_shared=False, chunk_bytes=MIB)
    captured = capture(snapshots, state(1.0))
    assert captured is not None
    arena = captured.arena
    captured.pool.release(captured.slot)
    del captured
    snapshots.close()
    snapshots.close()
    snapshots.reserve(MIB)
    assert snapshots._shelf is None
    gc.collect()
    with pytest.raises(ValueError, match="closed"):
        arena.slot(0)


def test_slots_for_a_gpu_are_page_locked_until_they_are_unmapped(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(module, "pin", lambda at, size: said.append(("pin", size)) or True)
    monkeypatch.setattr(module, "unpin", lambda at: said.append(("unpin", at)))
    small, large = state(1.0), state(1.0, 50_000)
    for flat, sequence in ((small, 1), (small, 2), (large, 3)):
        cut = cut_of(snapshots, flat)._replace(is_on_cuda=True)
        captured = snapshots.capture(
            cut, flat.leaves, step=sequence, sequence=sequence, timeout_s=0.0
        )  # fmt: skip
        assert captured is not None
        captured.pool.release(captured.slot)
    sizes = [size for what, size in said if what == "pin"]
    assert len(sizes) == 2, "once for each arena"
    snapshots.reserve(1)
    assert [what for what, _ in said] == ["pin", "pin", "unpin"], "of the retired one"
    snapshots.close()
    assert [what for what, _ in said] == ["pin", "pin", "unpin", "unpin"]


# --- the arena of a dead trainer ---------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Snapshots]:
    snapshots = Snapshots(slots=2, local_ranks=1, is_shared=True, chunk_bytes=MIB)
    yield snapshots
    snapshots.close()


def left(*sequences: int, slot_bytes: int = 1 << 16) -> tuple[Arena, Arena]:
    """Return an arena as a dead trainer's and as its heir's; slots were written in this order.

    What was written last is not whole where its number is negative.
    """
    former = Arena.create(2, slot_bytes)
    pool = SlotPool([former.slot(i) for i in range(2)])
    for sequence in sequences:
        slot = pool.acquire(0.0)
        assert slot is not None
        slot.begin(abs(sequence), abs(sequence))
        if sequence > 0:
            slot.finish()
        pool.release(slot)
    fd = os.dup(former.fileno())
    return former, Arena.adopt(fd, 2, slot_bytes, is_writable=True)


def is_closed(arena: Arena) -> bool:
    try:
        arena.slot(0)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("sequences", "order"),
    [((1, 2), [0, 1]), ((1, 2, 3), [1, 0]), ((1, 2, 3, 4), [0, 1]), ((1,), [1, 0]),
     ((1, 2, -3), [0, 1]), ((1, 2, 3, -4), [1, 0]), ((), [0, 1])],
)  # fmt: skip
def test_p3_slots_of_a_dead_trainer_are_overwritten_oldest_first_the_newest_whole_one_last(
    shared: Snapshots, sequences: tuple[int, ...], order: list[int]
) -> None:
    former, arena = left(*sequences)
    shared.take_over(arena)
    taken = [capture(shared, state(float(n)), n) for n in (1, 2)]
    assert [c.slot.index for c in taken if c] == order
    assert [c.arena_number for c in taken if c] == [1, 1]
    assert [contents(c, shared, state(float(n))) for n, c in enumerate(taken, 1) if c] == [
        {1.0}, {2.0},
    ]  # fmt: skip
    assert capture(shared, state(3.0), 3) is None
    former.close()


def test_p3_an_arena_that_was_taken_over_is_no_more_memory(
    shared: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    former, arena = left(1)
    shared.take_over(arena)
    monkeypatch.setattr(module.Arena, "create", lambda *_, **__: pytest.fail("another arena"))
    cut = cut_of(shared, state(1.0))
    shared.reserve(cut.packed.slot_bytes, is_faulted=True)
    captured = capture(shared, state(1.0))
    assert captured is not None
    assert captured.arena is arena
    former.close()


def test_an_arena_that_comes_too_late_is_closed(shared: Snapshots) -> None:
    first = capture(shared, state(1.0))
    assert first is not None
    former, arena = left(1)
    shared.take_over(arena)
    assert is_closed(arena)
    second = capture(shared, state(2.0), 2)
    assert second is not None
    assert second.arena is first.arena
    shared.close()
    former_too, arena = left(1)
    shared.take_over(arena)
    assert is_closed(arena)
    former.close()
    former_too.close()


def test_an_arena_that_is_too_small_makes_room_for_a_larger_one(shared: Snapshots) -> None:
    former, arena = left(1, slot_bytes=8192)
    shared.take_over(arena)
    large = state(1.0, 50_000)
    first = capture(shared, large)
    assert first is not None
    assert (first.arena_number, first.arena.slot_bytes > 200_000) == (2, True)
    assert contents(first, shared, large) == {1.0}
    second = capture(shared, large, 2)
    assert second is not None
    assert is_closed(arena), "nothing was in it"
    former.close()


def test_a_first_save_waits_for_the_arena_that_is_expected(shared: Snapshots) -> None:
    shared.expect()
    assert not shared.has_room()
    assert capture(shared, state(1.0)) is None
    captured: list[Captured | None] = []
    waiting = threading.Thread(
        target=lambda: captured.append(capture(shared, state(1.0), timeout_s=WAIT_S))
    )
    waiting.start()
    former, arena = left(1)
    shared.take_over(arena)
    waiting.join(WAIT_S)
    (found,) = captured
    assert found is not None
    assert found.arena is arena
    assert shared.has_room()
    former.close()


def test_where_there_is_none_the_first_save_makes_its_own(shared: Snapshots) -> None:
    shared.expect()
    shared.take_over(None)
    assert shared.has_room()
    captured = capture(shared, state(1.0))
    assert captured is not None
    assert captured.arena_number == 1


def test_s6_memory_with_other_things_in_it_is_closed_and_not_used(shared: Snapshots) -> None:
    former, arena = left(1)
    former.slot(0).view[:8] = b"GARBAGE!"
    shared.expect()
    shared.take_over(arena)
    assert is_closed(arena)
    captured = capture(shared, state(1.0))
    assert captured is not None
    assert captured.arena is not arena
    former.close()


@pytest.mark.parametrize("is_pinnable", [True, False])
def test_an_arena_that_was_taken_over_is_page_locked_once_a_gpu_wants_it(
    shared: Snapshots, monkeypatch: pytest.MonkeyPatch, is_pinnable: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "pin", lambda *_: said.append("pin") or is_pinnable)
    monkeypatch.setattr(module, "unpin", lambda *_: said.append("unpin"))
    former, arena = left(1)
    shared.take_over(arena)
    assert said == []
    for sequence in (1, 2):
        flat = state(1.0)
        cut = cut_of(shared, flat)._replace(is_on_cuda=True)
        shared.reserve(cut.packed.slot_bytes, is_pinned=True)
        assert shared.capture(cut, flat.leaves, step=sequence, sequence=sequence, timeout_s=0.0)
    assert said == ["pin"], "once, also where it is refused"
    shared.close()
    assert said == ["pin", "unpin"][: 1 + is_pinnable]
    former.close()


def test_slots_without_a_gpu_are_not_page_locked(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pin", lambda at, size: pytest.fail("there is no GPU"))
    assert capture(snapshots, state(1.0)) is not None
