from __future__ import annotations

from ckptd.pipeline.pace import Pace

MB = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pace(workers: int) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(workers, clock), clock


def code(pace: Pace, clock: Clock, span_s: float, count: int = 32 * MB) -> None:
    with pace.coding(count):
        clock.now += span_s


def store(pace: Pace, clock: Clock, span_s: float, count: int = 32 * MB) -> None:
    with pace.storing(count):
        clock.now += span_s


def test_what_nobody_has_measured_is_worth_it() -> None:
    found, clock = pace(2)
    assert found.is_worth_coding()
    code(found, clock, 10.0)
    assert found.is_worth_coding()
    assert found.rates() == (3.2 * MB, None)


def test_coding_stops_where_the_store_is_the_faster_one_and_only_there() -> None:
    for workers, is_worth in ((1, False), (2, True), (4, True)):
        found, clock = pace(workers)
        code(found, clock, 0.03)  # about 1,070 MB/s a worker
        store(found, clock, 0.02)  # 1,600 MB/s
        assert found.is_worth_coding() is is_worth


def test_one_chunk_in_sixteen_is_coded_all_the_same_to_look_again() -> None:
    found, clock = pace(1)
    code(found, clock, 1.0)
    store(found, clock, 0.1)
    assert [found.is_worth_coding() for _ in range(32)].count(True) == 2


def test_a_store_that_becomes_slow_is_noticed() -> None:
    found, clock = pace(1)
    code(found, clock, 0.03)
    store(found, clock, 0.02)
    assert not found.is_worth_coding()
    for _ in range(3):
        store(found, clock, 0.1)
    assert found.is_worth_coding()


def test_time_in_which_several_chunks_are_stored_counts_once_and_idle_time_never() -> None:
    found, clock = pace(1)
    with found.storing(10 * MB):
        clock.now += 1.0
        with found.storing(10 * MB):
            clock.now += 1.0
    clock.now += 1000.0
    store(found, clock, 1.0, 10 * MB)
    rate = found.rates()[1]
    assert rate is not None
    assert abs(rate - 10 * MB) < MB


def test_a_chunk_that_could_not_be_stored_took_its_time() -> None:
    found, clock = pace(1)
    try:
        with found.storing(MB):
            clock.now += 1.0
            raise OSError  # noqa: TRY301
    except OSError:
        pass
    assert found.rates()[1] == 0.0
    store(found, clock, 1.0, MB)
    rate = found.rates()[1]
    assert rate is not None
    assert abs(rate - MB / 2) < MB / 20


def test_where_it_is_urgent_only_what_is_known_to_keep_up_is_coded() -> None:
    found, clock = pace(1)
    assert not found.is_worth_coding(is_urgent=True)
    code(found, clock, 0.03)
    assert not found.is_worth_coding(is_urgent=True), "nobody knows what the store takes"
    store(found, clock, 0.1)
    assert found.is_worth_coding(is_urgent=True)
    for _ in range(8):
        store(found, clock, 0.001)
    assert not any(found.is_worth_coding(is_urgent=True) for _ in range(40)), "nothing is tried out"
