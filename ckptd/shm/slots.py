"""Slots: what stands in their headers, and which of them is free.

The writer (a trainer) and the reader (a daemon) are different processes with no lock between them,
so a header works like a seqlock. Generation and state share one aligned word of 64 bits, which one
store changes: a reader sees the old pair or the new one, never half of each. The writer stores
``writing`` *before* it touches anything else of the slot and ``whole`` *after* everything; the
reader learns of a generation that is whole already (a handoff says so, or the header), copies
*then*, and looks at the word *after*. If it still shows that generation as whole, no byte of the
copy belongs to another one. On x86 stores and loads stay in these
orders; on arm64 they need a barrier, which a lock that is released and taken again gives (a release
followed by an acquire is ordered both ways there, Arm ARM B2.3).
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from ckptd.errors import ProtocolError

SLOT_HEADER_BYTES = 4096

EMPTY, WRITING, WHOLE = 0, 1, 2

_MAGIC = int.from_bytes(b"ckptdsl1", "little")
_MAGIC_AT, _WORD_AT, _STEP_AT, _SEQUENCE_AT, _PAYLOAD_AT, _TURN_AT, _WORDS = range(7)
_STATE_BITS = 2
_MASK = (1 << 64) - 1

_barrier = threading.Lock()  # guards nothing: see the module's text


class Header(NamedTuple):
    """What a slot's header says; `state` is `EMPTY`, `WRITING` or `WHOLE`.

    `turn` grows from slot to slot of an arena as they are written, whoever writes them:
    sequence numbers begin anew with each attempt.
    Of a slot that the writer has moved on meanwhile, the fields may not belong together: compare
    `generation` and `state` with what was handed off, or ask `Slot.is_current` afterwards.
    """

    generation: int
    state: int
    step: int
    sequence: int
    payload_bytes: int
    turn: int = 0


class Slot:
    """One slot of an arena. One thread writes it at a time; others, elsewhere too, may read it.

    Attributes:
        index: its number in the arena.
        view: all its bytes, the header first: offsets in messages count from here.
        payload: the bytes after the header.
        turn: what `begin` writes into the header, see there.
    """

    def __init__(self, index: int, view: memoryview) -> None:
        self.index = index
        self.view = view
        self.payload = view[SLOT_HEADER_BYTES:]
        self.turn = 0
        self._words = view[: _WORDS * 8].cast("Q")

    def begin(self, step: int, sequence: int, payload_bytes: int | None = None) -> int:
        """Start a new generation, marked as being written, and return its number.

        From here on nobody can take the contents for the last snapshot any more. `payload_bytes`
        says how much of the payload will count, all of it by default.
        """
        words = self._words
        generation = self.read_header().generation + 1 if words[_MAGIC_AT] == _MAGIC else 1
        words[_WORD_AT] = _pack(generation, WRITING)
        _fence()
        words[_MAGIC_AT] = _MAGIC
        words[_STEP_AT] = step
        words[_SEQUENCE_AT] = sequence
        words[_PAYLOAD_AT] = len(self.payload) if payload_bytes is None else payload_bytes
        words[_TURN_AT] = self.turn
        return generation

    def finish(self) -> None:
        """Mark what `begin` started as whole, after every byte of it was written."""
        generation = self.read_header().generation
        _fence()
        self._words[_WORD_AT] = _pack(generation, WHOLE)

    def abandon(self) -> None:
        """Mark the slot as empty: what was written is of no use, and the slot goes first again."""
        generation = self.read_header().generation
        self._words[_WORD_AT] = _pack(generation, EMPTY)
        _fence()

    def is_current(self, generation: int) -> bool:
        """Tell whether the slot is whole and of this generation.

        If it was whole already when reading began, everything read since then belongs to it.
        """
        _fence()
        return self._words[_WORD_AT] == _pack(generation, WHOLE)

    @property
    def is_whole(self) -> bool:
        """Tell whether a whole snapshot lies here."""
        word = self._words[_WORD_AT]
        return self._words[_MAGIC_AT] == _MAGIC and word % (1 << _STATE_BITS) == WHOLE

    def read_header(self) -> Header:
        """Return the header; an empty one of generation 0 where nothing was ever written.

        Raises:
            ProtocolError: if there is something else in its place.
        """
        word, step, sequence, payload_bytes, turn = self._words[_WORD_AT:_WORDS].tolist()
        magic = self._words[_MAGIC_AT]
        if magic not in (0, _MAGIC):
            raise ProtocolError(f"slot {self.index} has no header of ckptd's")
        state = word % (1 << _STATE_BITS)
        return Header(word >> _STATE_BITS, state, step, sequence, payload_bytes, turn)


class SlotPool:
    """The slots of one trainer: which are free, and which goes next. For any thread.

    A slot without a whole snapshot goes first, then the one taken longest ago, so that the newest
    whole snapshot is the last to be overwritten.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self._changed = threading.Condition()  # guards _free, _taken_at and _turn
        self._free = {slot.index: slot for slot in slots}
        headers = {slot.index: slot.read_header() for slot in slots}
        self._taken_at = {i: (header.turn, header.sequence) for i, header in headers.items()}
        self._turn = max((header.turn for header in headers.values()), default=0)

    def acquire(self, timeout_s: float) -> Slot | None:
        """Wait for a free slot and take it; None if there was none in time. 0 tries once."""
        end_s = time.monotonic() + timeout_s
        with self._changed:
            while not self._free:
                left_s = end_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    break
            return self._take() if self._free else None

    def release(self, slot: Slot) -> None:
        """Give a slot back; its contents stay until it is taken again.

        Raises:
            ValueError: if it was free.
        """
        with self._changed:
            if slot.index in self._free:
                raise ValueError(f"slot {slot.index} was released twice")
            self._free[slot.index] = slot
            self._changed.notify()

    @property
    def free_count(self) -> int:
        """The number of free slots."""
        with self._changed:
            return len(self._free)

    def _take(self) -> Slot:
        slot = min(self._free.values(), key=lambda s: (s.is_whole, self._taken_at[s.index]))
        self._turn += 1
        slot.turn = self._turn
        self._taken_at[slot.index] = (self._turn, 0)
        return self._free.pop(slot.index)


def _pack(generation: int, state: int) -> int:
    return (generation << _STATE_BITS | state) & _MASK


def _fence() -> None:
    """Order the loads and stores before against those after, see the module's text."""
    with _barrier:
        pass
    with _barrier:
        pass
