"""The memory of a group of processes: private and shared, each page counted once."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_FIELDS = {b"Pss:": "pss", b"Pss_Shmem:": "shmem", b"Pss_File:": "file"}


class Sample(NamedTuple):
    """`at` is of `time.perf_counter`, which all processes of a machine share on Linux."""

    at: float
    anonymous_bytes: int
    shared_bytes: int

    @property
    def bytes(self) -> int:
        """All but cached files."""
        return self.anonymous_bytes + self.shared_bytes


def parse_rollup(text: bytes) -> tuple[int, int]:
    """Return anonymous and shared bytes of a process from its ``smaps_rollup``."""
    found = dict.fromkeys(_FIELDS.values(), 0)
    for line in text.splitlines():
        words = line.split()
        if words and words[0] in _FIELDS:
            found[_FIELDS[words[0]]] = int(words[1]) * 1024
    return found["pss"] - found["shmem"] - found["file"], found["shmem"]


def held_bytes(pid: int) -> int:
    """Return the memory of a process that no file backs, shared memory included; 0 if it is gone.

    Unlike the shares of ``smaps_rollup`` it costs a few microseconds to ask.
    """
    found = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith((b"RssAnon:", b"RssShmem:")):
                found += int(line.split()[1]) * 1024
    return found


def mapped_bytes(pid: int, name: str) -> int:
    """Return how much of a process's memory belongs to mappings of what is called `name`."""
    found, is_it = 0, False
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):  # the first line of a mapping
                is_it = name in line
            elif is_it and words[0] == "Rss:":
                found += int(words[1]) * 1024
    return found


def cpu_s(pid: int) -> float:
    """Return the processor seconds of a process until now, 0 if it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class OwnPeak:
    """The most memory that processes hold while the block runs, less what is mapped as `shared`.

    Buffers that Python's ``mmap`` makes are shared memory to the kernel, so they are counted, and
    the mappings called `shared` are taken off as they are at the end of the block.
    """

    def __init__(self, pids: Sequence[int], shared: str, interval_s: float = 0.01) -> None:
        self._pids = pids
        self._shared = shared
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.bytes = 0

    def __enter__(self) -> OwnPeak:  # noqa: PYI034 - Self is not in Python 3.10
        if self._pids:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._pids:
            self._thread.join()
            self.bytes -= sum(mapped_bytes(pid, self._shared) for pid in self._pids)

    def _run(self) -> None:
        while True:
            self.bytes = max(self.bytes, sum(held_bytes(pid) for pid in self._pids))
            if self._stop.wait(self._interval_s):
                return


class Watch:
    """Samples all processes that have `marker` in their environment, on a thread, until `stop`.

    Proportional shares (PSS) are added up, so that memory which trainer and helper both map counts
    once. The environment finds detached helpers too, which parents do not.

    Attributes:
        samples: one for each moment, oldest first.
        own: what each process had for itself (`time.perf_counter`, bytes), by its number.
    """

    def __init__(self, marker: str, interval_s: float = 0.01) -> None:
        self._marker = marker.encode()
        self._interval_s = interval_s
        self._known: dict[int, bool] = {}
        self._stop = threading.Event()
        self.samples: list[Sample] = []
        self.own: dict[int, list[tuple[float, int]]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def peak(self, start: float, end: float) -> Sample | None:
        """Return the sample with the most memory between two moments."""
        inside = [sample for sample in self.samples if start <= sample.at <= end]
        return max(inside, key=lambda sample: sample.bytes) if inside else None

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            anonymous = shared = 0
            for pid in self._pids():
                with contextlib.suppress(OSError):
                    own = parse_rollup(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
                    anonymous += own[0]
                    shared += own[1]
                    self.own.setdefault(pid, []).append((time.perf_counter(), own[0]))
            self.samples.append(Sample(time.perf_counter(), anonymous, shared))

    def _pids(self) -> list[int]:
        now = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        for pid in now - self._known.keys():
            self._known[pid] = False
            with contextlib.suppress(OSError):
                self._known[pid] = self._marker in Path(f"/proc/{pid}/environ").read_bytes()
        return [pid for pid in now if self._known.get(pid)]
