"""A root in an object store: what all services have in common."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from ckptd.cores import usable_cores
from ckptd.errors import (
    CredentialsError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from ckptd.model import keys
from ckptd.store.base import CHUNK_ROOM_BYTES, Buffer, Entry, Traits, check_range
from ckptd.store.client import Limits, ObjectClient, Page
from ckptd.store.retry import retrying
from ckptd.store.walk import check_key, check_prefix
from ckptd.units import MIB

log = logging.getLogger(__name__)

# A chunk of the usual size is one request. A connection to a cloud's store carries some 50 to 100 MB/s.
_AT_ONCE = min(16, max(8, 2 * usable_cores()))
TRAITS = Traits(
    requests=_AT_ONCE,
    window_bytes=34 * MIB,
    budget_bytes=_AT_ONCE * CHUNK_ROOM_BYTES,
    is_patient=True,
)
_MAX_OFFSET = 1 << 50
_RENEW_S = 30.0
_LOCKS = 64

T = TypeVar("T")


class RemoteStore:
    """See `Store`. Every call is tried again by this layer and by none above or below it.

    `has_conditional_put` False, from the start or once the service has shown it, makes `put_new`
    look before it puts. Racing threads of this store still have one winner, other processes may not.
    """

    traits = TRAITS

    def __init__(
        self, url: str, client: ObjectClient, limits: Limits, *, has_conditional_put: bool = True
    ) -> None:
        self.url = url
        self.has_conditional_put = has_conditional_put
        self._client = client
        self._limits = limits
        self._is_proven = False  # conditions were obeyed once
        self._has_warned = False
        self._renewing = threading.Lock()  # guards `_renewals`, which counts them
        self._renewals = 0
        self._renewed_s = -_RENEW_S
        self._rng = random.Random()  # noqa: S311 - jitter
        self._locks = [threading.Lock() for _ in range(_LOCKS)]  # each guards some keys' `put_new`

    @property
    def keeps_deleted(self) -> bool:
        """See `Store.keeps_deleted`."""
        return self._client.is_versioned

    def put(self, key: str, data: Buffer) -> None:
        """See `Store.put`."""
        check_key(key)
        self._tried(lambda: self._client.put(key, data, if_absent=False))

    def put_new(self, key: str, data: Buffer, *, is_deferred: bool = False) -> None:
        """See `Store.put_new`. What the service has acknowledged is durable: nothing is deferred.

        After a lost answer "exists" may mean this very call, so the object is read back; a deferred
        one is not, because its callers look at what is there anyway.
        """
        check_key(key)
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            self._create(key, data)

        try:
            self._tried(attempt)
        except ObjectExistsError:
            if attempts == 1 or is_deferred or not self._holds(key, data):
                raise
        finally:
            self._note_versions()

    def sync(self) -> None:
        """See `Store.sync`."""

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        check_key(key)
        return self._tried(lambda: self._client.get(key, max_bytes=max_bytes))

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`."""
        check_key(key)
        if not 0 <= offset <= _MAX_OFFSET or not out.nbytes:
            size = self._tried(lambda: self._client.size(key))
            check_range(key, offset, out.nbytes, size)
            return size
        return self._tried(lambda: self._client.read_into(key, offset, out))

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`. A page is asked for when the one before it has been used."""
        check_prefix(prefix)
        return self._list(prefix)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        check_key(key)
        with suppress(ObjectNotFoundError):  # some services say so, if only to a second attempt
            self._tried(lambda: self._client.delete(key))

    def now_s(self) -> float:
        """See `Store.now_s`."""
        return self._tried(self._client.now_s)

    def check_condition(self, key: str, data: Buffer) -> bool:
        """Put an object that exists with the bytes it has; tell whether the condition was obeyed.

        Raises:
            StoreError: as `put`.
        """
        if self.has_conditional_put:
            try:
                self._tried(lambda: self._client.put(key, data, if_absent=True))
            except ObjectExistsError:
                self._is_proven = True
                return True
            self.has_conditional_put = False
        return False

    @contextmanager
    def batch(self) -> Iterator[RemoteStore]:
        """See `Store.batch`: with nothing deferred, there is nothing to keep apart."""
        yield self

    def close(self) -> None:
        """See `Store.close`."""
        self._client.close()

    def _note_versions(self) -> None:
        if self._client.is_versioned and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the bucket of %s keeps what is deleted (versioning): pruning frees nothing until "
                "a lifecycle rule ends old versions",
                self.url,
            )

    def _tried(self, operation: Callable[[], T]) -> T:
        """Return what `operation` returns; look for credentials once where they are not taken."""
        seen = self._renewals
        try:
            return self._retrying(operation)
        except CredentialsError as error:
            with self._renewing:
                if self._renewals != seen:
                    pass  # another thread looked since this call began
                elif time.monotonic() < self._renewed_s + _RENEW_S:
                    raise
                else:
                    log.warning("%s; looking for credentials anew", error)
                    self._client.renew()
                    self._renewals += 1
                    self._renewed_s = time.monotonic()
            return self._retrying(operation)

    def _retrying(self, operation: Callable[[], T]) -> T:
        return retrying(
            operation, attempts=self._limits.attempts, total_s=self._limits.retry_s,
            sleep=time.sleep, rng=self._rng,
        )  # fmt: skip

    def _create(self, key: str, data: Buffer) -> None:
        if self.has_conditional_put:
            if self._client.put(key, data, if_absent=True):
                return
            if self._is_proven:  # it has known them before: somebody in between answers
                raise StoreUnavailableError(key, "the store knows no conditional writes any more")
            self.has_conditional_put = False
        with self._locks[hash(key) % _LOCKS]:
            try:
                self._client.size(key)
            except ObjectNotFoundError:
                self._client.put(key, data, if_absent=False)
            else:
                raise ObjectExistsError(key, "exists already")

    def _holds(self, key: str, data: Buffer) -> bool:
        view = memoryview(data).cast("B")
        try:
            return self.get(key, max_bytes=view.nbytes) == view
        except StoreUnavailableError:
            raise
        except StoreError:  # longer, or deleted meanwhile
            return False

    def _page(self, prefix: str, after: str | None) -> Page:
        return self._tried(lambda: self._client.page(prefix, after))

    def _list(self, prefix: str) -> Iterator[Entry]:
        page = self._page(prefix, None)
        entries = page.entries
        # A directory bucket lists in no order:
        # https://docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html
        if entries != sorted(entries):
            while page.after is not None:
                page = self._page(prefix, page.after)
                entries += page.entries
            page = page._replace(after=None)
            entries.sort()
        last: str | None = None
        while True:
            for entry in entries:
                if last is not None and entry.key <= last:
                    raise StoreUnavailableError(prefix, f"{self.url} lists keys out of order")
                last = entry.key
                if entry.key.startswith(prefix) and keys.is_key(entry.key):
                    yield entry
            if page.after is None:
                return
            page = self._page(prefix, page.after)
            entries = page.entries
