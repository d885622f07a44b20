"""Who writes what, agreed between the ranks while they train.

Rounds carry the number of a save; round 0 is made by `prepare`. A rank without a plan offers its
layout in every save. Once all offers of a round are there, each rank computes the same plan from
them, says that it has *seen* it together with the number of its last save, and uses no earlier plan
from then on. When all have seen it, the plan is in force for saves after the last one that any of
them named. So ranks that use a plan in one save use the same one, and the others write all they
hold: more bytes, never a wait.

Each rank publishes a *floor*, the lowest round that it would still adopt, and lifts its own to the
highest that it meets. A layout that changed lifts it to the save in which it did, and thereby sends
everybody back to offering. What lies below all floors is never read again and is withdrawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_OPEN_ROUNDS = 64


class PutFloor(NamedTuple):
    """Publish the lowest round that this rank would still adopt."""

    round: int


class PutOffer(NamedTuple):
    """Publish what this rank holds in a round, the layout's contents first."""

    round: int
    layout: str


class Seen(NamedTuple):
    """What a rank says of a round: its plan, and the rank's last save before it dropped others."""

    plan: str
    last: int


class PutSeen(NamedTuple):
    """Publish what this rank has seen."""

    round: int
    seen: Seen


class Withdraw(NamedTuple):
    """Take back everything this rank published about a round."""

    round: int


class AskFloors(NamedTuple):
    """Read the floors of all ranks; answered by `on_floors`."""


class AskOffers(NamedTuple):
    """See whether all ranks have offered; answered by `on_offers`."""

    round: int


class Compute(NamedTuple):
    """Compute the plan of a round; answered by `on_planned` or `on_failed`."""

    round: int


class AskSeen(NamedTuple):
    """Read what all ranks say to have seen; answered by `on_seen`."""

    round: int


Effect = PutFloor | PutOffer | PutSeen | Withdraw | AskFloors | AskOffers | Compute | AskSeen


class Adopted(NamedTuple):
    """The plan that this rank has seen last; in force once `after` is known, for later saves."""

    round: int
    plan: str
    after: int | None = None


class AgreementState:
    """One rank's part of the agreement: events in, effects out. No clock, no I/O, no locks.

    Effects are carried out in the order in which they were returned. The argument why it is safe:
    a plan in force at save q was seen by every rank before its own save q, and from that moment a
    rank uses no earlier one; a later plan in force at q would have taken this one away likewise.
    """

    def __init__(self) -> None:
        self._layout: str | None = None
        self._last = 0
        self._floor = 0
        self._open: list[int] = []  # own offers that may still become a plan, ascending
        self._published: list[int] = []  # own rounds with anything on the board, ascending
        self._adopted: Adopted | None = None
        self._lowest: int | None = None  # lowest complete round found by the scan under way

    @property
    def has_begun(self) -> bool:
        """Whether there was a first save, or `prepare`."""
        return self._layout is not None

    @property
    def is_planned(self) -> bool:
        """Whether a plan is in force, or will be from a known save on, that no rank gave up."""
        at = self._adopted
        return at is not None and at.after is not None and at.round >= self._floor

    @property
    def is_pending(self) -> bool:
        """Whether looking at the board again may bring a plan without another save."""
        return bool(self._open) and not self.is_planned

    @property
    def adopted(self) -> Adopted | None:
        """The plan that this rank has seen last."""
        return self._adopted

    def on_save(self, sequence: int, layout: str, *, may_offer: bool = True) -> list[Effect]:
        """Begin the save `sequence` (0: `prepare`) with this layout; sequences never go down."""
        if sequence < self._last:
            raise ValueError(f"save {sequence} after save {self._last}")
        effects: list[Effect] = []
        if self._layout is None:
            effects.append(PutFloor(self._floor))
        elif layout != self._layout:
            self._adopted = None
            effects += self._lift(max(sequence, self._floor))
            self._open.clear()
        self._layout, self._last = layout, sequence
        is_new = sequence >= self._floor and sequence not in self._published
        if may_offer and is_new and not self.is_planned:
            self._open.append(sequence)
            self._published.append(sequence)
            if len(self._open) > MAX_OPEN_ROUNDS:
                effects += self._lift(self._open[-MAX_OPEN_ROUNDS])
            effects.append(PutOffer(sequence, layout))
        return effects

    def plan_for(self, sequence: int) -> Adopted | None:
        """Return the plan in force at a save that `on_save` began."""
        at = self._adopted
        return at if at is not None and at.after is not None and sequence > at.after else None

    def on_poll(self) -> list[Effect]:
        """Look at the board; once the effects have run dry, all that can be learnt now is."""
        return [AskFloors()] if self.has_begun else []

    def on_floors(self, floors: Sequence[int] | None) -> list[Effect]:
        """Take in the floors of all ranks, None where some rank has not begun."""
        if floors is None:
            return []
        effects = self._lift(max(floors)) + self._outdated(min(floors))
        self._lowest = None
        if self.is_planned or not self._open:
            return effects
        if self._adopted is not None and self._adopted.round >= self._floor:
            return [*effects, AskSeen(self._adopted.round)]
        # From the newest down: offers are published in order, so a round that is incomplete when
        # looked at after a newer complete one never completes, and all ranks pick the same round.
        return [*effects, AskOffers(self._open[-1])]

    def on_offers(self, round_: int, *, is_complete: bool) -> list[Effect]:
        """Go on with the next lower round, or compute the plan of the lowest complete one."""
        if round_ < self._floor:
            return []
        if is_complete:
            self._lowest = round_
        older = [r for r in self._open if r < round_]
        if older:
            return [AskOffers(older[-1])]
        return [] if self._lowest is None else [Compute(self._lowest)]

    def on_planned(self, round_: int, plan: str) -> list[Effect]:
        """Adopt the plan of a round, dropping any earlier one at this moment."""
        if round_ not in self._open:
            return []
        self._adopted = Adopted(round_, plan)
        return [*self._lift(round_), PutSeen(round_, Seen(plan, self._last)), AskSeen(round_)]

    def on_failed(self, round_: int) -> list[Effect]:
        """Give up a round whose offers make no plan, and all later offers made in good faith.

        The floor stays, because every rank is to find the same failure by itself.
        """
        self._open.clear()
        if self._adopted is not None and self._adopted.round == round_:
            self._adopted = None
        return []

    def on_seen(self, round_: int, seen: Sequence[Seen] | None) -> list[Effect]:
        """Put the adopted plan in force if every rank has seen the same."""
        at = self._adopted
        if seen is None or at is None or at.round != round_ or at.after is not None:
            return []
        if any(plan != at.plan for plan, _ in seen):
            return self.on_failed(round_)
        self._adopted = at._replace(after=max(last for _, last in seen))
        return []

    def _lift(self, floor: int) -> list[Effect]:
        if floor <= self._floor:
            return []
        self._floor = floor
        self._open = [r for r in self._open if r >= floor]
        at = self._adopted
        if at is not None and at.after is None and at.round < floor:
            self._adopted = None
        return [PutFloor(floor)]

    def _outdated(self, lowest_floor: int) -> list[Effect]:
        """Withdraw what no rank reads any more, and what a rank that fell silent would keep."""
        keep = self._published[-2 * MAX_OPEN_ROUNDS :]
        keep = [r for r in keep if r >= lowest_floor]
        old = [r for r in self._published if r not in keep]
        self._published = keep
        return [Withdraw(r) for r in old]
