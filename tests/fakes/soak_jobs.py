"""The ranks of an attempt that may be killed at any moment, and what is known of it then."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

from ckptd.model.keys import StepId
from tests.fakes.footprints import Footprint
from tests.fakes.jobs import Rank
from tests.fakes.soak_plans import Plan


class Book(NamedTuple):
    """What the ranks of a job had written down when they died, as steps; 0 is none.

    Attributes:
        begun: whose save all ranks had begun.
        latest: whose save some rank had begun.
        handed_off: of which all ranks had heard that daemons have it.
        committed: of which some rank had heard that it is committed.
        stopped: what ended training before the kill.
    """

    begun: int
    latest: int
    handed_off: int
    committed: int
    stopped: list[str]

    @classmethod
    def read(cls, paths: list[Path]) -> Book:
        """Read the journals of all ranks."""
        last: list[dict[int, str]] = []
        begun: list[int] = []
        committed, stopped = 0, []
        for path in paths:
            lines = path.read_text().splitlines() if path.exists() else []
            notes = [(int(step), what) for step, _, what in (line.partition(" ") for line in lines)]
            begun.append(max((step for step, what in notes if what == "begun"), default=0))
            committed = max([committed, *(step for step, what in notes if what == "committed")])
            stopped += [what for _, what in notes if what.startswith("stopped")]
            last.append({step: what for step, what in notes if what != "begun"})
        safe = set.intersection(*(
            {step for step, what in each.items() if what in ("handed_off", "committed")}
            for each in last
        ))  # fmt: skip
        return cls(min(begun), max(begun), max(safe, default=0), committed, stopped)


class Job:
    """The ranks of one attempt."""

    def __init__(self, ranks: list[Rank], ordinal: int, journals: list[Path]) -> None:
        self.ranks = ranks
        self.ordinal = ordinal
        self.journals = journals
        self.next_step = 1

    @property
    def book(self) -> Book:
        return Book.read(self.journals)

    def id_of(self, step: int) -> StepId | None:
        """Return the id of a step of this attempt; None for 0."""
        return StepId(self.ordinal, step) if step else None

    def march(self, seed: int, plan: Plan, *, count: int = 0) -> None:
        for rank, journal in zip(self.ranks, self.journals, strict=True):
            rank.order(
                "march", seed=seed, first=self.next_step, journal=str(journal), count=count,
                wait_every=plan.wait_every, pause_s=plan.pause_s, is_in_step=plan.is_in_step,
            )  # fmt: skip

    def kill(self) -> None:
        for rank in self.ranks:
            rank.send(signal.SIGKILL)
        for rank in self.ranks:
            rank.clear()


class Row(NamedTuple):
    """What came of a round.

    Attributes:
        struck: whom the kill hit and when; `is_at_point` if that was a failpoint.
        is_ridden: the job went on with new daemons before it was ended.
        has_stumbled: the next attempt was killed while it came back.
        lost: saves that all ranks had begun and that did not come back.
        most: what a daemon held at most that had lived through a kill.
    """

    seed: int
    kind: str
    ranks: int
    nodes: int
    slots: int
    struck: str
    is_at_point: bool
    is_ridden: bool
    has_stumbled: bool
    lost: int
    resumed: str
    source: str
    committed: int
    most: Footprint
    seconds: float
