"""Stores that fail, die or keep a log, around a real one."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

from ckptd.errors import StoreError, StoreUnavailableError
from ckptd.store.base import Buffer, Entry, Store


class Crashed(Exception):
    """The process that used this store is dead from here on."""


class Op(NamedTuple):
    """A call of a store: the method and the key, the prefix or nothing."""

    name: str
    key: str


class _Around:
    """Hands every call to `_inner`, with `_before` and `_after` around it."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url
        self.traits = inner.traits
        self.has_conditional_put = inner.has_conditional_put

    def _before(self, op: Op) -> None:
        """Raise, or let the call happen."""

    def _after(self, op: Op) -> None:
        """Raise although the call happened, or let it return."""

    def put(self, key: str, data: Buffer) -> None:
        op = Op("put", key)
        self._before(op)
        self.inner.put(key, data)
        self._after(op)

    def put_new(self, key: str, data: Buffer, *, is_deferred: bool = False) -> None:
        op = Op("put_deferred" if is_deferred else "put_new", key)
        self._before(op)
        self.inner.put_new(key, data, is_deferred=is_deferred)
        self._after(op)

    def sync(self) -> None:
        op = Op("sync", "")
        self._before(op)
        self.inner.sync()
        self._after(op)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        op = Op("get", key)
        self._before(op)
        data = self.inner.get(key, max_bytes=max_bytes)
        self._after(op)
        return data

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        op = Op("read_into", key)
        self._before(op)
        size = self.inner.read_into(key, offset, out)
        self._after(op)
        return size

    def list(self, prefix: str) -> Iterator[Entry]:
        op = Op("list", prefix)
        self._before(op)
        entries = self.inner.list(prefix)
        self._after(op)
        return entries

    def delete(self, key: str) -> None:
        op = Op("delete", key)
        self._before(op)
        self.inner.delete(key)
        self._after(op)

    def now_s(self) -> float:
        return self.inner.now_s()

    @property
    def keeps_deleted(self) -> bool:
        return self.inner.keeps_deleted

    @contextmanager
    def batch(self) -> Iterator[Store]:
        op = Op("batch", "")
        self._before(op)
        with self.inner.batch() as inner:
            self._after(op)
            yield _Batch(self, inner)

    def close(self) -> None:
        self.inner.close()


class _Batch(_Around):
    """A batch of a store, with what is around that."""

    def __init__(self, outer: _Around, inner: Store) -> None:
        super().__init__(inner)
        self._outer = outer

    def _before(self, op: Op) -> None:
        self._outer._before(op)

    def _after(self, op: Op) -> None:
        self._outer._after(op)


WRITES = frozenset({"put", "put_new", "put_deferred", "sync", "delete"})


class CrashingStore(_Around):
    """Does `writes` writing calls; the next one raises `Crashed`, and so does every call after it.

    With ``crash="after"`` the call that crashes has acted. Deletions and `sync` count as writes.
    """

    def __init__(
        self, inner: Store, writes: int, *, crash: Literal["before", "after"] = "before"
    ) -> None:
        super().__init__(inner)
        self._left = writes
        self._crash = crash
        self._is_dead = False
        self._lock = threading.Lock()  # guards the counter

    @property
    def is_dead(self) -> bool:
        """Whether the crash has come: False means that `writes` was more than there were."""
        return self._is_dead

    def _before(self, op: Op) -> None:
        with self._lock:
            if not self._is_dead and op.name in WRITES:
                self._left -= 1
                if self._left >= 0 or self._crash == "after":
                    return
                self._is_dead = True
            if self._is_dead:
                raise Crashed(f"before {op.name} {op.key}")

    def _after(self, op: Op) -> None:
        with self._lock:
            if op.name in WRITES and self._left < 0:
                self._is_dead = True
                raise Crashed(f"after {op.name} {op.key}")


class FlakyStore(_Around):
    """Fails calls at random, each failure before or after the call acted.

    `rates` gives the probability of failure by operation (``put``, ``put_new``, ``put_deferred``,
    ``sync``, ``get``, ``read_into``, ``list``, ``delete``); what it leaves out never fails.
    `acted` is the share of failures that come after the call acted: a lost answer.
    """

    def __init__(
        self, inner: Store, rates: Mapping[str, float], *, seed: int, acted: float = 0.0
    ) -> None:
        super().__init__(inner)
        self.failures = 0
        self._rates = dict(rates)
        self._acted = acted
        self._rng = random.Random(seed)
        self._lock = threading.Lock()  # guards _rng and failures

    def _before(self, op: Op) -> None:
        self._fail(op, self._rates.get(op.name, 0.0) * (1 - self._acted))

    def _after(self, op: Op) -> None:
        self._fail(op, self._rates.get(op.name, 0.0) * self._acted)

    def _fail(self, op: Op, rate: float) -> None:
        with self._lock:
            if self._rng.random() >= rate:
                return
            self.failures += 1
        raise StoreUnavailableError(op.key, f"flaky {op.name}")


class RecordingStore(_Around):
    """Keeps a log of the calls that returned; `attempted` also has those that raised."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.attempted: list[Op] = []
        self.ops: list[Op] = []

    @property
    def writes(self) -> list[Op]:
        """The calls that changed something, or made it durable, in order."""
        return [op for op in self.ops if op.name in WRITES]

    def _before(self, op: Op) -> None:
        self.attempted.append(op)

    def _after(self, op: Op) -> None:
        self.ops.append(op)


class FailingStore(_Around):
    """Raises `error` from the calls of `names`, as long as it is in `is_failing`."""

    def __init__(self, inner: Store, names: frozenset[str], error: StoreError) -> None:
        super().__init__(inner)
        self.is_failing = True
        self._names = names
        self._error = error

    def _before(self, op: Op) -> None:
        if self.is_failing and op.name in self._names:
            raise self._error
