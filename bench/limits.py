"""What the machine can do: the figures that no engine can beat."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from bench.stats import median

CHUNK_BYTES = 32 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14


def measure(folder: Path, size_bytes: int = 512 << 20, rounds: int = 3) -> dict[str, float | str]:
    """Return GB/s by name; what cannot be measured here says why."""
    size_bytes -= size_bytes % CHUNK_BYTES
    found: dict[str, float | str] = {}
    for name, once in {
        "copy, memory in use, one thread": lambda: _copy(size_bytes, threads=1),
        "copy, memory in use, all threads": lambda: _copy(size_bytes, threads=0),
        "first touch of new memory": lambda: _touch(size_bytes),
        "MADV_POPULATE_WRITE of new memory": lambda: _populate(size_bytes),
        "xxh3-128, one thread": lambda: _hash(size_bytes),
        "write, direct, 32 MiB, fsync": lambda: _write(folder, size_bytes, is_direct=True),
        "write, buffered, 32 MiB, fsync": lambda: _write(folder, size_bytes, is_direct=False),
        "read, direct, 32 MiB": lambda: _read(folder, size_bytes, is_direct=True),
        "read, buffered and cold, 32 MiB": lambda: _read(folder, size_bytes, is_direct=False),
    }.items():
        found[name] = _speed(once, size_bytes, rounds)
    (folder / "limits.bin").unlink(missing_ok=True)
    _pair.clear()
    return found


def _speed(once: Callable[[], float], size_bytes: int, rounds: int) -> float | str:
    try:
        spans = [once() for _ in range(rounds)]
    except OSError as error:
        return f"not here: {error.strerror}"
    return size_bytes / 1e9 / (median(spans) or 1.0)


_pair: list[torch.Tensor] = []


def _copy(size_bytes: int, *, threads: int) -> float:
    if not _pair or len(_pair[0]) != size_bytes:
        _pair[:] = [torch.ones(size_bytes, dtype=torch.uint8) for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        began = time.perf_counter()
        _pair[0].copy_(_pair[1])
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(before)


def _touch(size_bytes: int) -> float:
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = np.frombuffer(memory, np.uint8)
        began = time.perf_counter()
        view[:: mmap.PAGESIZE] = 1
        span_s = time.perf_counter() - began
        del view
    return span_s


def _populate(size_bytes: int) -> float:
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        began = time.perf_counter()
        memory.madvise(MADV_POPULATE_WRITE)
        return time.perf_counter() - began


def _hash(size_bytes: int) -> float:
    data = np.ones(CHUNK_BYTES, np.uint8)
    began = time.perf_counter()
    for _ in range(size_bytes // CHUNK_BYTES):
        xxhash.xxh3_128_digest(data.data)
    return time.perf_counter() - began


def _write(folder: Path, size_bytes: int, *, is_direct: bool) -> float:
    data = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data.write(os.urandom(1 << 20) * (CHUNK_BYTES >> 20))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if is_direct else 0)
    fd = os.open(folder / "limits.bin", flags, 0o600)
    try:
        began = time.perf_counter()
        for _ in range(size_bytes // CHUNK_BYTES):
            _whole(os.write(fd, data))
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)
        data.close()


def _read(folder: Path, size_bytes: int, *, is_direct: bool) -> float:
    buffer = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fd = os.open(folder / "limits.bin", os.O_RDONLY | (os.O_DIRECT if is_direct else 0))
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        for _ in range(size_bytes // CHUNK_BYTES):
            _whole(os.readv(fd, [buffer]))
        return time.perf_counter() - began
    finally:
        os.close(fd)
        buffer.close()


def _whole(count: int) -> None:
    if count != CHUNK_BYTES:
        raise OSError(5, f"{count} bytes of {CHUNK_BYTES} in one call")
