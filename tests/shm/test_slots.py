from __future__ import annotations

import mmap
import threading

import pytest

from ckptd.errors import ProtocolError
from ckptd.shm.slots import EMPTY, SLOT_HEADER_BYTES, WHOLE, WRITING, Header, Slot, SlotPool


def make_slot(index: int = 0) -> Slot:
    return Slot(index, memoryview(bytearray(SLOT_HEADER_BYTES + 4096)))


def snapshot(slot: Slot, step: int) -> int:
    generation = slot.begin(step, step)
    slot.finish()
    return generation


def test_a_new_slot_is_empty() -> None:
    slot = make_slot()
    assert slot.read_header() == Header(0, EMPTY, 0, 0, 0)
    assert not slot.is_whole
    assert not slot.is_current(0)


def test_a_slot_is_current_from_finish_to_the_next_begin() -> None:
    slot = make_slot()
    first = slot.begin(7, 3, 100)
    assert slot.read_header() == Header(first, WRITING, 7, 3, 100)
    assert not slot.is_current(first)
    slot.finish()
    assert slot.read_header() == Header(first, WHOLE, 7, 3, 100)
    assert slot.is_current(first)
    second = slot.begin(8, 4)
    assert second > first
    assert not slot.is_current(first)
    slot.finish()
    assert not slot.is_current(first)
    assert slot.is_current(second)


def test_the_mark_writing_is_there_before_anything_else_changes() -> None:
    slot = make_slot()
    first = snapshot(slot, 1)
    stores: list[int] = []

    class Words:
        def __init__(self, words: memoryview) -> None:
            self.words = words

        def __getitem__(self, at: int | slice) -> object:
            return self.words[at]

        def __setitem__(self, at: int, value: int) -> None:
            self.words[at] = value
            stores.append(at)

    slot._words = Words(slot._words)  # type: ignore[assignment]
    slot.begin(2, 2)
    assert stores[0] == 1
    assert not slot.is_current(first)
    stores.clear()
    slot.finish()
    assert stores == [1]


def test_an_abandoned_slot_is_not_whole_and_its_number_is_used_up() -> None:
    slot = make_slot()
    first = slot.begin(1, 1)
    slot.abandon()
    assert not slot.is_whole
    assert not slot.is_current(first)
    assert slot.begin(2, 2) == first + 1


def test_the_header_lies_apart_from_the_payload() -> None:
    slot = make_slot()
    slot.payload[:] = b"\xff" * len(slot.payload)
    generation = slot.begin(1, 1)
    slot.payload[:] = b"\xee" * len(slot.payload)
    slot.finish()
    assert slot.is_current(generation)
    assert slot.view[SLOT_HEADER_BYTES] == 0xEE
    assert slot.read_header().payload_bytes == len(slot.payload)


def test_a_header_of_something_else_is_refused_and_can_be_overwritten() -> None:
    slot = make_slot()
    slot.view[:8] = b"GARBAGE!"
    with pytest.raises(ProtocolError):
        slot.read_header()
    assert not slot.is_whole
    assert slot.begin(1, 1) == 1
    slot.finish()
    assert slot.is_current(1)


def test_generations_survive_a_new_owner_of_the_memory() -> None:
    memory = mmap.mmap(-1, SLOT_HEADER_BYTES * 2)
    first = snapshot(Slot(0, memoryview(memory)), 1)
    assert Slot(0, memoryview(memory)).begin(2, 2) == first + 1


# --- the pool ----------------------------------------------------------------------------------


def test_a_pool_gives_each_slot_once() -> None:
    slots = [make_slot(0), make_slot(1)]
    pool = SlotPool(slots)
    taken = [pool.acquire(0), pool.acquire(0)]
    assert {slot.index for slot in taken if slot} == {0, 1}
    assert pool.acquire(0) is None
    assert pool.free_count == 0
    pool.release(slots[1])
    assert pool.acquire(0) is slots[1]


def test_the_newest_whole_snapshot_is_overwritten_last() -> None:
    pool = SlotPool([make_slot(0), make_slot(1)])
    older, newer = pool.acquire(0), pool.acquire(0)
    assert older is not None
    assert newer is not None
    snapshot(older, 1)
    snapshot(newer, 2)
    pool.release(newer)  # made durable first
    pool.release(older)
    assert pool.acquire(0) is older


def test_a_slot_without_a_snapshot_goes_before_the_only_whole_one() -> None:
    pool = SlotPool([make_slot(0), make_slot(1)])
    good, bad = pool.acquire(0), pool.acquire(0)
    assert good is not None
    assert bad is not None
    snapshot(good, 1)
    pool.release(good)
    bad.begin(2, 2)
    pool.release(bad)
    assert pool.acquire(0) is bad


def test_slots_that_were_filled_before_the_pool_are_taken_oldest_first() -> None:
    slots = [make_slot(0), make_slot(1)]
    snapshot(slots[0], 9)
    snapshot(slots[1], 8)
    assert SlotPool(slots).acquire(0) is slots[1]


def test_slots_of_several_attempts_are_taken_oldest_first() -> None:
    """Sequence numbers begin anew with each attempt: they do not tell which slot is older."""
    slots = [make_slot(0), make_slot(1)]
    before = SlotPool(slots)
    for sequence in range(1, 58):
        taken = before.acquire(0)
        assert taken is not None
        snapshot(taken, sequence)
        before.release(taken)
    heir = SlotPool([Slot(slot.index, slot.view) for slot in slots])
    first = heir.acquire(0)
    assert first is not None
    snapshot(first, 1)  # the newest of all
    last = SlotPool([Slot(slot.index, slot.view) for slot in slots])
    second = last.acquire(0)
    assert second is not None
    assert second.index != first.index
    assert second.read_header().sequence == 57


def test_a_slot_that_its_writer_died_over_goes_first() -> None:
    slots = [make_slot(0), make_slot(1)]
    pool = SlotPool(slots)
    for sequence in (1, 2, 3):
        taken = pool.acquire(0)
        assert taken is not None
        if sequence < 3:
            snapshot(taken, sequence)
        else:
            taken.begin(3, 3)
        pool.release(taken)
    assert SlotPool(slots).acquire(0) is taken


def test_a_slot_released_twice_is_an_error() -> None:
    slot = make_slot()
    pool = SlotPool([slot])
    with pytest.raises(ValueError, match="twice"):
        pool.release(slot)


def test_a_waiting_thread_gets_the_slot_that_is_released() -> None:
    slot = make_slot()
    pool = SlotPool([slot])
    assert pool.acquire(0) is slot
    got: list[Slot | None] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(30)))
    waiter.start()
    pool.release(slot)
    waiter.join(30)
    assert got == [slot]


def test_p1_waiting_for_a_slot_ends_at_its_deadline() -> None:
    pool = SlotPool([])
    assert pool.acquire(0.01) is None


def test_of_many_threads_none_share_a_slot() -> None:
    pool = SlotPool([make_slot(i) for i in range(3)])
    held: set[int] = set()
    clashes: list[int] = []

    def work() -> None:
        for _ in range(200):
            slot = pool.acquire(30)
            assert slot is not None
            if slot.index in held:
                clashes.append(slot.index)
            held.add(slot.index)
            held.discard(slot.index)
            pool.release(slot)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert clashes == []
    assert pool.free_count == 3
