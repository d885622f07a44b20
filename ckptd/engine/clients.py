"""The ranks that are connected, or that left something behind which is still being read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptd.engine.events import PartKey, Release
from ckptd.engine.keeper import Snapshot
from ckptd.errors import ProtocolError
from ckptd.model.keys import MAX_ATTEMPT, MAX_RANK
from ckptd.wire import messages as say

MAX_TIMEOUT_S = 1e7

JobKey = tuple[str, int]


@dataclass
class Client:
    """One connection of one rank, and what it leaves behind.

    Attributes:
        reading: from which arena each part is being read.
        identity: tells the memory of the newest arena from any other; 0 where that is not known.
        snapshots: what lies in the slots of the newest arena; overwritten ones may still stand here.
        kept_until: until when they are kept for others, once this client is gone; None: they are not.
        is_dead: its process has ended.
        claim: the arena that it wishes to have.
        claimant: the client that its arena was given to, until that announces it.
        last: the number of the newest connection of its process.
        pid: its process; 0 where that is not known.
    """

    number: int
    hello: say.Hello
    recipes: dict[int, say.Recipe] = field(default_factory=dict)
    arena: say.Arena | None = None
    arenas: set[int] = field(default_factory=set)
    reading: dict[PartKey, int] = field(default_factory=dict)
    identity: int = 0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    kept_until: float | None = None
    is_dead: bool = False
    claim: say.Claim | None = None
    claimant: Client | None = None
    last: int = 0
    pid: int = 0
    is_here: bool = True
    is_settling: bool = False

    def __post_init__(self) -> None:
        self.last = self.number

    @property
    def job(self) -> JobKey:
        """Root and attempt."""
        return (self.hello.root, self.hello.attempt)

    def is_same_rank(self, other: Client) -> bool:
        """Tell whether another connection is, or was, of the same process: an attempt has one a rank."""
        mine, theirs = self.hello, other.hello
        return (mine.root, mine.attempt, mine.token, mine.rank) == (
            theirs.root, theirs.attempt, theirs.token, theirs.rank,
        )  # fmt: skip

    def add_recipe(self, recipe: say.Recipe) -> None:
        """Remember a recipe; the oldest is forgotten."""
        self.recipes[recipe.recipe] = recipe
        while len(self.recipes) > say.MAX_RECIPES:
            del self.recipes[next(iter(self.recipes))]

    def give_arena(self, arena: say.Arena, identity: int) -> None:
        """Take an arena in place of the one before."""
        if not self.lies_in(arena, identity):
            self.snapshots = {}
        self.arena, self.identity = arena, identity
        self.arenas.add(arena.arena)

    def lies_in(self, arena: say.Arena | None, identity: int) -> bool:
        """Tell whether an arena is the very slots of this client's."""
        mine = self.arena
        if mine is None or arena is None or not identity or identity != self.identity:
            return False
        return (mine.slots, mine.slot_bytes) == (arena.slots, arena.slot_bytes)

    def has_room(self, claim: say.Claim) -> bool:
        """Tell whether its arena is as large as somebody wishes."""
        arena = self.arena
        return (
            arena is not None
            and arena.slots >= claim.slots
            and arena.slot_bytes >= claim.slot_bytes
        )  # fmt: skip

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
        """Let go of the arenas that nothing is read from; of the newest only after the end.

        One that is kept for others stays.
        """
        used = set(self.reading.values())
        if (self.is_here or self.kept_until is not None) and self.arena is not None:
            used.add(self.arena.arena)
        for arena in sorted(self.arenas - used):
            self.arenas.discard(arena)
            yield Release(self.number, arena)


def let_go(clients: dict[int, Client], client: Client) -> Iterator[Release]:
    """Release arenas that are no longer needed, and forget a client that left nothing behind."""
    yield from client.release()
    if not client.is_here and not client.arenas:
        clients.pop(client.number, None)


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
