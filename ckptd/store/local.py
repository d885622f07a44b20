"""A root that is a folder of a file system: local disk, NFS, Lustre and the like.

The order of each write is what makes it survive a power loss: the bytes of the file are flushed
before it gets its name, and the name is flushed before the call returns or, for deferred objects,
in `sync`. Flushing each file as it is written costs 0.2 ms beside the 20 ms that 32 MiB take with
O_DIRECT, reports errors on the descriptor that wrote, and leaves `sync` only the folders, at most
256 of them. `syncfs` instead would wait for everything that anyone on the machine has in memory.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from ckptd import failpoints
from ckptd.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessDeniedError,
    StoreError,
)
from ckptd.model import keys
from ckptd.store import direct
from ckptd.store.base import NEAR, Buffer, Entry, check_range
from ckptd.store.errnos import border
from ckptd.store.folders import Folders
from ckptd.store.temps import TMP, Temp, Temps
from ckptd.store.walk import check_prefix, walk

# O_NONBLOCK: somebody's FIFO under a key must not hang a reader.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OWN_NAMES = frozenset({TMP, "lost+found"})


class LocalStore:
    """Objects as files below one folder, which is opened at the first use and then kept.

    See `ckptd.store.base.Store` for what each method promises. The folder is made by the first
    write. `is_direct` and `is_unnamed` allow O_DIRECT and O_TMPFILE where the system has them;
    `clock` stands in for the file system's clock where that cannot be asked.
    """

    traits = NEAR
    has_conditional_put = True
    keeps_deleted = False

    def __init__(
        self,
        path: str,
        *,
        is_direct: bool = True,
        is_unnamed: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.url = path
        self._clock = clock
        self._is_direct = is_direct and direct.HAS_DIRECT
        self._is_unnamed = is_unnamed
        self._folders = Folders(path)
        self._temps = Temps(self._folders, is_unnamed=is_unnamed)
        self._created: set[str] = set()
        self._unsynced: set[str] = set()
        self._lock = threading.Lock()  # guards the two above
        self._sync_lock = threading.Lock()  # held for a whole sync: a second one waits for it

    def put(self, key: str, data: Buffer) -> None:
        """See `Store.put`. If the folder cannot be flushed, this raises and the new bytes stay."""
        folder, name = _split(key)
        with (
            border(key, self.url),
            self._folders.open(folder, create=True) as at,
            self._temps.make_named() as temp,
        ):
            self._fill(temp, data)
            failpoints.hit("store.link")
            temp.rename(at, name)
            temp.close()
            self._folders.settle(self._folders.unsettled(folder))

    def put_new(self, key: str, data: Buffer, *, is_deferred: bool = False) -> None:
        """See `Store.put_new`."""
        folder, name = _split(key)
        with border(key, self.url), self._folders.open(folder, create=True) as at:
            is_new = not _is_there(at, name) and self._create(at, name, data)
            try:
                self._keep(key, is_new=is_new, is_deferred=is_deferred)
            except OSError:
                if is_new:
                    _remove(at, name)
                raise
        if not is_new:
            raise ObjectExistsError(key, "exists already")

    def sync(self) -> None:
        """See `Store.sync`."""
        with self._sync_lock:
            with self._lock:
                created, self._created = self._created, set()
                unsynced, self._unsynced = self._unsynced, set()
            try:
                with border("", self.url):
                    failpoints.hit("store.sync")
                    # Folders before those that hold them.
                    self._folders.settle(sorted(unsynced, reverse=True))
            except Exception:
                self._take_away(created)
                raise

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        with self._reading(key) as (fd, size):
            if size > max_bytes:
                raise StoreError(key, f"{size} bytes, more than the {max_bytes} allowed")
            data = bytearray(size)
            _read(fd, key, 0, memoryview(data))
            return bytes(data)

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`. Through the page cache: ranks of a node read each byte once."""
        with self._reading(key) as (fd, size):
            check_range(key, offset, len(out), size)
            _read(fd, key, offset, out)
            return size

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`. Reads one folder at a time."""
        check_prefix(prefix)
        return self._list(prefix)

    def delete(self, key: str) -> None:
        """See `Store.delete`. A deletion that a power loss undoes is done again by the caller."""
        folder, name = _split(key)
        with border(key, self.url):
            try:
                with self._folders.open(folder) as at:
                    os.unlink(name, dir_fd=at)
            except FileNotFoundError:
                self._folders.check_root(key)
        if "/" in folder and not folder.startswith(keys.CHUNKS):
            self._folders.remove_empty(folder)  # else each swept step would leave one behind

    def now_s(self) -> float:
        """See `Store.now_s`: the time that the file system gives to a new file.

        A root that refuses writes has nothing deleted by age, so this machine's clock will do there.
        """
        try:
            with (
                border("", self.url),
                self._folders.open("") as at,
                self._temps.make(at) as temp,
            ):
                return os.fstat(temp.fd).st_mtime
        except StoreAccessDeniedError:
            return self._clock()

    @contextmanager
    def batch(self) -> Iterator[LocalStore]:
        """See `Store.batch`."""
        store = LocalStore(
            self.url, is_direct=self._is_direct, is_unnamed=self._is_unnamed, clock=self._clock
        )
        try:
            yield store
        finally:
            store.close()

    def close(self) -> None:
        """See `Store.close`. No other thread may be inside of a method."""
        self._folders.close()

    def check_writable(self) -> None:
        """Check that files can be made below the root.

        Raises:
            StoreAccessDeniedError, StoreFullError, StoreUnavailableError: they cannot.
        """
        with border("", self.url), self._temps.make_named():
            pass

    def strangers(self) -> tuple[str, ...]:
        """Return the names in the root folder that are not there before the first object is."""
        with border("", self.url):
            try:
                with self._folders.open("") as at:
                    return tuple(sorted(set(os.listdir(at)) - _OWN_NAMES))
            except FileNotFoundError:
                return ()

    def _create(self, at: int, name: str, data: Buffer) -> bool:
        """Write an object under a name that is free; tell whether this was the first to take it."""
        with self._temps.make(at) as temp:
            self._fill(temp, data)
            failpoints.hit("store.link")
            is_new = temp.link(at, name)
            try:
                temp.close()
            except OSError:
                if is_new:
                    _remove(at, name)
                raise
            return is_new

    def _fill(self, temp: Temp, data: Buffer) -> None:
        """Write all of `data` and make it durable."""
        view = memoryview(data).cast("B")
        failpoints.hit("store.write")
        is_large = len(view) >= direct.MIN_DIRECT_BYTES
        if not (self._is_direct and is_large and direct.write_direct(temp.fd, view)):
            self._is_direct = self._is_direct and not is_large  # refused once is refused for good
            direct.write_all(temp.fd, view)
        direct.flush(temp.fd)

    def _keep(self, key: str, *, is_new: bool, is_deferred: bool) -> None:
        """Make the name durable, now or in `sync`; also a name that somebody else just made."""
        folder, _ = _split(key)
        names = self._folders.unsettled(folder)
        if not is_deferred:
            self._folders.settle(names)
            return
        with self._lock:
            self._unsynced.update(names)
            if is_new:
                self._created.add(key)

    def _take_away(self, created: Iterable[str]) -> None:
        for key in created:
            with suppress(StoreError):  # the error that led here is the one to report
                self.delete(key)

    @contextmanager
    def _reading(self, key: str) -> Iterator[tuple[int, int]]:
        """Give descriptor and length of an object for the block."""
        folder, name = _split(key)
        with border(key, self.url):
            try:
                with self._folders.open(folder) as at:
                    fd = os.open(name, _READ, dir_fd=at)
            except FileNotFoundError:
                if self._folders.has_root:
                    self._folders.check_root(key)
                raise ObjectNotFoundError(key, f"not found in {self.url}") from None
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise StoreError(key, f"not a file in {self.url}")
                yield fd, found.st_size
            finally:
                os.close(fd)

    def _list(self, prefix: str) -> Iterator[Entry]:
        with border(prefix, self.url):
            yield from walk(self._folders, prefix.rstrip("/"))
            # Not before: a root that goes away under a listing makes it end early, not fail.
            self._folders.check_root(prefix)


def _split(key: str) -> tuple[str, str]:
    if not keys.is_key(key):
        raise ValueError(f"not a key: {key[:200]!r}")
    folder, _, name = key.rpartition("/")
    return folder, name


def _is_there(at: int, name: str) -> bool:
    # Opening asks an NFS server; a stat may be answered from a cache.
    try:
        os.close(os.open(name, _READ, dir_fd=at))
    except FileNotFoundError:
        return False
    return True


def _remove(at: int, name: str) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=at)


def _read(fd: int, key: str, offset: int, out: memoryview) -> None:
    """Fill `out`; the caller has checked that the file is that long."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], offset + done)
        if not count:
            raise StoreError(key, "became shorter while it was read")
        done += count
