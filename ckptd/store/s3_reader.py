"""Ranges of objects on S3, read by threads: into the caller's memory, on all cores.

An event loop receives on one core, at about a gigabyte a second, and copies each byte twice more on
the way. Threads that wait in the kernel hold no lock of the interpreter meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

from ckptd.errors import StoreUnavailableError
from ckptd.store.base import check_range
from ckptd.store.bodies import READ_BYTES, Target
from ckptd.store.s3_settings import S3Settings

_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+)", re.ASCII)


class S3Reader:
    """Reads through a client of botocore, made of the same settings as the other one.

    Each request runs on a thread of its own, and whoever asked waits no longer than the deadline. What
    hangs then writes no more, and holds nobody up: not even the end of the process.
    """

    def __init__(self, settings: S3Settings, bucket: str) -> None:
        self._settings = settings
        self._bucket = bucket
        self._lock = threading.Lock()  # guards _client
        self._client: Any = None

    def read(self, name: str, key: str, offset: int, out: memoryview, timeout_s: float) -> int:
        """Fill `out` from `offset` on; return the length of the object `name`, which is `key` to us.

        Raises:
            TimeoutError: it took too long.
            StoreError, and what botocore raises: as `ObjectClient.read_into`.
        """
        target = Target(out)
        end_s = time.monotonic() + timeout_s
        done: concurrent.futures.Future[int] = concurrent.futures.Future()

        def work() -> None:
            try:
                done.set_result(self._fill(name, key, offset, target, end_s))
            except BaseException as error:  # noqa: BLE001 - raised by who waits
                done.set_exception(error)

        # In a context of its own: what a request remembers is not the next one's.
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(work,), name="ckptd-s3-read", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            work()
        try:
            size = done.result(timeout_s)
            if thread.ident is not None:
                thread.join()
            return size
        except concurrent.futures.TimeoutError:
            if done.done():
                raise  # its own
            raise TimeoutError(f"no answer within {timeout_s:.0f} s") from None
        finally:
            target.end()

    def renew(self) -> None:
        """Look for credentials anew with the next request."""
        with self._lock:
            self._client = None

    def close(self) -> None:
        """Close the connections. May be repeated."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _fill(self, name: str, key: str, offset: int, target: Target, end_s: float) -> int:
        client = self._connected()
        wanted = {"Bucket": self._bucket, "Key": name,
                  "Range": f"bytes={offset}-{offset + target.wanted - 1}"}  # fmt: skip
        answer = client.get_object(**self._settings.added_to(client.get_object, wanted))
        body = answer["Body"]
        try:
            size = size_of(answer, key, offset)
            check_range(key, offset, target.wanted, size)
            while data := body.read(READ_BYTES):
                if not target.write(data) or time.monotonic() > end_s:
                    break
            else:
                target.check_whole(key)
                return size
        except BaseException:
            body.close()  # not read to its end: the connection cannot be used again
            raise
        body.close()
        if time.monotonic() > end_s:
            raise TimeoutError("the answer came too slowly")
        raise StoreUnavailableError(key, "the store sent more bytes than were asked for")

    def _connected(self) -> Any:
        with self._lock:
            client = self._client
        if client is None:
            # Not under the lock: a program that finds credentials may hang.
            client = self._settings.make_plain_client()
            with self._lock:
                self._client = self._client or client
                client = self._client
        return client


def check_object(answer: Mapping[str, Any], key: str) -> None:
    """Check that an answer is an object: with status 200 may come an error, or another's page.

    Raises:
        StoreUnavailableError: it is none.
    """
    if not answer.get("ETag"):
        raise StoreUnavailableError(key, "what the store answered is no object")


def size_of(answer: Mapping[str, Any], key: str, offset: int = 0) -> int:
    """Return the length of the object of which an answer has a part, from `offset` on.

    Raises:
        StoreUnavailableError: it is no part from there.
    """
    check_object(answer, key)
    found = _RANGE.fullmatch(answer.get("ContentRange", ""))
    if int(found[1]) != offset if found else offset:
        raise StoreUnavailableError(key, "the store does not read the range that it was asked for")
    return int(found[2]) if found else int(answer["ContentLength"])
