"""Files of a checkpoint: their size, how to make them durable, and how to read them cold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files below `folder`."""
    for base, _, names in os.walk(folder):
        yield from (Path(base, name) for name in names)


def sizes_in(folder: Path) -> dict[Path, int]:
    """Return the length of each file below `folder`; files may vanish meanwhile."""
    found = {}
    for path in files_in(folder):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_size
    return found


def make_durable(path: Path) -> None:
    """Fsync a file, or all that is below a folder, and the folders."""
    targets = [path, path.parent]
    if path.is_dir():
        targets += [
            Path(base, name) for base, dirs, names in os.walk(path) for name in names + dirs
        ]
    for target in targets:
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def forget(folder: Path) -> None:
    """Drop the cached pages of all files below `folder`, so that the next read is a cold one."""
    for path in files_in(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # a dirty page stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
