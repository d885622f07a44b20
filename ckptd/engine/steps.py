"""Open steps: the parts of them that came, and what is due next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ckptd.engine.events import End, PartKey, Poll, StepKey, Try
from ckptd.errors import SaveFailedError
from ckptd.model.manifest import Chunk, Outcome
from ckptd.pipeline.commit import Verdict, incomplete, outcome_verdict
from ckptd.wire.messages import Handoff, Recipe

FIRST_POLL_S = 0.02
LAST_POLL_S = 1.0
COMMIT_SILENCE_S = 30.0
GIVE_UP_S = 30.0

PartState = Literal["storing", "held", "putting", "written"]


@dataclass
class Part:
    """What this daemon knows of one rank's part of a step.

    ``held`` is a part of rank 0 that is stored, but whose rank manifest waits for the step before
    it to be decided, because it names that step as `previous`.
    """

    key: PartKey
    client: int
    state: PartState
    handoff: Handoff | None = None
    recipe: Recipe | None = None
    values: dict[str, Any] = field(default_factory=dict)
    chunks: tuple[Chunk, ...] = ()

    @property
    def is_urgent(self) -> bool:
        """Tell whether the machine that has it is about to go."""
        return self.handoff is not None and self.handoff.deadline_s is not None


class Closed(NamedTuple):
    """A step that has its verdict, which is one on the save numbered `sequence`."""

    step: int
    sequence: int
    verdict: Verdict

    def verdict_on(self, sequence: int) -> Verdict:
        """Return the verdict on a save of this step: nobody stored another one than `sequence`."""
        if sequence == self.sequence:
            return self.verdict
        reason = two_saves(self.step, self.sequence, sequence)
        return Verdict("failed", SaveFailedError.__name__, reason)


@dataclass
class Step:
    """A step that has no verdict yet.

    `doom` is set once it is known that the step cannot be committed; only a tombstone makes that
    final. `is_waiting` says that there was nothing to do when last looked: only an event changes
    that, or the end of `timeout_s`. `is_watched`: a part came to the store through a daemon that is
    gone, so others may have too, and their ranks may know the outcome and never ask here. `saves`
    has the sequence number under which each local rank spoke of the step.
    """

    key: StepKey
    sequence: int
    since: float
    timeout_s: float
    silence_s: float
    saves: dict[int, int] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    doom: Verdict | None = None
    doomed_at: float | None = None
    missing: tuple[int, ...] = ()
    is_busy: bool = False
    is_waiting: bool = False
    is_watched: bool = False
    due: float = 0.0
    poll_s: float = FIRST_POLL_S

    def has_written(self, rank: int) -> bool:
        """Tell whether the rank manifest of a rank was made durable by this daemon."""
        return rank in self.parts and self.parts[rank].state == "written"

    @property
    def is_leading(self) -> bool:
        """Tell whether this daemon is rank 0's, as far as this step has shown."""
        return 0 in self.saves or 0 in self.outcomes

    @property
    def is_storing(self) -> bool:
        """Tell whether some part is on its way to the store; a held one waits for another step."""
        return any(part.state in ("storing", "putting") for part in self.parts.values())

    def note_save(self, rank: int, sequence: int) -> None:
        """Note under which sequence number a rank speaks of this step; two saves of it doom it."""
        self.saves[rank] = sequence
        if sequence != self.sequence:
            step = self.key.id.step
            is_own = rank in self.parts
            self.fail(
                f"rank {rank} handed step {step} off twice" if is_own
                else two_saves(step, self.sequence, sequence), (),
            )  # fmt: skip

    def fail(self, reason: str, ranks: tuple[int, ...]) -> None:
        """Doom the step, unless it is doomed already: the first reason is the one reported."""
        if self.doom is None:
            self.doom = Verdict("failed", SaveFailedError.__name__, reason, ranks=ranks)
        self.hurry()

    def forfeit(self, outcome: Outcome) -> None:
        """Doom the step because one rank delivers nothing."""
        self.outcomes[outcome.rank] = outcome
        self.doom = self.doom or outcome_verdict(outcome)
        self.hurry()

    def hurry(self) -> None:
        """Make the next operation due at once."""
        self.due, self.poll_s = 0.0, FIRST_POLL_S

    def is_hopeless(self, now: float) -> bool:
        """Tell whether the store has refused the tombstone for so long that nobody should wait."""
        return self.doomed_at is not None and now - self.doomed_at >= GIVE_UP_S

    def wait(self, now: float) -> None:
        """Let the next operation wait, each time longer."""
        self.due = now + self.poll_s
        self.poll_s = min(2 * self.poll_s, LAST_POLL_S)

    def next_due(self) -> float | None:
        """Return when `next_operation` may have something without any event; None if never."""
        if self.is_busy:
            return None
        if self.doom is not None:
            return self.due
        limit = self.since + self.timeout_s
        return limit if self.is_waiting else min(self.due, limit)

    def next_operation(
        self, now: float, *, world_size: int, is_all_local: bool
    ) -> Try | Poll | End | None:
        """Return what is due for this step now, and mark it busy until the answer comes."""
        is_late = self.doom is None and now >= self.since + self.timeout_s
        if self.is_busy or (now < self.due and not is_late):
            return None
        operation = self._operation(now, world_size, is_all_local=is_all_local)
        self.is_busy, self.is_waiting = operation is not None, operation is None
        return operation

    def _operation(
        self, now: float, world_size: int, *, is_all_local: bool
    ) -> Try | Poll | End | None:
        if self.doom is None and now >= self.since + self.timeout_s:
            missing = self.missing or tuple(r for r in range(world_size) if not self.has_written(r))
            self.doom = incomplete(self.key.id, missing, self.timeout_s)
        if self.doom is not None:
            self.doomed_at = now if self.doomed_at is None else self.doomed_at
            outcomes = tuple(self.outcomes.values())
            return End(self.key, world_size, self.is_leading, self.doom, outcomes)
        if not any(part.state == "written" for part in self.parts.values()):
            return None
        if is_all_local and not self.is_watched:
            # Nobody else can deliver: no need to look before the last part is there.
            whole = all(self.has_written(rank) for rank in range(world_size))
            return Try(self.key, world_size, self.is_leading) if whole else None
        if self.has_written(0) or now - self.since >= self.silence_s:
            return Try(self.key, world_size, self.is_leading)
        return Poll(self.key, world_size)


def two_saves(step: int, one: int, other: int) -> str:
    """Say why a save of a step is refused of which there is another one."""
    return f"step {step} is save {one} on one rank and {other} on another, by sequence number"
