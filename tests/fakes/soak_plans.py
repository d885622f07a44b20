"""What is to happen in a round of the soak, drawn from its seed and from nothing else."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

Kind = Literal["trainer", "daemon", "both", "subset"]

ROUNDS = 5  # with one root: attempts pile up in it
KINDS: tuple[Kind, ...] = ("trainer", "daemon", "both", "subset")

# Every failpoint, and how often a process may come there before it dies of it.
TRAINER_POINTS = {
    "capture.begin": 4, "capture.done": 4, "link.send": 4, "link.sent": 4, "link.written": 4,
}  # fmt: skip
DAEMON_POINTS = {
    "handoff.taken": 8, "chunk.put": 16, "chunks.sync": 8, "rank.put": 8, "rank.done": 8,
    "commit.put": 4, "commit.done": 4, "store.write": 40, "store.link": 40, "store.sync": 16,
    "outcome.put": 1, "tombstone.put": 1,
}  # fmt: skip
# Where a daemon may hang for ever, after that many; and how many slots there must be, so that the
# newest step that all have handed off is not overwritten while one waits in its slot.
STALLS = {"commit.put": (3, 2), "rank.put": (6, 3)}
NOT_DRAWN = {"engine.exit", "root.open"}  # there is nothing to lose there yet, or any more


class Ground(NamedTuple):
    """What all rounds with one root have in common."""

    nodes: int
    slots: int
    width: int

    @classmethod
    def of(cls, seed: int) -> Ground:
        """Draw it."""
        dice = random.Random(f"ground {seed // ROUNDS}")
        return cls(
            nodes=dice.choice([1, 2, 2]),
            slots=dice.choice([1, 2, 2, 3]),
            width=dice.choice([2048, 8192, 16384]),  # 0.9, 3.4 or 6.9 MB with the moments
        )


class Strike(NamedTuple):
    """Who is killed, and when.

    Attributes:
        ranks, nodes: whom it hits. Once a rank is gone the others are ended too, after `gap_s`.
        saves: how many saves begin first.
        delay_s: from then on.
        point: in place of that, the failpoint at which the first of them dies: ``name=kill@n``.
        rides: if it hits no rank, the job goes on with new daemons, and loses nothing.
        stall: where a daemon comes to hang before that, ``name=hang@n``: it still has what was handed
            off, and the store does not.
    """

    ranks: tuple[int, ...]
    nodes: tuple[int, ...]
    saves: int
    delay_s: float
    gap_s: float
    point: str
    rides: bool
    stall: str = ""

    @property
    def trainer_point(self) -> str:
        """The failpoint, if it is a trainer's."""
        return self.point if self.point.partition("=")[0] in TRAINER_POINTS else ""

    @property
    def daemon_point(self) -> str:
        """The failpoint, if it is a daemon's."""
        return "" if self.trainer_point else self.point


class Plan(NamedTuple):
    """One round.

    Attributes:
        ranks: how many train.
        swapped: whether ranks stand on the other nodes than usual.
        wait_every: which saves are awaited; 0: none.
        pause_s: how long a step takes beside its save.
        is_in_step: whether ranks meet in each step.
        stumble_s: how long after it began its `resume` an attempt before this one is killed; None:
            there is none.
    """

    seed: int
    kind: Kind
    ranks: int
    swapped: int
    wait_every: int
    pause_s: float
    is_in_step: bool
    stumble_s: float | None
    strike: Strike

    @classmethod
    def of(cls, seed: int) -> Plan:
        """Draw it."""
        dice = random.Random(f"round {seed}")
        ground = Ground.of(seed)
        kind = KINDS[seed % len(KINDS)]
        ranks = dice.randint(2, 4)
        strike = _strike(dice, kind, ranks, ground)
        return cls(
            seed, kind, ranks,
            swapped=dice.randrange(ground.nodes),
            wait_every=dice.choice([0, 2, 3, 5]),
            pause_s=dice.choice([0.0, 0.002, 0.02]),
            is_in_step=dice.random() < 0.8 or bool(strike.stall),
            stumble_s=dice.uniform(0.0, 0.3) if dice.random() < 0.2 else None,
            strike=strike,
        )  # fmt: skip


def _strike(dice: random.Random, kind: Kind, ranks: int, ground: Ground) -> Strike:
    all_ranks, all_nodes = list(range(ranks)), list(range(ground.nodes))
    struck_ranks = {
        "trainer": _some(dice, all_ranks), "daemon": (), "both": tuple(all_ranks),
        "subset": _some(dice, all_ranks),
    }[kind]  # fmt: skip
    struck_nodes = {
        "trainer": (), "daemon": _some(dice, all_nodes), "both": tuple(all_nodes),
        "subset": _some(dice, all_nodes),
    }[kind]  # fmt: skip
    stalls = [name for name, (_, slots) in sorted(STALLS.items()) if slots <= ground.slots]
    if kind == "trainer" and stalls and dice.random() < 0.5:
        return _stalled(dice, struck_ranks, dice.choice(stalls))
    point = ""
    if dice.random() < 0.4:
        points = (TRAINER_POINTS if struck_ranks else {}) | (DAEMON_POINTS if struck_nodes else {})
        name = dice.choice(sorted(points))
        point = f"{name}=kill@{dice.randint(1, points[name])}"
    return Strike(
        struck_ranks, struck_nodes,
        saves=dice.randint(1, 6),
        delay_s=dice.uniform(0.0, 0.5),
        gap_s=dice.choice([0.0, dice.uniform(0.0, 0.1)]),
        point=point,
        rides=kind == "daemon" and dice.random() < 0.5,
    )  # fmt: skip


def _stalled(dice: random.Random, ranks: tuple[int, ...], name: str) -> Strike:
    """Draw a kill of ranks that soon cannot go on, as nothing is stored any more."""
    return Strike(
        ranks, (), saves=1, delay_s=dice.uniform(0.1, 0.6), gap_s=0.0, point="", rides=False,
        stall=f"{name}=hang@{dice.randint(1, STALLS[name][0])}",
    )  # fmt: skip


def _some(dice: random.Random, of: list[int]) -> tuple[int, ...]:
    """Draw some, at least one, in any order."""
    return tuple(dice.sample(of, dice.randint(1, len(of))))
