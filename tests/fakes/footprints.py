"""What a daemon takes of the machine, seen from outside."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ckptd.wire import messages as say
from ckptd.wire.address import connect
from ckptd.wire.channel import Channel
from tests.fakes.jobs import PATIENCE_S, Process, Rank, wait_until


class Footprint(NamedTuple):
    """What one process holds.

    Attributes:
        fds: open descriptors, those of arenas left out.
        arenas: how many arenas it has open, and how large they are together.
        mapped_bytes: how much of arenas it has mapped.
        private_bytes: resident memory that is its own.
    """

    fds: int
    arenas: int
    arena_bytes: int
    mapped_bytes: int
    private_bytes: int

    @classmethod
    def of(cls, process: Process | Rank) -> Footprint:
        """Look at a process."""
        proc = f"/proc/{process.pid}"
        arenas: dict[int, int] = {}
        fds = 0
        for fd in os.listdir(f"{proc}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if "memfd:ckptd-arena" in os.readlink(f"{proc}/fd/{fd}"):
                    found = os.stat(f"{proc}/fd/{fd}")
                    arenas[found.st_ino] = found.st_size
                else:
                    fds += 1
        maps = [line.split() for line in Path(f"{proc}/maps").read_text().splitlines()]
        spans = [line[0].split("-") for line in maps if "memfd:ckptd-arena" in line[-1] + line[-2]]
        status = Path(f"{proc}/status").read_text()
        return cls(
            fds, len(arenas), sum(arenas.values()),
            sum(int(stop, 16) - int(start, 16) for start, stop in spans),
            int(status.split("RssAnon:")[1].split()[0]) * 1024,
        )  # fmt: skip


def ask(socket: str) -> dict[str, Any]:
    """Return what `ckptd status` shows of a daemon."""
    channel = Channel(connect(socket, deadline_s=PATIENCE_S), say.FromDaemon)
    try:
        channel.accept_large_frames()
        channel.send(say.Ask(), deadline_s=PATIENCE_S)
        found = wait_until(
            lambda: [m for m in channel.receive(1.0) if isinstance(m, say.Report)], "it reports"
        )
        return msgspec.json.decode(found[0].body, type=dict[str, Any])
    finally:
        channel.close()


def has_work(socket: str) -> bool:
    """Tell whether a daemon has clients, or writes or decides something that it alone can."""
    for job in ask(socket)["jobs"]:
        if job["ranks_here"]:
            return True
        for step in job["open"]:
            is_moving = {"storing", "putting"} & set(step["parts"].values())
            if is_moving or step["ending"] or len(step["parts"]) == job["world_size"]:
                return True
    return False
