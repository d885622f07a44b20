from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ckptd.errors import StoreAccessDeniedError, StoreError, StoreUnavailableError
from ckptd.store.retry import retrying


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now_s += seconds


def failing(times: int, error: StoreError, calls: list[int]) -> Callable[[], str]:
    def operation() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return "done"

    return operation


def run(
    operation: Callable[[], str],
    time: Time,
    *,
    attempts: int = 5,
    total_s: float = 1e9,
    seed: int = 1,
) -> str:
    return retrying(
        operation,
        attempts=attempts,
        total_s=total_s,
        sleep=time.sleep,
        rng=random.Random(seed),
        clock=lambda: time.now_s,
    )


DOWN = StoreUnavailableError("ranks/1", "down")


def test_p7_what_passes_is_tried_again() -> None:
    calls: list[int] = []
    assert run(failing(4, DOWN, calls), Time()) == "done"
    assert len(calls) == 5


def test_p7_attempts_are_counted_and_the_last_error_is_raised() -> None:
    calls: list[int] = []
    time = Time()
    with pytest.raises(StoreUnavailableError) as caught:
        run(failing(99, DOWN, calls), time)
    assert caught.value is DOWN
    assert len(calls) == 5
    assert len(time.waits) == 4


@pytest.mark.parametrize("error", [StoreAccessDeniedError("k", "no"), StoreError("k", "odd")])
def test_p7_what_does_not_pass_is_raised_at_once(error: StoreError) -> None:
    calls: list[int] = []
    with pytest.raises(StoreError):
        run(failing(99, error, calls), Time())
    assert len(calls) == 1


def test_p7_other_errors_are_not_caught() -> None:
    def operation() -> str:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run(operation, Time())


@pytest.mark.parametrize("seed", range(20))
def test_p7_no_attempt_starts_after_the_total(seed: int) -> None:
    time = Time()
    with pytest.raises(StoreUnavailableError):
        run(failing(10**6, DOWN, []), time, attempts=10**6, total_s=30.0, seed=seed)
    assert time.now_s <= 30.0
    assert len(time.waits) >= 4


def test_p7_waits_are_jittered_and_bounded() -> None:
    seen = []
    for seed in range(50):
        time = Time()
        with pytest.raises(StoreUnavailableError):
            run(failing(99, DOWN, []), time, attempts=12, seed=seed)
        seen.append(time.waits)
    bounds = [min(0.2 * 2**n, 20.0) for n in range(11)]
    assert all(0 <= w <= b for waits in seen for w, b in zip(waits, bounds, strict=True))
    assert all(len({waits[n] for waits in seen}) == 50 for n in range(11))
    assert max(waits[10] for waits in seen) > 10.0


def test_no_attempt_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        run(lambda: "x", Time(), attempts=0)
