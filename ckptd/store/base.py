"""The one interface to where checkpoints live, and all that it promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from ckptd.errors import StoreError

Buffer = bytes | bytearray | memoryview


class Entry(NamedTuple):
    """An object in a listing. `modified_s` is the store's own time, in seconds since 1970."""

    key: str
    bytes: int
    modified_s: float


class Traits(NamedTuple):
    """How a store is best used.

    `requests` calls are worth having under way at once, `window_bytes` worth reading in one call,
    and `budget_bytes` worth holding while they are being stored. A patient store tries again by
    itself what may pass: nobody else should.
    """

    requests: int
    window_bytes: int
    budget_bytes: int
    is_patient: bool


CHUNK_ROOM_BYTES = 33 << 20
"""What a chunk of the usual size takes, coded and with its header, at most."""

# A window is large enough for a disk and small enough to stay in a processor's last cache until it
# is decoded; four chunks are two that are coded while two are stored.
NEAR = Traits(requests=4, window_bytes=2 << 20, budget_bytes=4 * CHUNK_ROOM_BYTES, is_patient=False)
"""Of a store in this machine, or as near as a folder."""


class Store(Protocol):
    """Objects under keys (`ckptd.model.keys`), below one root.

    All methods may be called from any thread. Every error is a `ckptd.errors.StoreError` that names
    the key; a key outside of the grammar raises `ValueError` before anything is touched. A method
    that raises left nothing visible, `put_new` of an unknown outcome excepted: the caller reads
    back. Each method ends within the store's own deadline.

    Attributes:
        url: what a person would type to reach this root.
        traits: how it is best used.
        has_conditional_put: whether of racing `put_new` exactly one wins, whoever calls. False may
            be known only after a `put_new`; then only rank 0's daemon may end steps.
    """

    url: str
    traits: Traits
    has_conditional_put: bool

    @property
    def keeps_deleted(self) -> bool:
        """Whether the store is known to keep what is deleted or replaced (a versioned bucket)."""

    def put(self, key: str, data: Buffer) -> None:
        """Create or replace an object, atomically, durable on return.

        Raises:
            StoreAccessDeniedError, StoreFullError, StoreUnavailableError: nothing changed.
        """

    def put_new(self, key: str, data: Buffer, *, is_deferred: bool = False) -> None:
        """Create an object whole, or not at all, if `key` is absent: of racing callers one wins.

        With `is_deferred` the object is visible on return but durable only after `sync`; an
        existing object raises just the same and becomes durable with that `sync` too.

        Raises:
            ObjectExistsError: `key` exists; it was not touched.
            StoreAccessDeniedError, StoreFullError, StoreUnavailableError: nothing was created,
                except that an unavailable store may have acted: read back.
        """

    def sync(self) -> None:
        """Make all deferred objects of this process durable.

        Raises:
            StoreError: some may not be durable. All deferred objects that this store created since
                the last `sync` were taken away again, so that they can be written anew.
        """

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """Return an object whole.

        Raises:
            ObjectNotFoundError: the store answered that there is none.
            StoreError: it is larger than `max_bytes` (nothing was read into memory).
            StoreAccessDeniedError, StoreUnavailableError: the store did not answer that.
        """

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """Fill `out` with an object's bytes from `offset` on; return the length of the whole object.

        Raises:
            ObjectNotFoundError: the store answered that there is none.
            StoreError: that range leaves the object; what is in `out` must not be used.
            StoreAccessDeniedError, StoreUnavailableError: the store did not answer that.
        """

    def list(self, prefix: str) -> Iterator[Entry]:
        """List the objects whose keys start with `prefix`, sorted by key, as the store is now.

        `prefix` is empty or ends with ``/``. Names that are not keys are left out.

        Raises:
            StoreAccessDeniedError, StoreUnavailableError: the listing is not complete.
        """

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is fine.

        Raises:
            StoreAccessDeniedError, StoreUnavailableError: it may still be there.
        """

    def now_s(self) -> float:
        """Return the store's own clock, in seconds since 1970; ages are counted from it.

        It may be late by up to a second against `Entry.modified_s`.

        Raises:
            StoreAccessDeniedError, StoreUnavailableError: the store did not tell.
        """

    def batch(self) -> AbstractContextManager[Store]:
        """Give a store of the same root with deferred objects of its own, for one thread's block.

        A `sync` that fails takes away what this batch deferred, and nothing of anybody else.
        """

    def close(self) -> None:
        """Release connections, threads and descriptors. May be repeated."""


def check_range(key: str, offset: int, length: int, size: int) -> None:
    """Check that a range lies in an object of `size` bytes.

    Raises:
        StoreError: it does not.
    """
    if offset < 0 or offset + length > size:
        raise StoreError(key, f"range {offset}+{length} leaves its {size} bytes")
