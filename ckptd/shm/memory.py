"""How much memory is left, and how many slots fit into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from ckptd.errors import ConfigError
from ckptd.units import format_bytes

AUTO_SHARE = 0.6

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


def available_bytes(
    meminfo: str = "/proc/meminfo",
    membership: str = "/proc/self/cgroup",
    cgroups: str = "/sys/fs/cgroup",
) -> int:
    """Return what this process may still take: the least of the machine's and its cgroups' rest.

    Every cgroup above counts, as a limit may stand in any. Page cache that can be dropped at once
    (``inactive_file``) does not count as used. Where there is no such file, the machine's memory.
    """
    rests = [_machine_bytes(meminfo)]
    for folder, limit, usage, cache in _memory_cgroups(membership, cgroups):
        most, used = _number(f"{folder}/{limit}"), _number(f"{folder}/{usage}")
        if most is not None and used is not None and most < _UNLIMITED:
            droppable = _field(f"{folder}/memory.stat", cache) or 0
            rests.append(most - max(0, used - droppable))
    return max(0, min(rests))


def choose_slots(
    slot_bytes: int, wanted: int | Literal["auto"], local_ranks: int, available: int
) -> int:
    """Return how many slots each of `local_ranks` ranks makes.

    `available` is what was left before any of these ranks took its slots. ``"auto"`` is two where
    they fit in 60 % of a rank's share, else one where that fits. A number is taken as it is, if it
    fits in the whole share.

    Raises:
        ConfigError: if not even that fits; it gives the figures.
    """
    share = available // max(1, local_ranks)
    if wanted != "auto":
        if wanted < 1 or wanted * slot_bytes > share:
            raise ConfigError(
                f"slots={wanted}: each slot takes {format_bytes(slot_bytes)}, and of the "
                f"{format_bytes(available)} left {format_bytes(share)} are for each of "
                f"{local_ranks} ranks; set fewer slots (at least 1) or give the job more memory"
            )
        return wanted
    usable = int(share * AUTO_SHARE)
    for slots in (2, 1):
        if slots * slot_bytes <= usable:
            return slots
    hint = "; slots=1 would take it all the same" if slot_bytes <= share else ""
    raise ConfigError(
        f'slots="auto": a snapshot takes {format_bytes(slot_bytes)} per rank, and '
        f"{AUTO_SHARE:.0%} of the {format_bytes(available)} left are {format_bytes(usable)} for "
        f"each of {local_ranks} ranks; give the job more memory or shard the state{hint}"
    )


def _machine_bytes(meminfo: str) -> int:
    kib = _field(meminfo, "MemAvailable:")
    if kib is not None:
        return kib * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_cgroups(membership: str, cgroups: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield folder, limit file, usage file and cache field of each cgroup that holds this process.

    Inside a container the path may be the host's and not exist here: then only the folders above it
    do, of which the topmost is the container's own.
    """
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2
            for folder in _upwards(cgroups, path):
                yield folder, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            for folder in _upwards(f"{cgroups}/memory", path):
                yield (
                    folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )  # fmt: skip


def _upwards(top: str, path: str) -> Iterator[str]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for count in range(len(parts), -1, -1):
        yield "/".join([top, *parts[:count]])


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _field(path: str, name: str) -> int | None:
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
