"""What trainer and daemon say to each other.

A message is msgpack of a tagged struct; descriptors travel beside it, never in it. Unknown fields
and tags are refused: both ends are of one version, which the hello states.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ckptd.model.columns import Columns
from ckptd.model.ready import make_ready
from ckptd.model.tensor import Tensor

PROTOCOL = 2
MAX_RECIPES = 4  # of one connection: a daemon forgets the oldest, and a trainer counts on it
MAX_VALUES_BYTES = 48 << 20

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Name = Annotated[str, Meta(max_length=4096)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="say"):
    """Anything that travels."""


# --- trainer to daemon -------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """The first message of a rank. A second hello of one (root, attempt, rank) replaces the first.

    `token` is the attempt record's. `storage_options` stay in memory and never reach a log.
    """

    protocol: int
    root: Name
    storage_options: dict[str, object]
    attempt: Count
    token: Name
    rank: Count
    world_size: Count
    compression: Literal["auto", "zstd", "none"]
    commit_timeout_s: float


class Arena(Message, frozen=True, tag="arena"):
    """Announces the memfd that travels beside this message, in place of any earlier one.

    Slot i is the `slot_bytes` bytes from ``i * slot_bytes`` on: a header page, then the chunks.
    """

    arena: Count
    slots: Annotated[int, Meta(ge=1, le=64)]
    slot_bytes: Count


class ChunkPlan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A chunk as it lies in a slot: `offset_bytes` from the start of the slot, header included."""

    dtype: Name
    offset_bytes: Count
    raw_bytes: Count


class Recipe(Message, frozen=True, tag="recipe"):
    """What stays the same from save to save: said once, then referred to by number.

    `pieces` refer to `tensors` and `chunks` by place. `plan` and `layout` as in a rank manifest.
    """

    recipe: Count
    plan: str | None
    layout: str
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    chunks: tuple[ChunkPlan, ...]
    pieces: Columns


class Handoff(Message, frozen=True, tag="handoff"):
    """A whole snapshot lies in a slot; the daemon answers with `Written` and then `Finished`.

    `values` is a JSON object of tagged values. `previous` is the newest checkpoint of the line that
    the trainer knows to be committed: at first the one it resumed from. `basis` is the step that it
    resumed from memory, which may have been committed since. With `deadline_s` left until the machine
    goes, this snapshot goes ahead of all others. The same snapshot may be handed off again after a
    lost connection.
    """

    step: Count
    sequence: Annotated[int, Meta(ge=1, le=1 << 48)]
    arena: Count
    slot: Count
    generation: Count
    recipe: Count
    values: bytes
    fingerprints: bytes
    metrics: dict[str, float]
    previous: str | None
    captured_at: float
    basis: str | None = None
    deadline_s: Annotated[float, Meta(ge=0, le=1e7)] | None = None


class Watch(Message, frozen=True, tag="watch"):
    """This rank's part of a step was written before the connection was lost; report the outcome."""

    step: Count
    sequence: Annotated[int, Meta(ge=1, le=1 << 48)]
    previous: str | None


class Forfeit(Message, frozen=True, tag="forfeit"):
    """This rank delivers nothing for a step: record why, so that nobody waits for it."""

    step: Count
    sequence: Annotated[int, Meta(ge=1, le=1 << 48)]
    state: Literal["failed", "skipped"]
    reason: Name


class Settle(Message, frozen=True, tag="settle"):
    """Answer with `Settled` once nothing of earlier attempts of this root is being written."""


class Seek(Message, frozen=True, tag="seek"):
    """Answer with `Held`: what earlier attempts of this root left in memory."""


class Borrow(Message, frozen=True, tag="borrow"):
    """Lend this snapshot, to be read: answer with `Lent`."""

    arena: Count
    slot: Count
    generation: Count


class Claim(Message, frozen=True, tag="claim"):
    """Give this rank an arena of this shape that a dead one left: answer with `Ceded`.

    At once, or when the daemon has read what it still stores from it. Where none fits, another one is
    let go, so that memory does not double.
    """

    slots: Annotated[int, Meta(ge=1, le=64)]
    slot_bytes: Count


class Goodbye(Message, frozen=True, tag="goodbye"):
    """The rank leaves on purpose; what was handed off is still finished.

    With `keeps` it will come again: its newest snapshots stay in memory for a while.
    """

    keeps: bool = False


class Ask(Message, frozen=True, tag="ask"):
    """From `ckptd status`: answer with `Report`. Needs no hello before it."""


class Preempt(Message, frozen=True, tag="preempt"):
    """From `ckptd preempt`: pass it on as `Stop`, answer with `Told`. Needs no hello before it.

    An empty `root` means the trainers of all roots.
    """

    root: Name
    reason: Name


# --- daemon to trainer -------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The hello was accepted."""


class Refused(Message, frozen=True, tag="refused"):
    """The daemon closes the connection after this. `kind` is the name of a class of `errors`."""

    kind: Name
    reason: str


class Taken(Message, frozen=True, tag="taken"):
    """The handoff has arrived: from here on the trainer may die."""

    step: Count
    sequence: Count


class Written(Message, frozen=True, tag="written"):
    """The rank manifest is durable: the slot may be used again."""

    step: Count
    sequence: Count


class Finished(Message, frozen=True, tag="finished"):
    """The final word on a step. `kind` names a class of `errors` where it is not committed."""

    step: Count
    sequence: Count
    state: Literal["committed", "failed", "skipped", "unknown"]
    kind: Name
    reason: str
    fqn: str
    ranks: tuple[int, ...]


class Settled(Message, frozen=True, tag="settled"):
    """Nothing of earlier attempts of this root is being written."""


class HeldSnapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A snapshot in an arena that no trainer has. `token` is its attempt's; `arena` the daemon's number."""

    attempt: Count
    token: Name
    step: Count
    sequence: Count
    rank: Count
    world_size: Count
    arena: Count
    slot: Count
    generation: Count


class Held(Message, frozen=True, tag="held"):
    """All that is held of this root. `daemon` is another one for each start of a daemon."""

    daemon: Name
    snapshots: tuple[HeldSnapshot, ...]


class Lent(Message, frozen=True, tag="lent"):
    """The memfd that travels beside this message holds the snapshot; without `handoff` it is gone."""

    arena: Count
    slots: Count = 0
    slot_bytes: Count = 0
    handoff: Handoff | None = None
    recipe: Recipe | None = None


class Ceded(Message, frozen=True, tag="ceded"):
    """The memfd that travels beside this message is this rank's; with no `slots` none fits."""

    slots: Count = 0
    slot_bytes: Count = 0


class Stop(Message, frozen=True, tag="stop"):
    """Somebody wants the job to save and end."""

    reason: Name


class Told(Message, frozen=True, tag="told"):
    """How many trainers a `Preempt` was passed on to."""

    trainers: Count


class Report(Message, frozen=True, tag="report"):
    """The daemon's state, as JSON."""

    body: bytes


FromTrainer = (
    Hello | Arena | Recipe | Handoff | Watch | Forfeit | Settle | Seek | Borrow | Claim | Goodbye
    | Ask | Preempt
)  # fmt: skip
FromDaemon = (
    Welcome | Refused | Taken | Written | Finished | Settled | Held | Lent | Ceded | Stop | Told
    | Report
)  # fmt: skip


make_ready(FromTrainer, FromDaemon)
