"""Whether coding keeps up with the store: what coding would delay is stored raw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# How much of the past counts: about the last eight chunks.
_MEMORY = 0.875
# While chunks are left raw, one of so many is coded all the same, to see whether that still delays.
_LOOK_AGAIN = 16


class Pace:
    """Measures coders and store of one daemon, in bytes per second of wall-clock time.

    Coding shortens what the store has to take, and takes time itself. As long as all `workers`
    together code raw bytes no slower than the store takes stored ones, the store never waits for
    them, and with fewer bytes a checkpoint is durable sooner. Else it is later than uncoded. Both
    rates change with what else the machine does, so they are measured all the time.

    For any thread. `clock` is monotonic, in seconds.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._workers = workers
        self._clock = clock
        self._coding = _Rate()
        self._storing = _Rate()
        self._left_raw = 0
        self._in_flight = 0
        self._busy_since = 0.0
        self._lock = threading.Lock()  # guards all of the above

    @contextmanager
    def coding(self, raw_bytes: int) -> Iterator[None]:
        """Measure the coding of a chunk, on the thread that codes it."""
        began = self._clock()
        yield
        with self._lock:
            self._coding.add(raw_bytes, self._clock() - began)

    @contextmanager
    def storing(self, stored_bytes: int) -> Iterator[None]:
        """Measure the storing of a chunk. Time in which several are stored counts once."""
        with self._lock:
            if not self._in_flight:
                self._busy_since = self._clock()
            self._in_flight += 1
        done_bytes = 0
        try:
            yield
            done_bytes = stored_bytes
        finally:
            with self._lock:
                now = self._clock()
                self._in_flight -= 1
                self._storing.add(done_bytes, now - self._busy_since)
                self._busy_since = now

    def is_worth_coding(self, *, is_urgent: bool = False) -> bool:
        """Decide for the next chunk; what nobody has measured yet is worth it.

        Nothing is tried out where it `is_urgent`: only what is known to keep up is coded then.
        """
        with self._lock:
            coding, storing = self._coding.value, self._storing.value
            if coding is None or storing is None:
                return not is_urgent
            if self._workers * coding >= storing:
                self._left_raw = 0
                return True
            if is_urgent:
                return False
            self._left_raw += 1
            return self._left_raw % _LOOK_AGAIN == 0

    def rates(self) -> tuple[float | None, float | None]:
        """Return what one worker codes and what the store takes, None if that is not known yet."""
        with self._lock:
            return self._coding.value, self._storing.value


class _Rate:
    def __init__(self) -> None:
        self._bytes = 0.0
        self._s = 0.0

    @property
    def value(self) -> float | None:
        return self._bytes / self._s if self._s > 0 else None

    def add(self, count: int, span_s: float) -> None:
        self._bytes = self._bytes * _MEMORY + count
        self._s = self._s * _MEMORY + max(span_s, 1e-9)
