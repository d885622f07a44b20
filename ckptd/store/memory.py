"""A store in the memory of this process: for tests, and for trying things out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckptd.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from ckptd.store.base import NEAR, Buffer, Entry, check_range
from ckptd.store.walk import check_key, check_prefix

_shared: dict[str, MemoryStore] = {}
_shared_lock = threading.Lock()  # guards _shared


class MemoryStore:
    """Objects in a dict. `clock` gives the time of the store, in seconds since 1970."""

    traits = NEAR
    has_conditional_put = True
    keeps_deleted = False

    def __init__(
        self, url: str = "memory://private", *, clock: Callable[[], float] = time.time
    ) -> None:
        self.url = url
        self._clock = clock
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()  # guards _objects

    @classmethod
    def shared(cls, url: str) -> MemoryStore:
        """Return the one store of this process that has this URL."""
        with _shared_lock:
            return _shared.setdefault(url, cls(url))

    def put(self, key: str, data: Buffer) -> None:
        """See `Store.put`."""
        check_key(key)
        with self._lock:
            self._objects[key] = (bytes(data), self._clock())

    def put_new(self, key: str, data: Buffer, *, is_deferred: bool = False) -> None:
        """See `Store.put_new`. Nothing here outlives the process, so nothing is deferred."""
        del is_deferred
        check_key(key)
        with self._lock:
            if key in self._objects:
                raise ObjectExistsError(key, "exists already")
            self._objects[key] = (bytes(data), self._clock())

    def sync(self) -> None:
        """See `Store.sync`."""

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        data = self._find(key)
        if len(data) > max_bytes:
            raise StoreError(key, f"{len(data)} bytes, more than the {max_bytes} allowed")
        return data

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`."""
        data = self._find(key)
        check_range(key, offset, len(out), len(data))
        out[:] = data[offset : offset + len(out)]
        return len(data)

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`."""
        check_prefix(prefix)
        with self._lock:
            rows = [(key, len(d), t) for key, (d, t) in self._objects.items()]
        return iter(sorted(Entry(*row) for row in rows if row[0].startswith(prefix)))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def now_s(self) -> float:
        """See `Store.now_s`."""
        return self._clock()

    @contextmanager
    def batch(self) -> Iterator[MemoryStore]:
        """See `Store.batch`."""
        yield self

    def close(self) -> None:
        """See `Store.close`. A shared store keeps its objects."""

    def _find(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            if key not in self._objects:
                raise ObjectNotFoundError(key, f"not found in {self.url}")
            return self._objects[key][0]
