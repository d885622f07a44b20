"""How the ranks of one start of a job find each other on a board that may outlive the job.

The agent of torchrun keeps its store when it starts the workers anew, so every key may hold what an
earlier start left, and nothing that all ranks know beforehand tells two starts apart: the restart
count belongs to each agent, and a change of membership does not raise it. So the ranks agree on a
name that no start had before.

Each rank writes one *place*: a random token of its process, and the name that it has confirmed.
Rank 0 calls the *roll*: a new name, and the token that it found at every place. It calls again,
with another name, when a token has changed. A rank confirms a roll that holds its own token, and
never another. Once every place confirms the roll called last, rank 0 opens it, and all enter.

So whoever enters under a name stands in its roll, each place of a roll is one process, and all of
them confirmed it: an earlier start's process cannot be among them unless it lives and answers. Such
a process takes its rank's place from the new one or loses its own; the loser runs out of time.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from ckptd.errors import MeetingError
from ckptd.model.ready import make_ready
from ckptd.trainer.boards import Board

_T = TypeVar("_T")


class Place(NamedTuple):
    """What one rank says. `name` is the roll that it confirmed, or as rank 0 called last."""

    token: str
    name: str = ""
    is_open: bool = False


class Roll(NamedTuple):
    """What rank 0 calls: a name that was never used, and the token of each rank."""

    name: str
    tokens: tuple[str, ...]


make_ready(Place, Roll)


class AskPlaces(NamedTuple):
    """Read the places of the ranks below `stop`; answered by `on_places` if all are there."""

    stop: int


class AskRoll(NamedTuple):
    """Read the roll; answered by `on_roll`."""


Effect = Place | Roll | AskPlaces | AskRoll  # a place or a roll is to be put on the board


class Caller:
    """Rank 0: events in, effects out. No clock, no I/O.

    Effects are carried out in the order in which they were returned.

    Attributes:
        name: what all have confirmed; None until then.
    """

    def __init__(self, world_size: int, fresh: Callable[[], str]) -> None:
        self._world_size = world_size
        self._fresh = fresh
        self._token = fresh()
        self._roll = Roll("", ())
        self._seen: tuple[str, ...] = ()  # the tokens at the last look
        self.name: str | None = None

    def begin(self) -> list[Effect]:
        """Take the place of this rank."""
        return [Place(self._token)]

    def on_poll(self) -> list[Effect]:
        """Look at the board."""
        return [AskPlaces(self._world_size)]

    def on_places(self, places: Sequence[Place]) -> list[Effect]:
        """Call the roll again if a rank came or was replaced; open it once all confirmed it."""
        if places[0].token != self._token:
            return []  # another process is rank 0 now: a second caller would split the ranks
        tokens, before = tuple(place.token for place in places), self._seen
        self._seen = tokens
        if tokens != self._roll.tokens:
            if tokens != before:
                return []  # ranks are coming just now, and each call is read by all of them
            self._roll = Roll(self._fresh(), tokens)
            # The roll first, so that who sees its name finds it at the first look.
            return [self._roll, Place(self._token, self._roll.name)]
        if any(place.name != self._roll.name for place in places):
            return []
        self.name = self._roll.name
        return [Place(self._token, self.name, is_open=True)]

    def missing(self, places: Sequence[Place | None]) -> list[int]:
        """Return the ranks that did not come, [0] if another process took this one's place.

        Empty if all have come since the last look.
        """
        if places[0] is None or places[0].token != self._token:
            return [0]
        absent = [rank for rank, place in enumerate(places) if place is None]
        return absent or _unconfirmed(places, self._roll.name)


class Answerer:
    """Any other rank: events in, effects out. No clock, no I/O.

    Attributes:
        name: what all have confirmed; None until then.
    """

    def __init__(self, rank: int, fresh: Callable[[], str]) -> None:
        self._rank = rank
        self._place = Place(fresh())
        self._foreign = ""  # a roll that was read and does not hold this process
        self.name: str | None = None

    def begin(self) -> list[Effect]:
        """Take the place of this rank."""
        return [self._place]

    def on_poll(self) -> list[Effect]:
        """Look at what rank 0 says."""
        return [AskPlaces(1)]

    def on_places(self, places: Sequence[Place]) -> list[Effect]:
        """Enter what this rank confirmed, once it is open; look at any other roll."""
        first = places[0]
        if first.name == self._place.name:
            if first.name and first.is_open:
                self.name = first.name
            return []
        return [AskRoll()] if first.name not in ("", self._foreign) else []

    def on_roll(self, roll: Roll) -> list[Effect]:
        """Confirm a roll that holds the token of this process: rank 0 saw it, so it lives."""
        token = self._place.token
        if roll.tokens[self._rank : self._rank + 1] != (token,):
            self._foreign = roll.name
            return []
        if roll.name == self._place.name:
            return []
        self._place = Place(token, roll.name)
        return [self._place]

    def missing(self, places: Sequence[Place | None]) -> list[int]:
        """Return the ranks that did not come, this one if another process took its place."""
        mine, first = places[self._rank], places[0]
        if mine is None or mine.token != self._place.token:
            return [self._rank]
        absent = [rank for rank, place in enumerate(places) if place is None]
        if absent or first is None or not first.name or first.name != self._place.name:
            return absent or [0]
        return _unconfirmed(places, first.name) or [0]


def _unconfirmed(places: Sequence[Place | None], name: str) -> list[int]:
    return [rank for rank, place in enumerate(places) if place is None or place.name != name]


def join(board: Board, prefix: str, rank: int, world_size: int, timeout_s: float) -> str:
    """Wait until all ranks that begin with `prefix` are there; return a new name, alike on all.

    Raises:
        MeetingError: naming the ranks that did not come in `timeout_s`, or the board fails.
    """
    is_first = rank == 0
    state = Caller(world_size, _fresh) if is_first else Answerer(rank, _fresh)
    keys = [f"{prefix}/join/{each}" for each in range(world_size)]
    joining = _Joining(board, state, keys, f"{prefix}/joined", keys[rank])
    deadline, delay_s = time.monotonic() + timeout_s, 0.001
    joining.carry_out(state.begin())
    while True:
        joining.carry_out(state.on_poll())
        if state.name is not None:
            return state.name
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            joining.check_missing(rank, timeout_s)
        time.sleep(min(delay_s, max(left_s, 0.001)))
        delay_s = min(2 * delay_s, 0.05)


class _Joining(NamedTuple):
    """One rank's state, and the keys where what it wants is done."""

    board: Board
    state: Caller | Answerer
    place_keys: list[str]
    roll_key: str
    own_key: str

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the state wants, and what it wants after that, until it wants nothing."""
        for effect in effects:
            if isinstance(effect, Place):
                self.board.set(self.own_key, msgspec.msgpack.encode(effect))
            elif isinstance(effect, Roll):
                self.board.set(self.roll_key, msgspec.msgpack.encode(effect))
            elif isinstance(effect, AskPlaces):
                keys = self.place_keys[: effect.stop]
                if self.board.has_all(keys):
                    found = [_decode(value, Place) for value in self.board.get_many(keys)]
                    self.carry_out(self.state.on_places([p for p in found if p is not None]))
            elif isinstance(self.state, Answerer):
                roll = _decode(self.board.get_many([self.roll_key])[0], Roll)
                self.carry_out(self.state.on_roll(roll) if roll is not None else [])

    def check_missing(self, rank: int, timeout_s: float) -> None:
        """Raise with who did not come, unless all came just now."""
        places = [_decode(value, Place) for value in self.board.get_many(self.place_keys)]
        missing = self.state.missing(places)
        if missing == [rank]:
            raise MeetingError(
                f"another process came as rank {rank} while this one waited, {timeout_s:g} s in "
                "all: is a process of an earlier start still alive?"
            )
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise MeetingError(
                f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing[:8]))}"
                f"{more} of {len(places)} did not join in {timeout_s:g} s: dead, late, or with "
                "more or fewer Checkpointers for this root than this rank has made (every rank "
                "makes them in the same order)"
            )


def _decode(value: bytes | None, type_: type[_T]) -> _T | None:
    try:
        return None if value is None else msgspec.msgpack.decode(value, type=type_)
    except msgspec.MsgspecError as error:
        raise MeetingError(f"a rank joined with something that does not unpack: {error}") from error


def _fresh() -> str:
    return secrets.token_hex(8)
