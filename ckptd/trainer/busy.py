"""Which saves are left out where they come faster than slots get free.

With ``on_busy="skip"`` that is one decision for all ranks, and rank 0's: without it some ranks would
copy and others not, each at another moment, and the step would be lost all the same. Rank 0 looks
whether it has a slot and says so on the board; whoever leaves a save out does not want to wait, so
it never does. The others wait for that word, and then for a slot of their own, `busy_timeout_s` in
all. Saves go by their sequence number, which all ranks count alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ckptd.errors import MeetingError
from ckptd.model.ready import make_ready
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.options import Options

log = logging.getLogger("ckptd.trainer")

REMEMBERED = 64
_TOPIC = "busy"
_FIRST_LOOK_S, _LAST_LOOK_S = 0.0002, 0.005
# Of all ranks together, in a second, while rank 0 is late: torch's store answered 7,000 to 9,000 on
# one core, and others need it too.
_LOOK_RATE = 5_000


class Decision(NamedTuple):
    """What becomes of one save on this rank: taken or left out.

    `wait_s`: how long a save that is taken may wait for a slot; with 0 it tries once.
    """

    is_taken: bool
    wait_s: float


class Said(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What rank 0 says: the save it decided on last, and which of the last 64 are left out."""

    latest: int
    skipped: tuple[int, ...]

    def and_then(self, sequence: int, *, is_taken: bool) -> Said:
        """Return what to say after the decision on the next save."""
        skipped = self.skipped if is_taken else (*self.skipped, sequence)
        return Said(sequence, tuple(n for n in skipped if n > sequence - REMEMBERED))


make_ready(Said)


class Decisions:
    """Decides on saves, or learns what rank 0 decided. For the thread that trains.

    Args:
        meeting: the ranks; rank 0 replaces the one key that all this needs.
        options: `on_busy` and `busy_timeout_s`.
        has_room: tells whether a save would find a slot without waiting.
        now_s, pause: a monotonic clock, and what waits.
    """

    def __init__(
        self,
        meeting: Meeting,
        options: Options,
        has_room: Callable[[], bool],
        *,
        now_s: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._meeting = meeting
        self._options = options
        self._has_room = has_room
        self._now_s = now_s
        self._pause = pause
        self._said = Said(0, ())
        self._silent_until_s: float | None = None

    @property
    def is_own(self) -> bool:
        """Whether this rank decides, for all."""
        return self._meeting.rank == 0

    def on(self, sequence: int, *, may_skip: bool = True) -> Decision:
        """Return what becomes of a save; sequences grow. Never raises.

        Where rank 0 says `may_skip=False`, the save is taken and waits for its slot. This takes up to
        `busy_timeout_s` on other ranks than 0, and on any an operation on the board that hangs: after
        one that failed, the board is let alone for `busy_timeout_s`.
        """
        if self._options.on_busy == "wait":
            return Decision(is_taken=True, wait_s=self._options.busy_timeout_s)
        return self._decide(sequence, may_skip=may_skip) if self.is_own else self._follow(sequence)

    def _decide(self, sequence: int, *, may_skip: bool) -> Decision:
        # Only this thread takes slots, so one that is free now is free when the copy wants it.
        is_taken = not may_skip or self._has_room()
        self._said = self._said.and_then(sequence, is_taken=is_taken)
        if self._meeting.world_size > 1:
            try:
                self._ask(self._publish)
            except MeetingError as error:
                # The others go on without it; a step that is left out here ends by its outcome.
                log.warning("save %d: the other ranks cannot be told: %s", sequence, error)
        return Decision(is_taken, self._options.busy_timeout_s if is_taken else 0.0)

    def _follow(self, sequence: int) -> Decision:
        began_s = self._now_s()
        try:
            is_known = self._wait_for(sequence, began_s + self._options.busy_timeout_s)
            why = f"not in {self._options.busy_timeout_s:g} s"
        except MeetingError as error:
            is_known, why = False, str(error)
        if not is_known:
            # If it was to leave the save out, rank 0's outcome ends the step for this one's part too.
            log.warning("save %d: rank 0 did not say whether it is left out: %s", sequence, why)
            return Decision(is_taken=True, wait_s=0.0)
        # Further back than rank 0 remembers, which no rank that trains with it falls, a save counts as
        # taken: if it was not, the step is ended already, and its tombstone is what this rank hears.
        if sequence in self._said.skipped:
            return Decision(is_taken=False, wait_s=0.0)
        left_s = began_s + self._options.busy_timeout_s - self._now_s()
        return Decision(is_taken=True, wait_s=max(0.0, left_s))

    def _wait_for(self, sequence: int, deadline_s: float) -> bool:
        """Look until rank 0 has decided on a save; False if it has not in time.

        No pause is much longer than all before it, so this rank is at most about twice as late.
        """
        pause_s = _FIRST_LOOK_S
        longest_s = max(_LAST_LOOK_S, self._meeting.world_size / _LOOK_RATE)
        while self._said.latest < sequence:
            self._said = self._ask(self._look) or self._said
            left_s = deadline_s - self._now_s()
            if self._said.latest >= sequence or left_s <= 0:
                break
            self._pause(min(pause_s, left_s))
            pause_s = min(2 * pause_s, longest_s)
        return self._said.latest >= sequence

    def _publish(self) -> None:
        self._meeting.announce(_TOPIC, msgspec.msgpack.encode(self._said))

    def _look(self) -> Said | None:
        (value,) = self._meeting.fetch([_TOPIC])
        if value is None:
            return None
        try:
            return msgspec.msgpack.decode(value, type=Said)
        except msgspec.DecodeError as error:
            raise MeetingError(f"what rank 0 said of a save makes no sense: {error}") from error

    def _ask(self, request: Callable[[], Said | None]) -> Said | None:
        """Use the board, unless it failed a short while ago."""
        if self._silent_until_s is not None and self._now_s() < self._silent_until_s:
            raise MeetingError("the store of the job did not answer a short while ago")
        try:
            return request()
        except MeetingError:
            self._silent_until_s = self._now_s() + self._options.busy_timeout_s
            raise
