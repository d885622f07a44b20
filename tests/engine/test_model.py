"""Any order of events: trainers that come, save, lose connections and die, a store that answers or
not. The world here answers as a store would; what the engine wants done is checked at every event.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ckptd.engine import events as ev
from ckptd.engine.events import Effect, Event, PartKey, StepKey
from ckptd.engine.state import Engine
from ckptd.engine.steps import GIVE_UP_S
from ckptd.model.keys import StepId
from ckptd.model.manifest import Chunk
from ckptd.pipeline.commit import COMMITTED, Verdict
from ckptd.wire import messages as say
from tests.fakes.engines import DIGEST, ROOT, handoff, hello, recipe

CHUNK = Chunk(DIGEST, str(StepId(1, 1)), "float32", 4, 100)
LINGER_S = 600.0


@dataclass
class Save:
    """What a trainer knows of one of its saves."""

    step: int
    sequence: int
    is_forfeit: bool
    is_urgent: bool = False
    previous: str | None = None
    is_written: bool = False
    word: say.Finished | None = None


@dataclass
class Trainer:
    """One rank: on this node, or elsewhere (then it only puts records into the store)."""

    rank: int
    is_local: bool
    client: int | None = None
    arena: int = 1
    is_announced: bool = False
    is_dead: bool = False
    is_gone: bool = False
    saves: list[Save] = field(default_factory=list)


@dataclass
class StoredStep:
    """What the store holds of a step: `ranks` says whose part is there, or its outcome."""

    ranks: dict[int, str] = field(default_factory=dict)
    terminal: str = ""


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(linger_s=LINGER_S)
        self.now = 100.0
        self.next_client = 1
        self.trainers: list[Trainer] = []
        self.steps: dict[int, StoredStep] = {}
        self.storing: dict[PartKey, ev.Store] = {}
        self.stored: set[PartKey] = set()
        self.putting: dict[PartKey, ev.PutRank] = {}
        self.put: set[PartKey] = set()
        self.judging: dict[StepKey, ev.Try | ev.Poll | ev.End] = {}
        self.ended_at: dict[int, float] = {}
        self.exit: ev.Exit | None = None
        self.stop_at: float | None = None
        self.clients: dict[int, Trainer] = {}
        self.released: set[tuple[int, int]] = set()
        self.holders: dict[int, Trainer] = {}

    # --- the engine, and what must hold at every event -----------------------------------------

    def feed(self, event: Event) -> None:
        if self.exit is not None:
            return
        for effect in self.engine.on(event, self.now):
            self.check(effect)

    def check(self, effect: Effect) -> None:
        if isinstance(effect, ev.Store):
            assert effect.part not in self.storing, "one reader for a part"
            self.storing[effect.part] = effect
        elif isinstance(effect, ev.PutRank):
            self.check_put(effect)
        elif isinstance(effect, (ev.Try, ev.Poll, ev.End)):
            assert effect.step not in self.judging, "one operation in flight for a step"
            self.judging[effect.step] = effect
            if isinstance(effect, ev.End):
                self.ended_at.setdefault(effect.step.id.step, self.now)
        elif isinstance(effect, ev.Release):
            used = {(store.client, store.arena) for store in self.storing.values()}
            assert (effect.client, effect.arena) not in used, "memory that is being read"
            self.released.add((effect.client, effect.arena))
        elif isinstance(effect, (ev.ShowHeld, ev.Lend)):
            self.check_memory(effect)
        elif isinstance(effect, ev.Drop):
            for trainer in self.trainers:
                if trainer.client == effect.client:
                    trainer.client = None
        elif isinstance(effect, ev.Send):
            self.check_send(effect)
        elif isinstance(effect, ev.Exit):
            self.check_exit(effect)

    def check_put(self, effect: ev.PutRank) -> None:
        part, record = effect.part, effect.record
        assert part in self.stored, "D3: a rank manifest before its chunks"
        assert part not in self.putting
        assert part not in self.put
        assert record.chunks == (CHUNK,)
        assert (record.step, record.rank, record.sequence) == (
            part.step.id.step, part.rank, part.sequence
        )  # fmt: skip
        if part.rank == 0:
            self.check_previous(part, record.previous)
        self.putting[part] = effect

    def check_previous(self, part: PartKey, previous: str | None) -> None:
        """Rank 0 names the checkpoint before: the newest, as far as that can be known."""
        saves = self.trainers[0].saves
        save = saves[part.sequence - 1]
        before = [s for s in saves if s.sequence < part.sequence]
        if not save.is_urgent:
            known = [s for s in before if StepKey(ROOT, StepId(1, s.step)) in self.open_keys()]
            assert not known, "it must be decided"
        committed = [s.step for s in before if self.steps[s.step].terminal == "committed"]
        told = [s for s in committed if StepId(1, s) in self.job().closed]
        expected = str(StepId(1, max(told))) if told else None
        newest = self.job().newest
        if newest is not None and newest > part.step.id:  # an urgent one came in between
            assert previous == save.previous, "what was known when it was captured"
            return
        assert previous == expected or previous in {
            str(StepId(1, s)) for s in committed if not told or s > max(told)
        }

    def check_send(self, effect: ev.Send) -> None:
        message = effect.message
        if not isinstance(message, (say.Written, say.Finished)):
            return
        stored = self.steps[message.step]
        if isinstance(message, say.Finished):
            if message.state == "unknown":
                assert self.now - self.ended_at[message.step] >= GIVE_UP_S
            else:
                expected = "committed" if message.state == "committed" else "failed"
                assert stored.terminal == expected, "D5: only what stands in the store is said"
        for trainer in self.trainers:
            if trainer.client != effect.client:
                continue
            for save in trainer.saves:
                if save.step == message.step and isinstance(message, say.Finished):
                    assert save.word is None or save.word.state == message.state
                    save.word = message
                    part = PartKey(StepKey(ROOT, StepId(1, save.step)), trainer.rank, save.sequence)
                    assert save.is_written or part not in self.put, "its slot is still held"
                elif save.step == message.step:
                    is_there = stored.ranks.get(trainer.rank) == "part"
                    assert is_there or self.is_closed(save.step), "written before it was"
                    save.is_written = True

    def check_memory(self, effect: ev.ShowHeld | ev.Lend) -> None:
        if isinstance(effect, ev.Lend):
            self.check_lent(effect)
            return
        for arena, row in effect.snapshots:
            owner = self.clients[row.arena]
            assert owner.client != row.arena, "its writer is here"
            assert (row.arena, arena) not in self.released
            assert row.rank == owner.rank
            save = owner.saves[row.sequence - 1]
            assert (row.step, row.slot) == (save.step, save.sequence % 2)

    def check_lent(self, effect: ev.Lend) -> None:
        owner, taker = self.clients[effect.owner[0]], self.clients[effect.client]
        assert effect.owner not in self.released
        if isinstance(effect.message, say.Lent):
            return
        assert owner.is_dead, "two would write in one arena"
        reading = {(store.client, store.arena) for store in self.storing.values()}
        assert effect.owner not in reading, "it is being stored"
        holder = self.holders.get(effect.owner[0])
        assert holder is None or holder is taker or holder.is_dead or holder.is_gone
        self.holders[effect.owner[0]] = taker

    def check_exit(self, effect: ev.Exit) -> None:
        is_late = self.stop_at is not None and self.now >= self.stop_at
        if effect.code == 0:
            assert not self.open_keys(), "steps are open"
            assert not self.storing
        else:
            assert is_late
        if not is_late:
            assert not any(t.client for t in self.trainers), "somebody is here"
        self.exit = effect

    def job(self):
        return self.engine.jobs[ROOT, 1]

    def open_keys(self) -> set[StepKey]:
        if (ROOT, 1) not in self.engine.jobs:
            return set()
        return {step.key for step in self.job().steps.values()}

    def is_closed(self, step: int) -> bool:
        return (ROOT, 1) in self.engine.jobs and StepId(1, step) in self.job().closed

    # --- trainers ------------------------------------------------------------------------------

    @initialize(local=st.lists(st.booleans(), min_size=0, max_size=2))
    def begin(self, local: list[bool]) -> None:
        for rank, is_local in enumerate([True, *local]):
            self.trainers.append(Trainer(rank, is_local))

    def pick(self, rank: int) -> Trainer:
        return self.trainers[rank % len(self.trainers)]

    def connect(self, trainer: Trainer) -> None:
        """Do what `Link` does after a connection was made."""
        number, self.next_client = self.next_client, self.next_client + 1
        trainer.client = number
        self.clients[number] = trainer
        world = len(self.trainers)
        self.feed(ev.Said(number, hello(trainer.rank, world)))
        if trainer.client is None:  # refused: the engine drains
            return
        self.feed(ev.Opened(number))
        trainer.is_announced = False
        self.feed(ev.Said(number, recipe()))
        for save in trainer.saves:
            if save.word is None and trainer.client == number:
                self.hand_off(trainer, save)

    def hand_off(self, trainer: Trainer, save: Save) -> None:
        if trainer.client is None:
            return
        message: say.FromTrainer
        if save.is_forfeit:
            message = say.Forfeit(save.step, save.sequence, "failed", "because")
        elif save.is_written:
            message = say.Watch(save.step, save.sequence, None)
        else:
            plain = handoff(
                save.step, save.sequence, slot=save.sequence % 2, previous=save.previous
            )
            deadline_s = 25.0 if save.is_urgent else None
            message = msgspec.structs.replace(plain, arena=trainer.arena, deadline_s=deadline_s)
            if not trainer.is_announced:
                trainer.is_announced = True
                self.feed(ev.Said(trainer.client, say.Arena(trainer.arena, 2, 8192)))
        self.feed(ev.Said(trainer.client, message))

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2))
    def come(self, rank: int) -> None:
        trainer = self.pick(rank)
        if trainer.is_local and not (trainer.is_dead or trainer.is_gone or trainer.client):
            self.connect(trainer)

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2))
    def replace_connection(self, rank: int) -> None:
        """A second hello of a rank comes before the end of its first connection was seen."""
        trainer = self.pick(rank)
        if trainer.client is not None:
            self.connect(trainer)

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2), is_dead=st.booleans())
    def lose(self, rank: int, is_dead: bool) -> None:
        trainer = self.pick(rank)
        if trainer.client is not None:
            client, trainer.client = trainer.client, None
            trainer.is_dead = is_dead
            self.feed(ev.Gone(client, is_dead))

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2), keeps=st.booleans())
    def leave(self, rank: int, keeps: bool) -> None:
        trainer = self.pick(rank)
        if trainer.client is not None and all(save.word for save in trainer.saves):
            client, trainer.client = trainer.client, None
            trainer.is_gone = True
            self.feed(ev.Said(client, say.Goodbye(keeps)))

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2), number=st.integers(0, 2))
    def ask_for_memory(self, rank: int, number: int) -> None:
        """Ask what is held, for what was, or for an arena."""
        trainer = self.pick(rank)
        if trainer.client is not None:
            wishes = (say.Seek(), say.Borrow(number + 1, number, 1), say.Claim(1, 4096))
            self.feed(ev.Said(trainer.client, wishes[number]))

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2), is_dead=st.booleans())
    def lose_and_claim(self, rank: int, is_dead: bool) -> None:
        """Of what one leaves the others ask for, after they came again with nothing to hand off."""
        self.lose(rank, is_dead)
        for other in self.trainers:
            if other.client is not None and all(save.word for save in other.saves):
                self.connect(other)
                self.feed(ev.Said(other.client, say.Claim(1, 4096)))

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2))
    def die_later(self, rank: int) -> None:
        """A process dies whose connection ended before."""
        trainer = self.pick(rank)
        numbers = [number for number, known in self.clients.items() if known is trainer]
        if numbers and trainer.client is None:
            trainer.is_dead = True
            self.feed(ev.Gone(max(numbers), is_dead=True))

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2), is_forfeit=st.booleans(), is_urgent=st.booleans())
    def save(self, rank: int, is_forfeit: bool, is_urgent: bool) -> None:
        trainer = self.pick(rank)
        if trainer.is_dead or trainer.is_gone:
            return
        sequence = len(trainer.saves) + 1
        known = [s.step for s in trainer.saves if s.word and s.word.state == "committed"]
        save = Save(
            10 * sequence, sequence, is_forfeit and sequence % 3 == 0, is_urgent,
            str(StepId(1, max(known))) if known else None,
        )  # fmt: skip
        trainer.saves.append(save)
        self.steps.setdefault(save.step, StoredStep())
        if trainer.is_local:
            self.hand_off(trainer, save)
        else:
            self.steps[save.step].ranks.setdefault(rank % len(self.trainers), "part")

    @precondition(lambda self: self.exit is None)
    @rule(rank=st.integers(0, 2))
    def grow(self, rank: int) -> None:
        """A trainer makes larger slots; what is handed off already stays in the old ones."""
        trainer = self.pick(rank)
        if trainer.client is not None:
            trainer.arena += 1
            trainer.is_announced = True
            self.feed(ev.Said(trainer.client, say.Arena(trainer.arena, 2, 16384)))

    # --- the store -----------------------------------------------------------------------------

    @precondition(lambda self: self.exit is None and self.storing)
    @rule(which=st.integers(0, 9), is_good=st.booleans())
    def answer_store(self, which: int, is_good: bool) -> None:
        part = sorted(self.storing)[which % len(self.storing)]
        del self.storing[part]
        if is_good:
            self.stored.add(part)
            self.feed(ev.ChunksStored(part, (CHUNK,)))
        else:
            self.feed(ev.PartFailed(part, "the disk is full"))

    @precondition(lambda self: self.exit is None and self.putting)
    @rule(which=st.integers(0, 9), is_there=st.booleans(), is_good=st.booleans())
    def answer_put(self, which: int, is_there: bool, is_good: bool) -> None:
        part = sorted(self.putting)[which % len(self.putting)]
        del self.putting[part]
        ranks = self.steps[part.step.id.step].ranks
        if is_good and ranks.get(part.rank, "part") == "part":
            ranks[part.rank] = "part"
            self.put.add(part)
            self.feed(ev.RankPut(part))
        else:
            if is_there:  # the answer was lost, and nobody can tell
                ranks.setdefault(part.rank, "part")
            self.feed(ev.PartFailed(part, "no answer"))

    @precondition(lambda self: self.exit is None and self.judging)
    @rule(which=st.integers(0, 9), outcome=st.sampled_from(["good", "lost", "silent"]))
    def answer_judge(self, which: int, outcome: str) -> None:
        key = sorted(self.judging)[which % len(self.judging)]
        effect = self.judging.pop(key)
        verdict = self.verdict_on(effect) if outcome != "silent" else None
        if outcome == "good":
            self.feed(ev.Judged(key, verdict))
        else:
            self.feed(ev.Undecided(key, "no answer"))

    @precondition(lambda self: self.exit is None and self.storing)
    @rule()
    def overtake(self) -> None:
        """What was handed off last goes all the way, if it may."""
        self.answer_store(-1, is_good=True)
        if self.putting:
            self.answer_put(-1, is_there=True, is_good=True)
        if self.judging:
            self.answer_judge(-1, "good")

    def verdict_on(self, effect: ev.Try | ev.Poll | ev.End) -> Verdict:
        """Do what the pipeline does with this effect, and answer as it does."""
        stored = self.steps[effect.step.id.step]
        missing = tuple(r for r in range(effect.world_size) if r not in stored.ranks)
        if isinstance(effect, ev.End):
            for outcome in effect.outcomes:
                stored.ranks.setdefault(outcome.rank, "outcome")
            stored.terminal = stored.terminal or "failed"
        elif isinstance(effect, ev.Try) and not stored.terminal:
            if "outcome" in stored.ranks.values():
                stored.terminal = "failed"
            elif not missing:
                stored.terminal = "committed"
        if stored.terminal == "committed":
            return COMMITTED
        if stored.terminal:
            return effect.verdict if isinstance(effect, ev.End) else Verdict("failed", "", "why")
        return Verdict("waiting", ranks=missing)

    # --- time ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.1, 5.0, 61.0, 700.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.feed(ev.Tick())

    @precondition(lambda self: self.exit is None)
    @rule()
    def wait_until_due(self) -> None:
        due = self.engine.next_due()
        if due is not None:
            self.now = max(self.now, due)
            self.feed(ev.Tick())

    @precondition(lambda self: self.exit is None and self.stop_at is None)
    @rule(seconds=st.sampled_from([1.0, 100.0]), is_sure=st.integers(0, 9))
    def stop(self, seconds: float, is_sure: int) -> None:
        if is_sure == 0:  # rarely: it ends most of what can happen
            self.stop_at = self.now + seconds
            self.feed(ev.StopAsked(self.stop_at))

    # --- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Once everything is answered, every trainer that lives has the word on every save."""
        for _ in range(5000):
            if self.exit is not None:
                return
            for trainer in self.trainers:
                if trainer.is_local and not (trainer.is_dead or trainer.is_gone or trainer.client):
                    self.connect(trainer)
            if self.storing:
                self.answer_store(0, is_good=True)
            elif self.putting:
                self.answer_put(0, is_there=True, is_good=True)
            elif self.judging:
                self.answer_judge(0, "good")
            elif self.open_keys():
                due = self.engine.next_due()
                assert due is not None, "an open step that nothing will ever wake"
                self.now = max(self.now, due)
                self.feed(ev.Tick())
            else:
                break
        assert not self.open_keys()
        for trainer in self.trainers:
            if trainer.client is not None:
                assert all(save.word for save in trainer.saves), "a save without its word"
        assert not any(client.reading for client in self.engine.clients.values())
        live = {trainer.client for trainer in self.trainers} - {None}
        kept = {client.number for client in self.engine.memory.kept}
        assert set(self.engine.clients) - kept == live, "clients that left nothing are forgotten"
        assert not kept & live


World.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase
