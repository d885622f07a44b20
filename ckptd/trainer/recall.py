"""What living daemons still hold of earlier attempts, and which step of it can be had.

Ranks are not stable over restarts, so a snapshot is found by attempt and step, and what is in it by
tensor and box. A step counts as held if the daemons of the new ranks hold, between them, what every
rank of the old attempt took; or, where that very step is committed, some of it: the rest is in the
store. Anything else is a hole, and the newest checkpoint is taken.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Sequence

import msgspec

from ckptd.errors import HandoffError
from ckptd.model.keys import MAX_STEP, StepId
from ckptd.model.ready import make_ready
from ckptd.shm.arena import Arena
from ckptd.trainer.link import Link
from ckptd.trainer.questions import Answer
from ckptd.wire import messages as say

log = logging.getLogger("ckptd.trainer")


class Sighting(msgspec.Struct, frozen=True, array_like=True):
    """What one rank's daemon holds; an empty name: there is none."""

    daemon: str = ""
    rows: tuple[say.HeldSnapshot, ...] = ()


class HeldPart(msgspec.Struct, frozen=True, array_like=True):
    """Where one old rank's snapshot lies."""

    daemon: str
    arena: int
    slot: int
    generation: int


class HeldStep(msgspec.Struct, frozen=True):
    """A step whose snapshots are held. `parts` are by old rank."""

    id: str
    token: str
    sequence: int
    world_size: int
    parts: dict[int, HeldPart]
    is_committed: bool = False

    @property
    def is_whole(self) -> bool:
        """Tell whether every old rank's part is held."""
        return len(self.parts) == self.world_size


make_ready(Sighting, HeldStep)


def held_steps(
    sightings: Sequence[Sighting], attempt: int, committed: Collection[StepId]
) -> list[HeldStep]:
    """Return the steps of attempts before `attempt` that can be had from memory, newest first.

    None that is older than the newest of the `committed`.
    """
    groups: dict[tuple[int, int, str, int, int], dict[int, HeldPart]] = {}
    for sighting in sightings:
        for row in sighting.rows:
            if row.attempt < attempt and row.rank < row.world_size and row.step <= MAX_STEP:
                key = (row.attempt, row.step, row.token, row.sequence, row.world_size)
                part = HeldPart(sighting.daemon, row.arena, row.slot, row.generation)
                groups.setdefault(key, {}).setdefault(row.rank, part)
    newest = max(committed, default=None)
    found = []
    for (number, step, token, sequence, world_size), parts in groups.items():
        id_ = StepId(attempt=number, step=step)
        is_committed = id_ in committed
        if (newest is None or id_ >= newest) and (is_committed or len(parts) == world_size):
            found.append(
                (id_, HeldStep(str(id_), token, sequence, world_size, parts, is_committed))
            )
    return [held for _, held in sorted(found, key=lambda pair: pair[0], reverse=True)]


class Recall:
    """This rank's daemon, asked for what it holds.

    Args:
        link: to the daemon; None: there is nobody to ask.
        timeout_s: for all that is asked before something is restored.
        attempt: of this job; only what earlier ones left counts.
    """

    def __init__(self, link: Link | None, timeout_s: float, attempt: int = 0) -> None:
        self.attempt = attempt
        self._link = link
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self.sighting = self._seek()

    def settle(self) -> None:
        """Let the daemon finish what an earlier attempt handed off."""
        left = max(0.0, self._deadline - time.monotonic())
        if self._link is not None and not self._link.settle(left):
            log.warning(
                "the daemon still writes what an earlier attempt handed off, or none answers: "
                "an older checkpoint may be taken than there could be"
            )

    def borrow(self, part: HeldPart) -> tuple[say.Handoff, say.Recipe, Arena] | None:
        """Return a snapshot and the memory that it lies in, to be closed; None if it is gone."""
        if self._link is None:
            return None
        wish = say.Borrow(part.arena, part.slot, part.generation)
        answer = self._link.ask(wish, self._timeout_s)
        if answer is None or not isinstance(answer.message, say.Lent) or answer.fd is None:
            return None
        lent = answer.message
        if lent.handoff is None or lent.recipe is None:
            os.close(answer.fd)
            return None
        try:
            arena = Arena.adopt(answer.fd, lent.slots, lent.slot_bytes)
        except HandoffError as error:
            log.warning("memory that the daemon lent cannot be used: %s", error)
            return None
        return lent.handoff, lent.recipe, arena

    def _seek(self) -> Sighting:
        answer: Answer | None = None
        if self._link is not None:
            answer = self._link.ask(say.Seek(), self._timeout_s)
        if answer is None or not isinstance(answer.message, say.Held):
            return Sighting()
        return Sighting(answer.message.daemon, answer.message.snapshots)


def claim(link: Link, slots: int, slot_bytes: int, timeout_s: float) -> Arena | None:
    """Take over an arena of at least this shape that a dead trainer left; None if there is none."""
    answer = link.ask(say.Claim(slots, slot_bytes), timeout_s)
    if answer is None or not isinstance(answer.message, say.Ceded) or answer.fd is None:
        return None
    ceded = answer.message
    try:
        return Arena.adopt(answer.fd, ceded.slots, ceded.slot_bytes, is_writable=True)
    except HandoffError as error:
        log.warning("memory that the daemon ceded cannot be used: %s", error)
        return None
