"""The ranks that are connected, or that left something behind which is still being read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptd.engine.events import PartKey, Release
from ckptd.errors import ProtocolError
from ckptd.model.keys import MAX_ATTEMPT, MAX_RANK
from ckptd.wire import messages as say

MAX_TIMEOUT_S = 1e7

JobKey = tuple[str, int]


@dataclass
class Client:
    """One connection of one rank. `reading` says from which arena each part is being read."""

    number: int
    hello: say.Hello
    recipes: dict[int, say.Recipe] = field(default_factory=dict)
    arena: say.Arena | None = None
    arenas: set[int] = field(default_factory=set)
    reading: dict[PartKey, int] = field(default_factory=dict)
    is_here: bool = True
    is_settling: bool = False

    @property
    def job(self) -> JobKey:
        """Root and attempt."""
        return (self.hello.root, self.hello.attempt)

    def add_recipe(self, recipe: say.Recipe) -> None:
        """Remember a recipe; the oldest is forgotten."""
        self.recipes[recipe.recipe] = recipe
        while len(self.recipes) > say.MAX_RECIPES:
            del self.recipes[next(iter(self.recipes))]

    def give_arena(self, arena: say.Arena) -> None:
        """Take an arena in place of the one before."""
        self.arena = arena
        self.arenas.add(arena.arena)

    def recipe_of(self, handoff: say.Handoff) -> say.Recipe:
        """Return the recipe of a handoff.

        Raises:
            ProtocolError: if the handoff refers to something that was never announced.
        """
        recipe, arena = self.recipes.get(handoff.recipe), self.arena
        if recipe is None or arena is None or arena.arena != handoff.arena:
            raise ProtocolError("a handoff that refers to no recipe or arena of this connection")
        if handoff.slot >= arena.slots:
            raise ProtocolError("a handoff of a slot that the arena does not have")
        return recipe

    def release(self) -> Iterator[Release]:
        """Let go of the arenas that nothing is read from; of the newest only after the end."""
        used = set(self.reading.values())
        if self.is_here and self.arena is not None:
            used.add(self.arena.arena)
        for arena in sorted(self.arenas - used):
            self.arenas.discard(arena)
            yield Release(self.number, arena)


def problem_with(hello: say.Hello) -> str:
    """Say what is wrong with a hello; empty if nothing is."""
    other_version = (
        f"protocol {hello.protocol}, not {say.PROTOCOL}: restart the daemon, "
        "so that it is of the trainer's version"
    )
    checks = (
        (hello.protocol == say.PROTOCOL, other_version),
        (0 < hello.attempt <= MAX_ATTEMPT, "attempt out of range"),
        (0 < hello.world_size <= MAX_RANK + 1, "world size out of range"),
        (hello.rank < hello.world_size, "rank out of range"),
        (0 < hello.commit_timeout_s <= MAX_TIMEOUT_S, "commit_timeout_s out of range"),
    )
    return next((problem for is_good, problem in checks if not is_good), "")
