from __future__ import annotations

import ctypes
import mmap
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.pipeline.buffers import BufferPool
from ckptd.pipeline.lanes import GiveWay
from tests.fakes.jobs import wait_until

PAGE = mmap.PAGESIZE


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def held_bytes(pool: BufferPool) -> int:
    return pool._lent_bytes + sum(map(len, pool._idle))


@pytest.mark.parametrize("count", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 7])
def test_a_buffer_is_writable_of_the_size_asked_for_and_page_aligned(count: int) -> None:
    with BufferPool(8 * PAGE).borrow(count) as view:
        assert view.nbytes == count
        assert address(view) % PAGE == 0
        view[:] = b"x" * count
        assert bytes(view) == b"x" * count


def test_nothing_may_be_borrowed_that_is_over_the_budget() -> None:
    pool = BufferPool(4 * PAGE)
    with pytest.raises(ConfigError, match="over the budget"), pool.borrow(4 * PAGE + 1):
        pass
    with pool.borrow(4 * PAGE):
        pass


def test_a_buffer_that_came_back_is_lent_again() -> None:
    pool = BufferPool(4 * PAGE)
    with pool.borrow(2 * PAGE) as view:
        first = address(view)
    with pool.borrow(PAGE) as view:
        assert address(view) == first
        assert view.nbytes == PAGE


def test_the_smallest_buffer_that_fits_is_lent() -> None:
    pool = BufferPool(8 * PAGE)
    with pool.borrow(3 * PAGE), pool.borrow(PAGE) as small:
        where = address(small)
    with pool.borrow(10) as view:
        assert address(view) == where


def test_a_view_is_dead_after_the_block() -> None:
    pool = BufferPool(4 * PAGE)
    with pool.borrow(PAGE) as view:
        kept = view
    with pytest.raises(ValueError, match="released"):
        kept[0]


def test_a_buffer_comes_back_after_an_error() -> None:
    pool = BufferPool(PAGE)
    with pytest.raises(ZeroDivisionError), pool.borrow(PAGE):
        raise ZeroDivisionError
    with pool.borrow(PAGE):
        pass


def test_trim_gives_idle_buffers_back_and_leaves_those_that_are_lent() -> None:
    pool = BufferPool(8 * PAGE)
    with pool.borrow(2 * PAGE) as view:
        with pool.borrow(PAGE):
            pass
        pool.trim()
        assert held_bytes(pool) == 2 * PAGE
        view[0] = 1
    pool.trim()
    assert held_bytes(pool) == 0


def test_p3_borrowers_beyond_the_budget_wait_for_room() -> None:
    pool = BufferPool(4 * PAGE)
    got = threading.Event()

    def borrow() -> None:
        with pool.borrow(2 * PAGE):
            got.set()

    with pool.borrow(3 * PAGE):
        thread = threading.Thread(target=borrow)
        thread.start()
        assert not got.wait(0.02)
    assert got.wait(20)
    thread.join()


@settings(deadline=None)
@given(
    budget=st.integers(1, 12),
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=40),
)
def test_p3_lent_and_kept_together_stay_within_the_budget(budget: int, actions) -> None:
    pool = BufferPool(budget * PAGE)
    open_blocks = []
    for is_borrow, size in actions:
        if is_borrow and size <= budget and pool._lent_bytes + size * PAGE <= budget * PAGE:
            block = pool.borrow(size * PAGE)
            block.__enter__()
            open_blocks.append(block)
        elif not is_borrow and open_blocks:
            open_blocks.pop(size % len(open_blocks)).__exit__(None, None, None)
        assert held_bytes(pool) <= budget * PAGE
    for block in open_blocks:
        block.__exit__(None, None, None)
    assert pool._lent_bytes == 0


def test_many_threads_share_one_budget() -> None:
    pool = BufferPool(6 * PAGE)
    most: list[int] = []

    def work(number: int) -> None:
        for turn in range(50):
            count = (1 + (number + turn) % 4) * PAGE
            with pool.borrow(count) as view:
                view[:] = bytes([number]) * count
                most.append(held_bytes(pool))
                assert bytes(view) == bytes([number]) * count, "nobody else has it"

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(most) == 300
    assert max(most) <= 6 * PAGE


def test_an_urgent_borrower_is_lent_what_comes_back_first() -> None:
    pool = BufferPool(PAGE)
    order: list[str] = []

    def borrow(name: str, is_urgent: bool) -> None:
        with pool.borrow(PAGE, is_urgent=is_urgent):
            order.append(name)

    threads = [threading.Thread(target=borrow, args=(f"later {n}", False)) for n in range(3)]
    threads.append(threading.Thread(target=borrow, args=("urgent", True)))
    with pool.borrow(PAGE):
        for thread in threads:
            thread.start()
        wait_until(lambda: pool._urgent == 1, "the urgent one waits")
    for thread in threads:
        thread.join(20)
    assert order[0] == "urgent"
    assert len(order) == 4


def test_one_that_is_not_urgent_takes_no_room_that_an_urgent_one_waits_for() -> None:
    pool = BufferPool(4 * PAGE)
    got = threading.Event()

    def urgent() -> None:
        with pool.borrow(3 * PAGE, is_urgent=True):
            got.set()

    def small() -> None:
        with pool.borrow(PAGE):
            assert got.is_set()

    with pool.borrow(2 * PAGE):
        threads = [threading.Thread(target=urgent)]
        threads[0].start()
        wait_until(lambda: pool._urgent == 1, "the urgent one waits")
        threads.append(threading.Thread(target=small))
        threads[1].start()
        assert not got.is_set()
    for thread in threads:
        thread.join(20)
    assert got.is_set()
    assert pool._lent_bytes == 0


def test_one_that_gives_way_gets_nothing_also_where_there_is_room() -> None:
    pool = BufferPool(PAGE)
    with pytest.raises(GiveWay), pool.borrow(PAGE, gives_way=lambda: True):
        pass
    gave_way = threading.Event()
    must = threading.Event()

    def borrow() -> None:
        with pytest.raises(GiveWay), pool.borrow(PAGE, gives_way=must.is_set):
            pass
        gave_way.set()

    with pool.borrow(PAGE):
        thread = threading.Thread(target=borrow)
        thread.start()
        must.set()
        pool.wake()
        assert gave_way.wait(20)
    thread.join(20)
    assert pool._lent_bytes == 0
