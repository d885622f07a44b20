"""What happens to an engine, and what it wants done.

Events come from sockets, workers and the clock; effects go to them. Neither holds anything that
does I/O: clients and arenas are numbers here.
"""

from __future__ import annotations

from typing import NamedTuple

from ckptd.engine.keeper import Snapshot
from ckptd.model.keys import StepId
from ckptd.model.manifest import Chunk, Outcome, RankManifest
from ckptd.pipeline.commit import Verdict
from ckptd.wire.messages import (
    Arena,
    Ceded,
    FromDaemon,
    FromTrainer,
    HeldSnapshot,
    Hello,
    Lent,
    Recipe,
)


class StepKey(NamedTuple):
    """A step of a job of a root."""

    root: str
    id: StepId


class PartKey(NamedTuple):
    """One rank's part of a step. `sequence` tells two saves of one step apart."""

    step: StepKey
    rank: int
    sequence: int


# --- events ------------------------------------------------------------------------------------


class Said(NamedTuple):
    """A client sent a message. An arena's descriptor was mapped before.

    `pid` is the process at its end, 0 where that is not known.
    """

    client: int
    message: FromTrainer
    pid: int = 0


class Mapped(NamedTuple):
    """A client announced an arena, which was mapped. `identity` tells its memory from any other."""

    client: int
    message: Arena
    identity: int


class Restored(NamedTuple):
    """A former daemon had an arena, which was mapped; these of its snapshots are still in it.

    No connection has or gets the number `client`. `is_dead`: the process that wrote there has ended;
    if that is not so, `Gone` tells of its end, where it can be seen.
    """

    client: int
    message: Arena
    identity: int
    snapshots: dict[int, Snapshot]
    is_dead: bool


class Gone(NamedTuple):
    """A client's connection ended. `is_dead` is True where its process has ended too.

    A process that dies closes its sockets first: then this comes once without and once with it.
    """

    client: int
    is_dead: bool


class Opened(NamedTuple):
    """The store of a hello was opened, or not: then `kind` and `reason` say why."""

    client: int
    kind: str = ""
    reason: str = ""


class ChunksStored(NamedTuple):
    """All chunks of a part are durable; they stand in the order of the recipe."""

    part: PartKey
    chunks: tuple[Chunk, ...]


class RankPut(NamedTuple):
    """The rank manifest of a part is durable."""

    part: PartKey


class PartFailed(NamedTuple):
    """A part will not be stored."""

    part: PartKey
    reason: str


class Judged(NamedTuple):
    """The answer to `Try`, `Poll` or `End`."""

    step: StepKey
    verdict: Verdict


class Undecided(NamedTuple):
    """The store did not answer `Try`, `Poll` or `End`."""

    step: StepKey
    reason: str


class Tick(NamedTuple):
    """Time has passed."""


class StopAsked(NamedTuple):
    """Drain, and exit at `deadline` at the latest (seconds of the engine's clock)."""

    deadline: float


Event = (
    Said | Mapped | Restored | Gone | Opened | ChunksStored | RankPut | PartFailed | Judged | Undecided | Tick | StopAsked
)  # fmt: skip


# --- effects -----------------------------------------------------------------------------------


class Send(NamedTuple):
    """Send a message to a client; one that is gone is fine."""

    client: int
    message: FromDaemon


class ShowHeld(NamedTuple):
    """Send a client those of the snapshots that still lie where they were handed off.

    Each with the number under which its client, `HeldSnapshot.arena`, announced the arena.
    """

    client: int
    daemon: str
    snapshots: tuple[tuple[int, HeldSnapshot], ...]


class Lend(NamedTuple):
    """Send a message to a client, the memory of an arena beside it.

    `owner` are the client and the number that it was announced by.
    """

    client: int
    message: Lent | Ceded
    owner: tuple[int, int]


class Drop(NamedTuple):
    """Close a client's connection after what was sent to it."""

    client: int


class Open(NamedTuple):
    """Open the store of a hello; answer with `Opened`."""

    client: int
    hello: Hello


class Store(NamedTuple):
    """Store the chunks that lie in a slot; answer with `ChunksStored` or `PartFailed`.

    An urgent one goes ahead of all that are not.
    """

    part: PartKey
    client: int
    arena: int
    slot: int
    generation: int
    recipe: Recipe
    hello: Hello
    is_urgent: bool = False


class PutRank(NamedTuple):
    """Put a rank manifest; answer with `RankPut` or `PartFailed`.

    If `basis` is committed by now, that is the checkpoint before this one.
    """

    part: PartKey
    record: RankManifest
    basis: StepId | None = None


class Try(NamedTuple):
    """Commit the step if it is whole; answer with `Judged` or `Undecided`.

    `is_leader` says that this is rank 0's daemon: where a store does not tell racing committers
    apart, no other one may end a step.
    """

    step: StepKey
    world_size: int
    is_leader: bool


class Poll(NamedTuple):
    """Look for the step's terminal record; answer with `Judged` or `Undecided`."""

    step: StepKey
    world_size: int


class End(NamedTuple):
    """Put the outcomes, then a tombstone; answer with `Judged` or `Undecided`.

    `is_leader` as in `Try`.
    """

    step: StepKey
    world_size: int
    is_leader: bool
    verdict: Verdict
    outcomes: tuple[Outcome, ...]


class KeepArena(NamedTuple):
    """Make an arena outlive this process, where there is a way.

    `pid` is the process that writes there from now on, 0 where that is not known.
    """

    client: int
    message: Arena
    pid: int


class Keep(NamedTuple):
    """Make what describes the snapshot in a slot outlive this process too."""

    client: int
    arena: int
    slot: int
    snapshot: Snapshot


class Release(NamedTuple):
    """Unmap an arena of a client: nothing in it is needed any more."""

    client: int
    arena: int


class Idle(NamedTuple):
    """Nothing is in flight: give back memory that is only kept for speed."""


class Exit(NamedTuple):
    """End the engine. `code` is the process's exit code."""

    code: int


Effect = (
    Send | ShowHeld | Lend | Drop | Open | Store | PutRank | Try | Poll | End | KeepArena | Keep
    | Release | Idle | Exit
)  # fmt: skip
