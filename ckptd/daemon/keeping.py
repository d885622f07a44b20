"""Keeps arenas in the service manager's store, so that a daemon killed with -9 gets them back.

Of each arena two descriptors are there, ``ckptd-<n>-arena`` and ``ckptd-<n>-record``, with the inode
of its memory for n: a trainer that connects again announces memory that is there already, and the
manager keeps one descriptor of one file only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptd.daemon.holder import Holder, holder_of, watch
from ckptd.daemon.notify import Given, Notifier
from ckptd.daemon.record import Record, Shape
from ckptd.engine import events as ev
from ckptd.engine.clients import problem_with
from ckptd.engine.keeper import HasFileno, Snapshot
from ckptd.errors import ProtocolError
from ckptd.shm.arena import Arena
from ckptd.wire import messages as say

log = logging.getLogger("ckptd.daemon")

_NAME = re.compile(r"ckptd-([0-9]{1,20})-(arena|record)", re.ASCII)
_ARENA = 1  # the number of an arena that was taken back, among those of its client

Owner = tuple[int, int]  # a client, and the number by which it announced an arena


class TakenBack(NamedTuple):
    """An arena that a former daemon had. `pidfd` is of the process that writes there, if it lives.

    Arena and `pidfd` are the caller's to close.
    """

    event: ev.Restored
    arena: Arena
    pidfd: int | None


@dataclass
class _Kept:
    record: Record
    shape: Shape
    owners: set[Owner] = field(default_factory=set)


class Keeping:
    """A `Keeper` whose arenas lie in a service manager's store. One thread uses it at a time."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._kept: dict[int, _Kept] = {}
        self._inodes: dict[Owner, int] = {}
        self._has_failed = False

    # --- for the engine ------------------------------------------------------------------------

    def keep_arena(self, client: int, message: say.Arena, memory: HasFileno, pid: int) -> None:
        """See `Keeper`."""
        shape = Shape(message.slots, message.slot_bytes, *holder_of(pid))
        try:
            self._keep_arena((client, message.arena), shape, memory.fileno())
        except (OSError, ValueError) as error:
            self._warn(error)

    def keep(self, client: int, arena: int, slot: int, snapshot: Snapshot) -> None:
        """See `Keeper`."""
        kept = self._kept.get(self._inodes.get((client, arena), 0))
        if kept is None:
            return
        try:
            kept.record.write(slot, snapshot)
        except (OSError, ProtocolError) as error:
            self._warn(error)

    def release(self, client: int, arena: int) -> None:
        """See `Keeper`."""
        owner = (client, arena)
        inode = self._inodes.pop(owner, 0)
        kept = self._kept.get(inode)
        if kept is None:
            return
        kept.owners.discard(owner)
        if not kept.owners:
            del self._kept[inode]
            kept.record.close()
            self._remove(inode)

    def _keep_arena(self, owner: Owner, shape: Shape, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        if self._inodes.get(owner, inode) != inode:
            self.release(*owner)
        kept = self._kept.get(inode)
        if kept is None:
            kept = self._store(inode, shape, fd)
        elif kept.shape != shape:
            if (kept.shape.slots, kept.shape.slot_bytes) != (shape.slots, shape.slot_bytes):
                kept.record.clear()
            kept.record.write_shape(shape)
            kept.shape = shape
        kept.owners.add(owner)
        self._inodes[owner] = inode

    def _store(self, inode: int, shape: Shape, fd: int) -> _Kept:
        record = Record.create()
        try:
            record.write_shape(shape)
        except BaseException:
            record.close()
            raise
        self._notifier.store(_name(inode, "arena"), fd)
        self._notifier.store(_name(inode, "record"), record.fileno())
        kept = self._kept[inode] = _Kept(record, shape)
        return kept

    def _remove(self, inode: int) -> None:
        self._notifier.remove(_name(inode, "arena"))
        self._notifier.remove(_name(inode, "record"))

    def _warn(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.warning("snapshots will not outlive a kill of this daemon: %s", error)

    # --- at the start --------------------------------------------------------------------------

    def take_back(self, given: Iterable[Given]) -> list[TakenBack]:
        """Take back what a former daemon kept; owns the descriptors. To be called before all else.

        Arenas in which no snapshot is left, and what is damaged, is closed and leaves the store.
        """
        pairs: dict[int, dict[str, int]] = {}
        for name, fd in given:
            found = _NAME.fullmatch(name)
            pair = pairs.setdefault(int(found[1]), {}) if found else {}
            if found is None or found[2] in pair:
                log.warning("descriptor %d (%s) of the service manager is of no use", fd, name)
                os.close(fd)
            else:
                pair[found[2]] = fd
        taken = (self._try_back(number, *pair) for number, pair in enumerate(pairs.items(), 1))
        return [back for back in taken if back is not None]

    def _try_back(self, client: int, inode: int, pair: dict[str, int]) -> TakenBack | None:
        try:
            return self._take_back(client, inode, pair)
        except (OSError, ProtocolError) as error:
            log.warning("memory %d of a former daemon is not used: %s", inode, error)
            self._remove(inode)
            return None
        finally:
            for fd in pair.values():
                os.close(fd)

    def _take_back(self, client: int, inode: int, pair: dict[str, int]) -> TakenBack:
        if len(pair) < 2:
            raise ProtocolError("half of it is missing")
        with contextlib.ExitStack() as opened:
            record = opened.enter_context(closing(Record.adopt(os.dup(pair["record"]))))
            shape = record.read_shape()
            memory = Arena.adopt(os.dup(pair["arena"]), shape.slots, shape.slot_bytes)
            arena = opened.enter_context(memory)
            if os.fstat(arena.fileno()).st_ino != inode:
                raise ProtocolError("it is another than its name says")
            snapshots = _snapshots(record, arena, shape)
            opened.pop_all()
        self._kept[inode] = _Kept(record, shape, {(client, _ARENA)})
        self._inodes[client, _ARENA] = inode
        is_dead, pidfd = watch(Holder(shape.pid, shape.started))
        log.info("took %d snapshots of a former daemon back", len(snapshots))
        message = say.Arena(_ARENA, shape.slots, shape.slot_bytes)
        event = ev.Restored(client, message, inode, snapshots, is_dead)
        return TakenBack(event, arena, pidfd)


def _name(inode: int, what: str) -> str:
    return f"ckptd-{inode}-{what}"


def _snapshots(record: Record, arena: Arena, shape: Shape) -> dict[int, Snapshot]:
    """Return the snapshots that still lie where they were handed off."""
    found = {}
    for index in range(shape.slots):
        try:
            snapshot = record.read(index)
        except ProtocolError as error:
            log.warning("a snapshot of a former daemon is lost: %s", error)
            continue
        if snapshot is None or not arena.slot(index).is_current(snapshot.handoff.generation):
            continue
        if problem := problem_with(snapshot.hello):
            log.warning("a snapshot of a former daemon is of no use: %s", problem)
            continue
        found[index] = snapshot
    if not found:
        raise ProtocolError("no snapshot is in it")
    return found
