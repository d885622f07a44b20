"""An engine on a bench: events go in by hand, effects are kept, the clock stands still."""

from __future__ import annotations

from typing import Any, TypeVar

from ckptd.engine import events as ev
from ckptd.engine.events import Effect, Event, PartKey, StepKey
from ckptd.engine.state import Engine
from ckptd.model.columns import Columns
from ckptd.model.keys import StepId
from ckptd.model.manifest import Chunk
from ckptd.pipeline.commit import COMMITTED, Verdict
from ckptd.wire import messages as say

T = TypeVar("T", bound=Effect)

ROOT = "/root"
DIGEST = "0" * 32


def hello(rank: int = 0, world_size: int = 1, attempt: int = 1, *, root: str = ROOT) -> say.Hello:
    return say.Hello(
        protocol=say.PROTOCOL, root=root, storage_options={}, attempt=attempt, token=f"t{attempt}",
        rank=rank, world_size=world_size, compression="auto", commit_timeout_s=60.0,
    )  # fmt: skip


def recipe(number: int = 1) -> say.Recipe:
    return say.Recipe(
        recipe=number, plan=None, layout=DIGEST, tensors=(), aliases={}, chunks=(), pieces=Columns()
    )


def handoff(step: int, sequence: int, *, slot: int = 0, previous: str | None = None) -> say.Handoff:
    return say.Handoff(
        step=step, sequence=sequence, arena=1, slot=slot, generation=1, recipe=1, values=b"{}",
        fingerprints=b"", metrics={}, previous=previous, captured_at=0.0,
    )  # fmt: skip


class Bench:
    def __init__(self, *, linger_s: float | None = None) -> None:
        self.engine = Engine(linger_s=linger_s)
        self.now = 100.0
        self.effects: list[Effect] = []

    def on(self, event: Event) -> list[Effect]:
        """Feed one event; return only its effects, and keep them all."""
        effects = self.engine.on(event, self.now)
        self.effects += effects
        return effects

    def say(self, client: int, message: say.FromTrainer) -> list[Effect]:
        return self.on(ev.Said(client, message))

    def tick(self, seconds: float = 0.0) -> list[Effect]:
        self.now += seconds
        return self.on(ev.Tick())

    def join(
        self, client: int, rank: int = 0, world_size: int = 1, attempt: int = 1, *, root: str = ROOT
    ) -> None:  # fmt: skip
        """Bring a client to the point where it may hand off."""
        self.say(client, hello(rank, world_size, attempt, root=root))
        self.on(ev.Opened(client))
        self.say(client, say.Arena(1, 2, 8192))
        self.say(client, recipe())

    def part(self, step: int, sequence: int, rank: int = 0, attempt: int = 1) -> PartKey:
        return PartKey(StepKey(ROOT, StepId(attempt, step)), rank, sequence)

    def store(self, step: int, sequence: int, rank: int = 0) -> list[Effect]:
        """Answer `Store`: the chunks are durable."""
        chunk = Chunk(DIGEST, str(StepId(1, step)), "float32", 4, 100)
        return self.on(ev.ChunksStored(self.part(step, sequence, rank), (chunk,)))

    def put(self, step: int, sequence: int, rank: int = 0) -> list[Effect]:
        """Answer `PutRank`."""
        return self.on(ev.RankPut(self.part(step, sequence, rank)))

    def write(self, client: int, step: int, sequence: int, rank: int = 0) -> list[Effect]:
        """Hand off and bring the part to the store; return the effects of the last event."""
        self.say(client, handoff(step, sequence))
        self.store(step, sequence, rank)
        return self.put(step, sequence, rank)

    def judge(self, step: int, verdict: Verdict = COMMITTED, attempt: int = 1) -> list[Effect]:
        return self.on(ev.Judged(StepKey(ROOT, StepId(attempt, step)), verdict))


def of(kind: type[T], effects: list[Effect]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def said(kind: type, effects: list[Effect], client: int | None = None) -> list[say.FromDaemon]:
    """Return the messages of one kind that were sent, to one client or to all."""
    return [
        effect.message
        for effect in of(ev.Send, effects)
        if isinstance(effect.message, kind) and client in (None, effect.client)
    ]


# --- what is left in memory --------------------------------------------------------------------


def join_with(
    bench: Bench, client: int, *, rank: int = 0, world_size: int = 1, attempt: int = 1,
    root: str = ROOT, slots: int = 2, slot_bytes: int = 8192, identity: int | None = None,
    is_announced: bool = True,
) -> None:  # fmt: skip
    """Bring a client to the point where it may hand off; its memory is known from any other."""
    bench.say(client, hello(rank, world_size, attempt, root=root))
    bench.on(ev.Opened(client))
    if is_announced:
        announce(bench, client, identity or 100 + client, slots=slots, slot_bytes=slot_bytes)
    bench.say(client, recipe())


def announce(
    bench: Bench, client: int, identity: int, *, slots: int = 2, slot_bytes: int = 8192
) -> list[Effect]:
    return bench.on(ev.Mapped(client, say.Arena(1, slots, slot_bytes), identity))


def left_by(bench: Bench, client: int, *, step: int = 10, **options: Any) -> None:
    """Let a client come, hand a step off, which fails, and die."""
    join_with(bench, client, **options)
    bench.say(client, handoff(step, 1))
    rank, attempt = options.get("rank", 0), options.get("attempt", 1)
    key = StepKey(options.get("root", ROOT), StepId(attempt, step))
    bench.on(ev.PartFailed(PartKey(key, rank, 1), "the disk is full"))
    bench.on(ev.Judged(key, Verdict("failed", "SaveFailedError", "the disk is full")))
    bench.on(ev.Gone(client, is_dead=True))


def seen(bench: Bench, client: int) -> list[say.HeldSnapshot]:
    """Return what is shown to a client that asks."""
    (shown,) = of(ev.ShowHeld, bench.say(client, say.Seek()))
    return [row for _, row in shown.snapshots]
