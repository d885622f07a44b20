"""Files that are not objects yet: without a name where the system can, else named in ``tmp``."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckptd.store.folders import Folders

TMP = "tmp"
STALE_S = 3600.0
_FLAGS = os.O_WRONLY | os.O_CLOEXEC
_MODE = 0o666  # what the umask leaves of it
# An unnamed file gets its name through /proc, as open(2) shows; AT_EMPTY_PATH wants a capability.
_HAS_UNNAMED = hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd")


class Temp:
    """An open file that becomes an object by `link` or `rename`, and vanishes without them.

    `fd` is owned by this; it is open for writing until `close`.
    """

    def __init__(self, fd: int, name: str | None, tmp_fd: int | None) -> None:
        self.fd = fd
        self._name = name
        self._tmp_fd = tmp_fd
        self._is_open = True

    def link(self, folder_fd: int, name: str) -> bool:
        """Give the file the name `name` if that is free; tell whether it has it now.

        An error of a retried call over NFS may mean that the first one worked: the file that stands
        there decides.

        Raises:
            OSError: the name may be free, but this file did not get it.
        """
        try:
            if self._name is None:
                os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=folder_fd)
            else:
                os.link(
                    self._name,
                    name,
                    src_dir_fd=self._tmp_fd,
                    dst_dir_fd=folder_fd,
                    follow_symlinks=False,
                )
        except FileExistsError:
            return self._has_name(folder_fd, name)
        except OSError:
            if not self._has_name(folder_fd, name):
                raise
        return True

    def rename(self, folder_fd: int, name: str) -> None:
        """Give the file the name `name` in place of what has it now. Only for named files.

        Raises:
            OSError: the name stands for what it stood for before.
        """
        assert self._name is not None
        try:
            os.rename(self._name, name, src_dir_fd=self._tmp_fd, dst_dir_fd=folder_fd)
        except OSError:
            if not self._has_name(folder_fd, name):
                raise
        self._name = None

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: what was written may be lost (close(2): NFS and quotas report here).
        """
        self._is_open = False
        os.close(self.fd)

    def discard(self) -> None:
        """Take the temporary name away and close what is still open. May be repeated."""
        if self._name is not None:
            with suppress(OSError):
                os.unlink(self._name, dir_fd=self._tmp_fd)
            self._name = None
        if self._is_open:
            with suppress(OSError):
                self.close()

    def _has_name(self, folder_fd: int, name: str) -> bool:
        try:
            there = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self.fd))


class Temps:
    """Makes temporary files below one root. All methods may be called from any thread."""

    def __init__(self, folders: Folders, *, is_unnamed: bool = True) -> None:
        self._folders = folders
        self._is_unnamed = is_unnamed and _HAS_UNNAMED
        self._is_swept = False

    @contextmanager
    def make(self, folder_fd: int) -> Iterator[Temp]:
        """Give a file to `link` into the folder; nothing is left of it if it is killed.

        Raises:
            OSError: as `open` says.
        """
        fd = self._open_unnamed(folder_fd)
        if fd is None:
            with self.make_named() as temp:
                yield temp
            return
        temp = Temp(fd, None, None)
        try:
            yield temp
        finally:
            temp.discard()

    @contextmanager
    def make_named(self) -> Iterator[Temp]:
        """Give a file to `link` or `rename`; if it is killed, a later writer sweeps it.

        Raises:
            OSError: as `open` says.
        """
        # The dot keeps the name out of the grammar of keys, and so out of every listing.
        name = f".{os.getpid()}-{secrets.token_hex(8)}"
        with self._folders.open(TMP, create=True) as tmp_fd:
            fd = os.open(
                name, _FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _MODE, dir_fd=tmp_fd
            )
            temp = Temp(fd, name, tmp_fd)
            try:
                if not self._is_swept:
                    self._is_swept = True
                    _sweep(tmp_fd, os.fstat(fd).st_mtime)
                yield temp
            finally:
                temp.discard()

    def _open_unnamed(self, folder_fd: int) -> int | None:
        if not self._is_unnamed:
            return None
        try:
            return os.open(".", _FLAGS | os.O_TMPFILE, _MODE, dir_fd=folder_fd)
        except OSError as error:
            # What a file system without O_TMPFILE says: EOPNOTSUPP; kernels before 3.11: EISDIR.
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
                raise
            self._is_unnamed = False
            return None


def _sweep(tmp_fd: int, now_s: float) -> None:
    """Remove what dead writers of this user left; `now_s` is the file system's clock.

    A writer that was only stopped for so long finds its file gone and fails, with nothing stored.
    """
    with suppress(OSError), os.scandir(tmp_fd) as names:
        for entry in names:
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                is_ours = entry.name.startswith(".") and found.st_uid == os.geteuid()
                if is_ours and found.st_mtime < now_s - STALE_S:
                    os.unlink(entry.name, dir_fd=tmp_fd)
