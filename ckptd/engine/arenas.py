"""The arenas that clients have announced, as one daemon has them mapped."""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol

from ckptd.engine import events as ev
from ckptd.engine.keeper import HasFileno, Keeper
from ckptd.errors import ProtocolError
from ckptd.shm.slots import Slot
from ckptd.wire.messages import Held, HeldSnapshot

log = logging.getLogger("ckptd.engine")


class SlotSource(HasFileno, Protocol):
    """Memory that holds slots, as the engine sees it."""

    def slot(self, index: int) -> Slot:
        """Return a slot."""

    def trim(self) -> None:
        """Give back what was only kept for speed."""

    def close(self) -> None:
        """Let go of the memory."""


class Arenas:
    """Mapped arenas, by client and the number that it announced each by.

    For any thread, but that `keep` and `release` belong to the engine's. `keeper` makes arenas outlive
    this process.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._held: dict[tuple[int, int], SlotSource] = {}
        self._lock = threading.Lock()  # guards _held

    def give(self, client: int, number: int, arena: SlotSource) -> None:
        """Take an arena; one that had this number before is closed."""
        with self._lock:
            former = self._held.get((client, number))
            self._held[client, number] = arena
        if former is not None and former is not arena:
            former.close()

    def slot(self, client: int, number: int, index: int) -> Slot:
        """Return a slot.

        Raises:
            ProtocolError: there is no such arena.
        """
        with self._lock:
            arena = self._held.get((client, number))
        if arena is None:
            raise ProtocolError("a handoff before its arena")
        return arena.slot(index)

    def held(self, effect: ev.ShowHeld) -> Held:
        """Return those of the snapshots that were not overwritten since."""
        rows = (row for number, row in effect.snapshots if self._is_held(number, row))
        return Held(effect.daemon, tuple(rows))

    def share(self, client: int, number: int) -> int | None:
        """Return a new descriptor of an arena's memory, the caller's to close; None if there is none."""
        with self._lock:
            arena = self._held.get((client, number))
            try:
                return None if arena is None else os.dup(arena.fileno())
            except (OSError, ValueError) as error:  # no descriptor is left
                log.warning("memory of client %d cannot be handed on: %s", client, error)
                return None

    def keep(self, effect: ev.KeepArena | ev.Keep) -> None:
        """Let the keeper know of an arena, or of a snapshot in one."""
        if isinstance(effect, ev.Keep):
            self._keeper.keep(*effect)
            return
        with self._lock:
            arena = self._held.get((effect.client, effect.message.arena))
        if arena is not None:
            self._keeper.keep_arena(effect.client, effect.message, arena, effect.pid)

    def release(self, client: int, number: int) -> None:
        """Close an arena; one that is not there is fine."""
        with self._lock:
            arena = self._held.pop((client, number), None)
        self._keeper.release(client, number)
        if arena is not None:
            arena.close()

    def trim(self) -> None:
        """Give back what is only kept for speed."""
        with self._lock:
            arenas = list(self._held.values())
        for arena in arenas:
            arena.trim()

    def close(self) -> None:
        """Close all."""
        with self._lock:
            held, self._held = self._held, {}
        for arena in held.values():
            arena.close()

    def _is_held(self, number: int, row: HeldSnapshot) -> bool:
        try:
            return self.slot(row.arena, number, row.slot).is_current(row.generation)
        except ProtocolError:
            return False
