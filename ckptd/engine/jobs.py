"""A job, as far as one daemon serves it: one attempt of one root."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptd.engine.delivery import Author, rank_manifest_of
from ckptd.engine.events import StepKey
from ckptd.engine.replies import parse_id
from ckptd.engine.steps import COMMIT_SILENCE_S, Closed, Part, Step
from ckptd.errors import ProtocolError
from ckptd.model.keys import MAX_STEP, StepId
from ckptd.model.manifest import RankManifest
from ckptd.pipeline.commit import Verdict, new_outcome
from ckptd.wire.messages import Hello


@dataclass
class Job:
    """One attempt of one root, as far as this daemon serves it.

    `newest` is the newest checkpoint of the line that is known to be committed. `dead` are ranks
    whose process ended without a goodbye. `closed` remembers the last verdicts by step, for parts
    that come late. `vanished` has the last connection of each rank that ended without a goodbye.
    """

    root: str
    attempt: int
    world_size: int
    token: str
    newest: StepId | None = None
    steps: dict[StepId, Step] = field(default_factory=dict)
    closed: dict[StepId, Closed] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    vanished: dict[int, int] = field(default_factory=dict)

    def step_id(self, step: int) -> StepId:
        """Return the id of a step of this attempt.

        Raises:
            ProtocolError: there is no such step.
        """
        if step > MAX_STEP:
            raise ProtocolError(f"step {step} is out of range")
        return StepId(attempt=self.attempt, step=step)

    def step_of(self, step: int, sequence: int, now: float, hello: Hello) -> Step:
        """Return the open step with this number, opening it if need be.

        A step of which some local rank has died is opened doomed; two steps under one sequence
        number doom each other, and so do two saves of one step.
        """
        step_id = StepId(attempt=self.attempt, step=step)
        if step_id in self.steps:
            self.steps[step_id].note_save(hello.rank, sequence)
            return self.steps[step_id]
        opened = Step(
            StepKey(self.root, step_id), sequence, since=now, timeout_s=hello.commit_timeout_s,
            # Daemons that are not rank 0's wait in an order of their own, so that they do not
            # all come at once; the rank is a fair enough dice.
            silence_s=COMMIT_SILENCE_S * (1 + hello.rank / max(1, self.world_size)),
        )  # fmt: skip
        self.steps[step_id] = opened
        opened.note_save(hello.rank, sequence)
        for other in self.steps.values():
            if other is not opened and other.sequence == sequence:
                first = other.key.id.step
                reason = f"save {sequence} was step {first} on one rank and {step} on another"
                other.fail(reason, ())
                opened.fail(reason, ())
        for rank in self.dead:
            self.fail_without(rank, opened)
        return opened

    def welcome(self, rank: int) -> None:
        """Note that a rank is here, again perhaps."""
        self.dead.discard(rank)
        self.vanished.pop(rank, None)

    def note_vanished(self, rank: int, client: int) -> None:
        """Note that a rank's connection ended without a goodbye."""
        self.vanished[rank] = client

    def note_dead(self, client: int) -> None:
        """Note that the process at the other end of a connection is dead, unless it came back."""
        for rank, last in self.vanished.items():
            if last == client:
                self.dead.add(rank)
                for step in self.steps.values():
                    self.fail_without(rank, step)

    def fail_without(self, rank: int, step: Step) -> None:
        """Doom a step to which a dead rank has not delivered."""
        if rank not in step.parts:
            reason = "its process ended before it handed its part off"
            step.forfeit(
                new_outcome(step.key.id, rank, self.world_size, step.sequence, "failed", reason)
            )

    def is_of_another(self, hello: Hello) -> bool:
        """Tell whether a hello with this root and ordinal comes from a job that is not this one."""
        return (self.token, self.world_size) != (hello.token, hello.world_size)

    def is_undecided(self) -> bool:
        """Tell whether something of this job is on its way to the store or being decided here.

        Steps that wait for ranks elsewhere do not count: nobody here can hurry them.
        """
        return any(
            step.is_storing or step.is_busy or step.doom is not None
            or len(step.parts) == self.world_size
            for step in self.steps.values()
        )  # fmt: skip

    def close(self, step: Step, verdict: Verdict) -> Closed:
        """Take a step with its verdict off the open ones."""
        del self.steps[step.key.id]
        closed = self.closed[step.key.id] = Closed(step.key.id.step, step.sequence, verdict)
        while len(self.closed) > 64:
            del self.closed[next(iter(self.closed))]
        if verdict.state == "committed":
            self.learn(step.key.id)
        return closed

    def learn(self, step_id: StepId) -> None:
        """Remember a committed checkpoint of the line, if it is newer than the one known."""
        if self.newest is None or step_id > self.newest:
            self.newest = step_id

    def hear_of(self, previous: str | None) -> None:
        """Remember what a trainer says is the newest checkpoint of its line.

        Raises:
            ProtocolError: it is no step id.
        """
        step_id = parse_id(previous)
        if step_id is not None:
            self.learn(step_id)

    def basis_of(self, part: Part) -> StepId | None:
        """Return the step that rank 0 took from memory, until this attempt has a checkpoint."""
        basis = part.handoff.basis if part.handoff is not None and part.key.rank == 0 else None
        before = self.before(part)
        if basis is None or (before is not None and before.attempt == self.attempt):
            return None
        return StepId.parse(basis)

    def before(self, part: Part) -> StepId | None:
        """Return the newest checkpoint of the line that is known and lies before a part's step.

        An urgent step does not wait for those before it, so a later one may be committed already. Then
        it is what the trainer knew when it took the snapshot.
        """
        if self.newest is not None and self.newest < part.key.step.id:
            return self.newest
        return parse_id(part.handoff.previous) if part.handoff is not None else None

    def is_first_open(self, step: Step) -> bool:
        """Tell whether all steps with lower sequence numbers have their verdict."""
        return all(other.sequence >= step.sequence for other in self.steps.values())

    def rank_manifest(self, part: Part) -> RankManifest:
        """Build the rank manifest of a part whose chunks are stored."""
        assert part.handoff is not None
        assert part.recipe is not None
        previous = self.before(part)
        return rank_manifest_of(
            Author(self.attempt, part.key.rank, self.world_size), part.handoff, part.recipe,
            part.values, part.chunks, previous=str(previous) if previous else None,
        )  # fmt: skip


def forget_older(
    jobs: dict[tuple[str, int], Job], hello: Hello, in_use: set[tuple[str, int]]
) -> None:
    """Forget earlier attempts of a hello's root of which nothing is left."""
    for key, job in list(jobs.items()):
        is_older = key[0] == hello.root and key[1] < hello.attempt
        if is_older and key not in in_use and not job.steps:
            del jobs[key]


def replace(jobs: dict[tuple[str, int], Job], job: Job) -> bool:
    """Forget a job for another of the same root and ordinal; False while the store decides for it.

    Two jobs have one ordinal only if the root was deleted in between and begun anew.
    """
    if any(step.is_busy for step in job.steps.values()):
        return False
    del jobs[job.root, job.attempt]
    return True
