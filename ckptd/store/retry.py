"""The one layer that tries store operations again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from ckptd.errors import StoreError

_FIRST_WAIT_S = 0.2
_MAX_WAIT_S = 20.0

T = TypeVar("T")


def retrying(
    operation: Callable[[], T],
    *,
    attempts: int,
    total_s: float,
    sleep: Callable[[float], None],
    rng: random.Random,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Return what `operation` returns, trying again after a retryable `StoreError`.

    Waits are drawn from zero to a bound that doubles ("full jitter",
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). `operation` has a
    deadline of its own; here no new attempt starts later than `total_s` after the first.

    Raises:
        StoreError: of the last attempt; one that is not retryable at once.
    """
    end_s = clock() + total_s
    bound_s = _FIRST_WAIT_S
    for left in range(attempts - 1, -1, -1):
        try:
            return operation()
        except StoreError as error:
            wait_s = rng.uniform(0, bound_s)
            if not error.retryable or not left or clock() + wait_s > end_s:
                raise
        sleep(wait_s)
        bound_s = min(2 * bound_s, _MAX_WAIT_S)
    raise ValueError("attempts must be at least 1")
