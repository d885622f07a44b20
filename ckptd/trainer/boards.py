"""Boards: the few small keys over which the ranks of a job meet, in memory or in torch's own store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch.distributed as dist

from ckptd.errors import MeetingError

if TYPE_CHECKING:  # torch.distributed exports these names, but not in its types
    from torch._C._distributed_c10d import Store, TCPStore
elif dist.is_available():
    from torch.distributed import Store, TCPStore

_T = TypeVar("_T")

# The server of torch 2.13 drops a client that sends more than 8 MiB in one message (seen).
MAX_VALUE_BYTES = 7 << 20
OPERATION_TIMEOUT_S = 20.0


class Board(Protocol):
    """Keys that all ranks of a job see. All methods may be called from any thread.

    Every method raises `MeetingError` when the board does not answer within its own deadline.
    """

    def set(self, key: str, value: bytes) -> None:
        """Create or replace a value of at most `MAX_VALUE_BYTES`."""

    def has_all(self, keys: Sequence[str]) -> bool:
        """Tell, in one round trip and without waiting, whether every key exists."""

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values now, None for each key that is absent.

        A key must not be deleted while it may be read: the answer may then take a deadline.
        """

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        """Wait until every key exists.

        Raises:
            MeetingError: naming the keys that are absent after `timeout_s`.
        """

    def delete(self, key: str) -> None:
        """Delete a key; one that is not there is fine."""

    def close(self) -> None:
        """Release the connection. May be repeated."""


class LocalBoard:
    """A board in memory: for one process, whose threads may stand for ranks."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()  # guards _values

    def set(self, key: str, value: bytes) -> None:
        """See `Board`."""
        _check_size(key, value)
        with self._changed:
            self._values[key] = bytes(value)
            self._changed.notify_all()

    def has_all(self, keys: Sequence[str]) -> bool:
        """See `Board`."""
        with self._changed:
            return all(key in self._values for key in keys)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Board`."""
        with self._changed:
            return [self._values.get(key) for key in keys]

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        """See `Board`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._values.keys() >= set(keys), timeout_s):
                raise _absent([key for key in keys if key not in self._values], timeout_s)

    def delete(self, key: str) -> None:
        """See `Board`."""
        with self._changed:
            self._values.pop(key, None)

    def close(self) -> None:
        """See `Board`."""


class StoreBoard:
    """A board over a store of torch. `connect` returns it, at first use and after each error.

    After a deadline the connection may be in the middle of an answer, so it is never used again.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._store: Store | None = None
        self._lock = threading.Lock()  # guards _store and its one connection, for one short request

    def set(self, key: str, value: bytes) -> None:
        """See `Board`."""
        _check_size(key, value)
        # The type stub of torch says str; the binding takes bytes as they are (2.6 and later).
        self._ask(lambda store: store.set(key, value))  # type: ignore[arg-type]

    def has_all(self, keys: Sequence[str]) -> bool:
        """See `Board`."""
        names = list(keys)
        return not names or self._ask(lambda store: bool(store.check(names)))

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Board`."""
        names = self._present(list(dict.fromkeys(keys)))
        if not names:
            return [None] * len(keys)
        values = dict(zip(names, self._ask(lambda store: store.multi_get(names)), strict=True))
        return [values.get(key) for key in keys]

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        """See `Board`. Polls, because a blocking wait would keep the one connection from others."""
        deadline, delay_s = time.monotonic() + timeout_s, 0.001
        while not self.has_all(keys):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise _absent([key for key in keys if not self.has_all([key])], timeout_s)
            time.sleep(min(delay_s, left_s))
            delay_s = min(2 * delay_s, 0.05)

    def delete(self, key: str) -> None:
        """See `Board`."""
        self._ask(lambda store: store.delete_key(key))

    def close(self) -> None:
        """See `Board`."""
        with self._lock:
            self._store = None

    def _present(self, keys: list[str]) -> list[str]:
        """Return the keys that exist. By halves: few are absent, or nearly all."""
        if self.has_all(keys):
            return keys
        half = len(keys) // 2
        return self._present(keys[:half]) + self._present(keys[half:]) if half else []

    def _ask(self, request: Callable[[Store], _T]) -> _T:
        with self._lock:
            try:
                if self._store is None:
                    self._store = self._connect()
                return request(self._store)
            except RuntimeError as error:  # DistNetworkError and DistStoreError are RuntimeErrors
                self._store = None
                raise MeetingError(
                    f"the store of the job does not answer; is the process of rank 0 alive? {error}"
                ) from error


class TcpBoard(StoreBoard):
    """A board over a connection of its own to the TCPStore server at `host` and `port`."""

    def __init__(self, host: str, port: int, timeout_s: float = OPERATION_TIMEOUT_S) -> None:
        super().__init__(
            lambda: TCPStore(
                host,
                port,
                is_master=False,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        )


def _check_size(key: str, value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise MeetingError(f"{key}: {len(value)} bytes; ranks tell each other {MAX_VALUE_BYTES}")


def _absent(keys: Sequence[str], timeout_s: float) -> MeetingError:
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return MeetingError(f"absent after {timeout_s:g} s: {', '.join(keys[:8])}{more}")
