"""Who keeps arenas beyond the end of this process, as the engine's side sees it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ckptd.wire.messages import Arena, Handoff, Hello, Recipe


class Snapshot(NamedTuple):
    """A snapshot that was handed off, and by whom."""

    hello: Hello
    handoff: Handoff
    recipe: Recipe


class HasFileno(Protocol):
    """Memory that another process can be given."""

    def fileno(self) -> int:
        """Return its descriptor, which stays its own.

        Raises:
            ValueError: it has none.
        """


class Keeper(Protocol):
    """Told what has to outlive this process. On the engine's thread; it raises nothing."""

    def keep_arena(self, client: int, message: Arena, memory: HasFileno, pid: int) -> None:
        """Keep an arena that a client announced; `pid` is its process, 0 where that is not known."""

    def keep(self, client: int, arena: int, slot: int, snapshot: Snapshot) -> None:
        """Note which snapshot lies in a slot from now on."""

    def release(self, client: int, arena: int) -> None:
        """Let go of an arena, unless it is another client's too."""


class NoKeeper:
    """Keeps nothing: memory ends with the last process that has it."""

    def keep_arena(self, client: int, message: Arena, memory: HasFileno, pid: int) -> None:
        """Do nothing."""

    def keep(self, client: int, arena: int, slot: int, snapshot: Snapshot) -> None:
        """Do nothing."""

    def release(self, client: int, arena: int) -> None:
        """Do nothing."""
