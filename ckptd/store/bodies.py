"""Bodies of requests and answers that are the caller's own memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ckptd.errors import StoreUnavailableError

_SLICE_BYTES = 256 << 10
READ_BYTES = 256 << 10


class Body:
    """Bytes of the caller as the body of a request, sent without a copy of the whole.

    botocore takes what has `read`, `seek`, `tell` and a length; aiohttp what can be iterated over
    asynchronously, at its own pace. Each slice is a copy, since a connection that is being closed
    may still send what it was given while the caller's buffer has been used again.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def __len__(self) -> int:
        return self._view.nbytes

    def tell(self) -> int:
        """Return the place of the next `read`."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move that place; see `io.IOBase.seek`."""
        self._at = offset + (0, self._at, len(self))[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes."""
        end = len(self) if count is None or count < 0 else min(len(self), self._at + count)
        begin, self._at = self._at, max(self._at, end)
        return bytes(self._view[begin : self._at])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for begin in range(0, len(self), _SLICE_BYTES):
            yield bytes(self._view[begin : begin + _SLICE_BYTES])


class Target:
    """Memory of the caller that an answer is written into, until `end`."""

    def __init__(self, view: memoryview) -> None:
        self.wanted = view.nbytes
        self.count = 0
        self._view: memoryview | None = view

    def write(self, data: bytes) -> bool:
        """Take the next bytes; False if there are more than were asked for."""
        end = self.count + len(data)
        if self._view is None or end > self.wanted:
            return False
        self._view[self.count : end] = data
        self.count = end
        return True

    def check_whole(self, key: str) -> None:
        """Check that all has come that was asked for.

        Raises:
            StoreUnavailableError: it has not.
        """
        if self.count != self.wanted:
            raise StoreUnavailableError(
                key, f"the store sent {self.count} of {self.wanted} bytes; they may come later"
            )

    def end(self) -> None:
        """Never write again."""
        self._view = None


async def fill(body: Any, target: Target, key: str) -> None:
    """Read the body of an answer (aiobotocore's) into memory, all that is wanted and no more.

    Raises:
        StoreUnavailableError: the store sent another number of bytes.
    """
    while data := await body.read(READ_BYTES):  # what has come by now, at most so much
        if not target.write(data):
            body.close()
            raise StoreUnavailableError(key, "the store sent more bytes than were asked for")
    try:
        target.check_whole(key)
    except StoreUnavailableError:
        body.close()
        raise
