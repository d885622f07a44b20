"""A model of what a power loss leaves of a file system, fed from the real system calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class PowerModel:
    """Watches the calls that change files and folders, and knows what was flushed.

    The model is harsher than any real file system: bytes are kept only by an fsync of their file, a
    name only by an fsync of its folder, and a name may survive although the bytes do not.
    `torn` collects names that were given to files whose bytes were not flushed.
    """

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = os.stat(base).st_ino
        self.torn: list[str] = []
        self.log: list[str] = []
        self._dirty: set[int] = set()
        self._entries: dict[tuple[int, str], int] = {}
        self._durable: dict[tuple[int, str], int] = {}
        self._patch(monkeypatch)

    def has(self, path: str) -> bool:
        """Tell whether `path`, from the base folder, is there whole after a power loss."""
        at = self.base
        for name in path.split("/"):
            if (at, name) not in self._durable:
                return False
            at = self._durable[at, name]
        return at not in self._dirty

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pwrite, ftruncate, fsync = os.pwrite, os.ftruncate, os.fsync
        link, rename, mkdir = os.link, os.rename, os.mkdir

        def my_pwrite(fd: int, data: bytes, offset: int) -> int:
            self._dirty.add(os.fstat(fd).st_ino)
            return pwrite(fd, data, offset)

        def my_ftruncate(fd: int, length: int) -> None:
            self._dirty.add(os.fstat(fd).st_ino)
            ftruncate(fd, length)

        def my_fsync(fd: int) -> None:
            fsync(fd)
            ino = os.fstat(fd).st_ino
            self.log.append("fsync")
            self._dirty.discard(ino)
            self._durable.update({k: v for k, v in self._entries.items() if k[0] == ino})

        def my_link(src: str, dst: str, **kwargs: int) -> None:
            link(src, dst, **kwargs)
            self._name("link", dst, kwargs["dst_dir_fd"])

        def my_rename(src: str, dst: str, **kwargs: int) -> None:
            rename(src, dst, **kwargs)
            self._name("rename", dst, kwargs["dst_dir_fd"])

        def my_mkdir(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            mkdir(path, mode, dir_fd=dir_fd)
            parent = os.stat(os.path.dirname(path)) if dir_fd is None else os.fstat(dir_fd)
            child = os.stat(path, dir_fd=dir_fd)
            self._entries[parent.st_ino, os.path.basename(path)] = child.st_ino

        for mine in (my_pwrite, my_ftruncate, my_fsync, my_link, my_rename, my_mkdir):
            monkeypatch.setattr(os, mine.__name__.removeprefix("my_"), mine)

    def _name(self, call: str, name: str, folder_fd: int) -> None:
        ino = os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_ino
        self.log.append(f"{call} {name}")
        if ino in self._dirty:
            self.torn.append(name)
        self._entries[os.fstat(folder_fd).st_ino, name] = ino
