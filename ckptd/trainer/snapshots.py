"""The slots of one rank, and the copies into them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ckptd.errors import ProtocolError
from ckptd.model.columns import Columns
from ckptd.model.tensor import Layout
from ckptd.plan.pack import Packed, pack
from ckptd.plan.split import Share
from ckptd.shm.arena import Arena, round_up
from ckptd.shm.memory import available_bytes, choose_slots
from ckptd.shm.slots import SLOT_HEADER_BYTES, Slot, SlotPool
from ckptd.trainer.capture import Destination
from ckptd.trainer.copies import Deferred
from ckptd.trainer.flatten import Leaf
from ckptd.trainer.pinning import pin, unpin
from ckptd.wire.messages import MAX_RECIPES, ChunkPlan, Recipe

log = logging.getLogger("ckptd.trainer")


class Cut(NamedTuple):
    """What this rank writes under one layout and plan, and where it lies in a slot.

    `is_on_cuda`: something of it is copied from a GPU.
    """

    recipe: Recipe
    packed: Packed
    layout: Layout
    is_on_cuda: bool


class Captured(NamedTuple):
    """A snapshot in a slot of a pool, which gets the slot back once it is durable.

    With something `deferred` it is whole only after that was run, and after `finish`.
    """

    arena_number: int
    arena: Arena
    pool: SlotPool
    slot: Slot
    generation: int
    bytes: int
    deferred: Deferred | None = None

    def finish(self) -> None:
        """Mark the snapshot as whole."""
        self.slot.finish()

    def abandon(self) -> None:
        """Give the slot back; what is in it is of no use."""
        self.slot.abandon()
        self.pool.release(self.slot)


@dataclass
class _Shelf:
    """An arena, its free slots, and the destinations laid over them."""

    number: int
    arena: Arena
    pool: SlotPool
    destinations: dict[tuple[int, int], Destination] = field(default_factory=dict)
    is_pinned: bool | None = None

    def pin(self) -> None:
        """Page-lock the slots, for copies from a GPU; what the driver refused it is not asked again."""
        if self.is_pinned is None:
            self.is_pinned = pin(self.arena.address, self.arena.bytes)

    def close(self) -> None:
        """Let go of the memory."""
        self.destinations.clear()
        if self.is_pinned:
            unpin(self.arena.address)
        self.arena.close()


class Snapshots:
    """Reserves slots, and fills one per save.

    `capture` belongs to the training thread; the rest may also run on a thread that prepares the
    first save.
    """

    def __init__(
        self, *, slots: int | Literal["auto"], local_ranks: int, is_shared: bool, chunk_bytes: int
    ) -> None:  # fmt: skip
        self._slots: int | Literal["auto"] = slots
        self._local_ranks = local_ranks
        self._is_shared = is_shared
        self._chunk_bytes = chunk_bytes
        # Looked up before any rank of this node has an arena: all ranks see the same, and divide it.
        self._available: int | None = available_bytes()
        self._cuts: dict[tuple[str, str | None], Cut] = {}
        self._next_recipe = 1
        self._shelf: _Shelf | None = None
        self._retired: list[_Shelf] = []
        self._lock = threading.RLock()  # guards _shelf, its destinations, _retired and _cuts
        self._is_closed = False
        self._is_settled = threading.Event()  # no arena is awaited from the daemon
        self._is_settled.set()

    def cut(self, layout: Layout, plan: str | None, share: Share) -> Cut:
        """Return what to write under this layout and plan; made once, then remembered."""
        key = (layout.digest(), plan)
        with self._lock:
            if key not in self._cuts:
                while len(self._cuts) >= MAX_RECIPES:
                    del self._cuts[next(iter(self._cuts))]
                self._cuts[key] = self._new_cut(layout, plan, share)
            return self._cuts[key]

    def reserve(
        self, slot_bytes: int, *, is_faulted: bool = False, is_pinned: bool = False
    ) -> None:
        """Make sure that slots of at least this size are there.

        With `is_faulted` their pages are mapped too before this returns, so that the first copy
        costs what later ones do; with `is_pinned` new ones are page-locked, as far as that works.

        Raises:
            ConfigError: the memory is not there; the message has the figures.
        """
        slot_bytes = max(slot_bytes, round_up(1))  # a state may have no tensors, only values
        with self._lock:
            self._tidy()
            if self._is_closed:
                return
            if self._shelf and self._shelf.arena.slot_bytes >= slot_bytes:
                if is_pinned:  # of an arena that was taken over nobody knew yet what it is for
                    self._shelf.pin()
                return
            number = self._shelf.number + 1 if self._shelf else 1
            available = self._available or available_bytes()
            self._available = None
            count = choose_slots(slot_bytes, self._slots, self._local_ranks, available)
            arena = Arena.create(count, slot_bytes, is_shared=self._is_shared)
            if self._shelf is not None:
                self._retired.append(self._shelf)
            pool = SlotPool([arena.slot(i) for i in range(count)])
            shelf = self._shelf = _Shelf(number, arena, pool)
        log.info("reserved %d slots of %d bytes", count, slot_bytes)
        if is_faulted:
            arena.prefault(lambda: self._is_closed)
        with self._lock:
            if is_pinned and shelf is self._shelf:  # neither closed nor retired meanwhile
                shelf.pin()

    def expect(self) -> None:
        """Let the first capture wait for `take_over`: an arena beside it would double the memory."""
        self._is_settled.clear()

    def take_over(self, arena: Arena | None) -> None:
        """Use an arena that a dead trainer left; None if there is none.

        What lies in its slots is overwritten oldest first, as if this process had written it.
        """
        try:
            if arena is not None:
                self._adopt(arena)
        finally:
            self._is_settled.set()
        if arena is not None:
            arena.prefault(lambda: self._is_closed)

    def _adopt(self, arena: Arena) -> None:
        with self._lock:
            if self._is_closed or self._shelf is not None:
                arena.close()
                return
            try:
                pool = SlotPool([arena.slot(i) for i in range(arena.slots)])
            except ProtocolError as error:
                log.warning("memory of a dead trainer cannot be used: %s", error)
                arena.close()
                return
            self._available = None
            self._shelf = _Shelf(1, arena, pool)
        log.info("took over %d slots of %d bytes", arena.slots, arena.slot_bytes)

    def lay_out(self, cut: Cut) -> None:
        """Build the destinations of a cut in all slots ahead of the first capture."""
        with self._lock:
            shelf = self._shelf
            if shelf is not None and shelf.arena.slot_bytes >= cut.packed.slot_bytes:
                for index in range(shelf.arena.slots):
                    self._destination(shelf, shelf.arena.slot(index), cut)

    def has_room(self) -> bool:
        """Tell whether `capture` would find a slot now: one is free, or none were reserved yet.

        None is found as long as `take_over` is expected.
        A state that grew gets larger slots, but not while all that there are hold snapshots.
        """
        with self._lock:
            is_free = self._shelf is None or self._shelf.pool.free_count > 0
            return is_free and self._is_settled.is_set()

    def capture(
        self,
        cut: Cut,
        leaves: Sequence[Leaf],
        *,
        step: int,
        sequence: int,
        timeout_s: float,
        defers: bool = False,
    ) -> Captured | None:
        """Copy the state into a free slot; None if no slot got free in time.

        With `defers` most of the copy may be left to the caller, who then calls `Captured.finish`
        when it is done, or `Captured.abandon`.

        Raises:
            ConfigError: there is no memory for the slots.
        """
        end_s = time.monotonic() + timeout_s
        if not self._is_settled.wait(timeout_s):
            return None
        self.reserve(cut.packed.slot_bytes, is_pinned=cut.is_on_cuda)
        shelf = self._shelf
        assert shelf is not None
        slot = shelf.pool.acquire(max(0.0, end_s - time.monotonic()))
        if slot is None:
            return None
        try:
            generation = slot.begin(step, sequence)
            with self._lock:
                destination = self._destination(shelf, slot, cut)
            deferred = None
            if defers:
                deferred = destination.begin(leaves)
            else:
                destination.copy(leaves)
            if deferred is None:
                slot.finish()
        except BaseException:
            slot.abandon()
            shelf.pool.release(slot)
            raise
        return Captured(
            shelf.number, shelf.arena, shelf.pool, slot, generation, destination.bytes, deferred
        )

    def close(self) -> None:
        """Let go of all slots. Not while a snapshot still has to be handed off."""
        with self._lock:
            self._is_closed = True
            shelves = [*self._retired, *([self._shelf] if self._shelf else [])]
            self._retired, self._shelf = [], None
        for shelf in shelves:
            shelf.close()

    def _new_cut(self, layout: Layout, plan: str | None, share: Share) -> Cut:
        packed = pack(layout, share, chunk_bytes=self._chunk_bytes, header_bytes=SLOT_HEADER_BYTES)
        recipe = Recipe(
            recipe=self._next_recipe, plan=plan, layout=layout.digest(), tensors=packed.tensors,
            aliases=packed.aliases, pieces=Columns.pack(packed.pieces),
            chunks=tuple(ChunkPlan(c.dtype, c.offset_bytes, c.raw_bytes) for c in packed.chunks),
        )  # fmt: skip
        self._next_recipe += 1
        is_on_cuda = any(held.tensor.device.startswith("cuda") for held in layout.held)
        return Cut(recipe, packed, layout, is_on_cuda)

    def _destination(self, shelf: _Shelf, slot: Slot, cut: Cut) -> Destination:
        key = (slot.index, cut.recipe.recipe)
        if key not in shelf.destinations:
            for old in [k for k in shelf.destinations if k[0] == slot.index]:
                del shelf.destinations[old]
            shelf.destinations[key] = Destination(
                slot.view, cut.layout.held, cut.packed.chunks, cut.packed.pieces
            )
        return shelf.destinations[key]

    def _tidy(self) -> None:
        """Close retired arenas all of whose slots came back. The lock is held."""
        for shelf in list(self._retired):
            if shelf.pool.free_count == shelf.arena.slots:
                self._retired.remove(shelf)
                shelf.close()
