"""Listing the keys below a local root in order."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from ckptd.model import keys
from ckptd.store.base import Entry
from ckptd.store.folders import Folders

_OWN_FOLDERS = frozenset({"attempts", "chunks", "ranks", "checkpoints", "claims", "leases", "pins"})


class _Found(NamedTuple):
    """What stands under a name; `order` is how its key, or the keys below it, compare."""

    order: str
    path: str
    entry: Entry | None


def check_key(key: str) -> None:
    """Check that `key` is one.

    Raises:
        ValueError: it is something else.
    """
    if not keys.is_key(key):
        raise ValueError(f"not a key: {key[:200]!r}")


def check_prefix(prefix: str) -> None:
    """Check that `prefix` is empty or a folder of keys that ends with a slash.

    Raises:
        ValueError: it is something else.
    """
    if prefix and not (prefix.endswith("/") and keys.is_key(prefix[:-1])):
        raise ValueError(f"not a prefix: {prefix[:200]!r}")


def walk(folders: Folders, folder: str) -> Iterator[Entry]:
    """Yield the objects below `folder`, sorted by key; a folder that is not there has none.

    Raises:
        OSError: the listing is not complete; ELOOP for a symbolic link where an object or a folder
            of objects would stand, since leaving it out would make what it stands for look gone.
    """
    for found in sorted(_scan(folders, folder)):
        if found.entry is not None:
            yield found.entry
        else:
            yield from walk(folders, found.path)


def _scan(folders: Folders, folder: str) -> list[_Found]:
    found = []
    try:
        with folders.open(folder) as fd, os.scandir(fd) as names:
            for name in names:
                path = f"{folder}/{name.name}" if folder else name.name
                if keys.is_key(path):
                    found += _judge(name, path)
    except FileNotFoundError:
        return []
    return found


def _judge(name: os.DirEntry[str], path: str) -> list[_Found]:
    if name.is_symlink() and ("/" in path or path in _OWN_FOLDERS):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    if name.is_dir(follow_symlinks=False):
        # The slash belongs to the order: "a-b" stands before "a/b", which stands before "a0".
        return [_Found(path + "/", path, None)]
    if not name.is_file(follow_symlinks=False):
        return []
    try:
        status = name.stat(follow_symlinks=False)
    except FileNotFoundError:  # deleted since the folder was read
        return []
    return [_Found(path, path, Entry(path, status.st_size, status.st_mtime))]
