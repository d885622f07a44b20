"""The folders of a local root: reached by descriptor, so that no link is ever followed."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from ckptd.errors import ConfigError, StoreAccessDeniedError, StoreUnavailableError
from ckptd.store.direct import flush

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o777  # what the umask leaves of it


class Folders:
    """Opens the folders below `path` and knows whose entries may not be durable yet.

    A folder is named by its path below the root, ``""`` being the root. All methods may be called
    from any thread; the root's own descriptor is opened once and kept until `close`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._root: int | None = None
        self._is_closed = False
        self._settled: set[str] = set()
        self._lock = threading.Lock()  # guards the three above

    @contextmanager
    def open(self, folder: str, *, create: bool = False) -> Iterator[int]:
        """Give a descriptor of `folder` for the block, making folders first if `create`.

        Raises:
            FileNotFoundError: a folder is missing, or the root itself.
            OSError: anything else that `openat` and `mkdirat` say.
        """
        # A fresh descriptor also of the root itself: listings share the position of a copied one.
        fd = os.open(".", _FLAGS, dir_fd=self._open_root(create=create))
        try:
            parts = folder.split("/") if folder else []
            for depth, name in enumerate(parts):
                try:
                    child = os.open(name, _FLAGS, dir_fd=fd)
                except FileNotFoundError:
                    if not create:
                        raise
                    self._forget("/".join(parts[: depth + 1]))
                    _make(name, fd)
                    child = os.open(name, _FLAGS, dir_fd=fd)
                os.close(fd)
                fd = child
            yield fd
        finally:
            os.close(fd)

    @property
    def has_root(self) -> bool:
        """Whether the root was there at some time."""
        with self._lock:
            return self._root is not None

    def check_root(self, key: str) -> None:
        """Check that the root still stands where it was opened: only then is "missing" an answer.

        Raises:
            StoreUnavailableError: it is missing, or was replaced or mounted over.
        """
        try:
            root = self._open_root(create=False)
            is_same = os.path.samestat(os.lstat(self.path), os.fstat(root))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise StoreUnavailableError(
                key,
                f"the folder {self.path} is missing or was replaced; bring it back or start again",
            )

    def unsettled(self, folder: str) -> list[str]:
        """Return what must be flushed, deepest first, for a new entry of `folder` to be durable.

        The way up to the root is part of it until `settle`, whoever made those folders: another
        process may have made one a moment ago and not have flushed its parent yet.
        """
        way = [folder]
        with self._lock:
            while way[-1] and way[-1] not in self._settled:
                way.append(way[-1].rpartition("/")[0])
        return way

    def settle(self, folders: Iterable[str]) -> None:
        """Flush `folders`.

        Raises:
            OSError: some may not be durable.
        """
        done = list(folders)
        for folder in done:
            with self.open(folder) as fd:
                flush(fd)
        with self._lock:
            # `done` came from `unsettled`: whatever hangs above one of them is in it, or settled.
            self._settled.update(done)

    def remove_empty(self, folder: str) -> None:
        """Remove `folder` if nothing is in it; whatever speaks against that is fine."""
        parent, _, name = folder.rpartition("/")
        with suppress(OSError), self.open(parent) as fd:
            os.rmdir(name, dir_fd=fd)
            self._forget(folder)

    def close(self) -> None:
        """Close the root. No other thread may be inside of a method."""
        with self._lock:
            self._is_closed = True
            if self._root is not None:
                os.close(self._root)
                self._root = None

    def _open_root(self, *, create: bool) -> int:
        with self._lock:
            if self._is_closed:
                raise StoreUnavailableError("", f"the store {self.path} was closed")
            if self._root is None:
                if create:
                    _make_root(self.path)
                self._root = _open_root(self.path)
            return self._root

    def _forget(self, folder: str) -> None:
        with self._lock:
            self._settled.discard(folder)


def _open_root(path: str) -> int:
    try:
        return os.open(path, _FLAGS)
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise StoreAccessDeniedError(
                "", f"{path} is a symbolic link; give the folder that it points to"
            ) from None
        raise ConfigError(f"{path} is a file, not the folder of a ckptd root") from None


def _make_root(path: str) -> None:
    """Make the root and the folders above it, each durable in its parent."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder, _MODE)
        except FileExistsError:
            continue  # another rank was faster
        parent = os.open(os.path.dirname(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flush(parent)
        finally:
            os.close(parent)


def _make(name: str, parent: int) -> None:
    """Make a folder that another process may be making too; all chunk folders are made at once."""
    with suppress(FileExistsError):
        os.mkdir(name, _MODE, dir_fd=parent)
    if name == "chunks":
        fd = os.open(name, _FLAGS, dir_fd=parent)
        try:
            for number in range(256):
                _make(f"{number:02x}", fd)
        finally:
            os.close(fd)
