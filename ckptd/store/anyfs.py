"""Any other service that fsspec knows: Google Cloud Storage, Azure, HDFS, SFTP and so on."""

from __future__ import annotations

import concurrent.futures
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from ckptd.errors import (
    CkptdError,
    ConfigError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from ckptd.store.base import Buffer, Entry, check_range
from ckptd.store.client import Limits, Page
from ckptd.store.codes import Answer, translate
from ckptd.store.loop import LoopThread

CONDITIONAL = frozenset({"gs", "gcs", "az", "abfs", "abfss"})
"""Protocols whose file systems pass ``mode="create"`` on to the service: gcsfs as
``ifGenerationMatch=0``, adlfs as ``If-None-Match: *``. All others look first and then write."""

_CLOCK = "tmp/clock-"
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
_THREADS = 16


class FsspecClient:
    """See `ObjectClient`. Objects below `path` of an fsspec file system.

    An asynchronous file system runs on a loop of this client's own; the calls of another one run on
    threads, of which one that hangs is left behind at its deadline.
    """

    is_versioned = False

    def __init__(
        self, protocol: str, path: str, options: Mapping[str, object], limits: Limits
    ) -> None:
        self._url = f"{protocol}://{path}"
        self._path = path.rstrip("/")
        self._limits = limits
        kind = _file_system(protocol)
        chosen = {**options, "skip_instance_cache": True, "use_listings_cache": False}
        self._loop: LoopThread | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        if issubclass(kind, AsyncFileSystem):
            self._loop = LoopThread(f"ckptd-{protocol}")
            chosen |= {"asynchronous": True, "loop": self._loop.loop}
        else:
            self._pool = concurrent.futures.ThreadPoolExecutor(
                _THREADS, thread_name_prefix=f"ckptd-{protocol}"
            )
        try:
            self._files = kind(**chosen)
        except Exception as error:
            self.close()
            if isinstance(error, (TypeError, ValueError)):
                raise ConfigError(
                    f"{kind.__name__} does not take storage_options {sorted(options)}"
                ) from None
            raise self._error("", error) from error  # some connect at once

    def put(self, key: str, data: Buffer, *, if_absent: bool) -> bool:
        """See `ObjectClient.put`."""
        raw = bytes(data)
        mode = {"mode": "create"} if if_absent else {}
        with self._border(key):
            self._call("pipe_file", key, raw, count=len(raw), **mode)
        return True

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        size = self.size(key)
        if size > max_bytes:
            raise StoreError(key, f"{size} bytes, more than the {max_bytes} allowed")
        with self._border(key):
            raw = self._call("cat_file", key, count=size)
        if len(raw) != size:
            raise StoreUnavailableError(key, f"{self._url} sent {len(raw)} of {size} bytes")
        return bytes(raw)

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`."""
        size = self.size(key)
        check_range(key, offset, out.nbytes, size)
        end = offset + out.nbytes
        with self._border(key):
            raw = self._call("cat_file", key, count=out.nbytes, start=offset, end=end)
        if len(raw) != out.nbytes:
            raise StoreUnavailableError(key, f"{self._url} sent {len(raw)} of {out.nbytes} bytes")
        out[:] = raw
        return size

    def size(self, key: str) -> int:
        """See `ObjectClient.size`."""
        with self._border(key):
            found = self._call("info", key)
        if found.get("type", "file") != "file":
            raise ObjectNotFoundError(key, f"not found in {self._url}")
        return int(found["size"])

    def page(self, prefix: str, after: str | None) -> Page:
        """See `ObjectClient.page`: one page has all, since fsspec gives them so."""
        del after
        self._files.invalidate_cache()
        try:
            with self._border(prefix):
                found = self._call("find", prefix.rstrip("/"), detail=True, withdirs=False)
        except ObjectNotFoundError:
            return Page([], None)  # a folder that is not there has nothing in it
        skipped = len(self._files._strip_protocol(self._path)) + 1  # noqa: SLF001
        rows = [Entry(name[skipped:], row["size"], _time(name, row)) for name, row in found.items()]
        return Page(sorted(rows), None)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._border(key):
            self._call("rm_file", key)

    def now_s(self) -> float:
        """See `Store.now_s`: the time of an object that is made and deleted for it."""
        key = _CLOCK + secrets.token_hex(8)
        with self._border(key):
            self._call("pipe_file", key, b"")
            try:
                return _time(key, self._call("info", key))
            finally:
                self._call("rm_file", key)

    def renew(self) -> None:
        """See `ObjectClient.renew`: these file systems look for themselves."""

    def close(self) -> None:
        """See `Store.close`."""
        if self._loop is not None:
            self._loop.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _call(self, name: str, key: str, *args: Any, count: int = 0, **kwargs: Any) -> Any:
        path = f"{self._path}/{key}" if key else self._path
        timeout_s = self._limits.timeout_s(count)
        if self._loop is not None:
            return self._loop.run(
                getattr(self._files, "_" + name)(path, *args, **kwargs), timeout_s
            )
        assert self._pool is not None
        future = self._pool.submit(getattr(self._files, name), path, *args, **kwargs)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {timeout_s:.0f} s") from None

    @contextmanager
    def _border(self, key: str) -> Iterator[None]:
        """Translate each error of the libraries below into one of ours that names `key`."""
        try:
            yield
        except CkptdError:
            raise
        except FileNotFoundError as error:
            raise ObjectNotFoundError(key, f"not found in {self._url}") from error
        except FileExistsError as error:
            raise ObjectExistsError(key, "exists already") from error
        except PermissionError as error:
            raise StoreAccessDeniedError(
                key, f"{self._url} does not allow that ({error})"
            ) from error
        except Exception as error:
            raise self._error(key, error) from error

    def _error(self, key: str, error: Exception) -> StoreError:
        for name in ("code", "status", "status_code"):
            status = getattr(error, name, None)
            if isinstance(status, int) and 300 <= status < 600:
                return translate(Answer(status, "", str(error)), key)
        why = str(error) or type(error).__name__
        return StoreUnavailableError(key, f"{self._url} failed ({why}); it may work again later")


def _file_system(protocol: str) -> Any:
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:  # fsspec says what to install
        raise ConfigError(f"{protocol}:// cannot be used yet: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{protocol}:// is nothing that fsspec knows; check the URL") from error


def _time(name: str, row: Mapping[str, Any]) -> float:
    for column in _TIMES:
        value = row.get(column)
        if isinstance(value, str):
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    raise StoreError(name, "this store does not say when an object was made")
