"""A runner on a thread, and trainers of it that are a slot in plain memory and a list of messages."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from ckptd.engine import events as ev
from ckptd.engine.replies import without_memory
from ckptd.engine.runner import Outlet, Runner, Share
from ckptd.engine.state import Engine
from ckptd.model.box import Box
from ckptd.model.columns import Columns, Piece
from ckptd.model.tensor import Tensor
from ckptd.shm.arena import Arena, round_up
from ckptd.shm.slots import SLOT_HEADER_BYTES, Slot
from ckptd.wire import messages as say
from tests.fakes.engines import DIGEST, handoff, hello

WAIT_S = 20.0  # far beyond anything that happens; a test that waits so long has failed
MIB = 1 << 20


class Memory:
    """Slots for a runner to read. `slot_type` may be one that changes under its reader."""

    def __init__(self, slots: int, payload_bytes: int, slot_type: type[Slot] = Slot) -> None:
        self.arena = Arena.create(slots, round_up(payload_bytes), is_shared=False)
        self.slots = [slot_type(i, self.arena.slot(i).view) for i in range(slots)]
        self.trims = 0
        self.closes = 0

    def slot(self, index: int) -> Slot:
        return self.slots[index]

    def trim(self) -> None:
        self.trims += 1

    def close(self) -> None:
        self.closes += 1


class Bench:
    """A runner that runs. Messages to clients are kept."""

    def __init__(self, *, linger_s: float | None = None) -> None:
        self.runner = Runner(
            Engine(linger_s=linger_s, trim_s=0.0),
            Outlet(self._send, self._drop, lend=self._lend), workers=2,
        )  # fmt: skip
        self.fds: list[int] = []  # that went beside messages and nobody took, the newest last
        self.said: list[tuple[int, say.FromDaemon]] = []
        self.dropped: list[int] = []
        self.code: int | None = None
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._is_started = False

    def say(self, client: int, message: say.FromTrainer) -> None:
        self.runner.post(ev.Said(client, message))
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def until(self, is_so: Callable[[], Any]) -> Any:
        with self._changed:
            assert self._changed.wait_for(is_so, WAIT_S)

    def wait_for(self, kind: type, client: int = 1, count: int = 1) -> Any:
        """Wait until a client has heard `count` messages of a kind; return the last of them."""

        def found() -> list[Any]:
            return [m for c, m in self.said if c == client and isinstance(m, kind)]

        self.until(lambda: len(found()) >= count)
        return found()[count - 1]

    def stop(self) -> None:
        if self._is_started:
            self.runner.post(ev.StopAsked(0.0))
            self._thread.join(WAIT_S)
        while self.fds:
            os.close(self.fds.pop())

    def wait_exit(self) -> int:
        self._thread.join(WAIT_S)
        assert self.code is not None
        return self.code

    def _run(self) -> None:
        self.code = self.runner.run()

    def _send(self, client: int, message: say.FromDaemon) -> None:
        with self._changed:
            self.said.append((client, message))
            self._changed.notify_all()

    def _lend(self, client: int, message: say.Lent | say.Ceded, share: Share) -> None:
        fd = share()
        if fd is not None:
            self.fds.append(fd)
        self._send(client, message if fd is not None else without_memory(message))

    def _drop(self, client: int) -> None:
        with self._changed:
            self.dropped.append(client)
            self._changed.notify_all()


class Trainer:
    """A rank that holds one tensor ``w`` of whole MiB, in chunks of at most `chunk_bytes`."""

    def __init__(
        self, bench: Bench, root: str, *, rank: int = 0, world_size: int = 1,
        mib: int = 3, chunk_bytes: int = 2 * MIB, slot_type: type[Slot] = Slot,
    ) -> None:  # fmt: skip
        self.bench = bench
        self.client = rank + 1
        self.rank = rank
        self.hello = hello(rank, world_size, root=root)
        self.bytes = mib * MIB
        self.recipe = _recipe(self.bytes, chunk_bytes)
        self.memory = Memory(2, self.bytes, slot_type)

    def join(self) -> None:
        self.bench.say(self.client, self.hello)
        self.bench.wait_for(say.Welcome, self.client)
        self.announce()

    def announce(self) -> None:
        arena = self.memory.arena
        self.bench.runner.give_arena(self.client, 1, self.memory)
        self.bench.say(self.client, say.Arena(1, arena.slots, arena.slot_bytes))
        self.bench.say(self.client, self.recipe)

    def fill(self, index: int, step: int, sequence: int, seed: int) -> int:
        """Put a whole snapshot of noise into a slot; return its generation."""
        slot = self.memory.slots[index]
        generation = slot.begin(step, sequence)
        slot.payload[: self.bytes] = noise(seed, self.bytes)
        slot.finish()
        return generation

    def save(self, step: int, sequence: int, **changes: object) -> None:
        generation = self.fill(sequence % 2, step, sequence, seed=step)
        message = handoff(step, sequence, slot=sequence % 2)
        self.bench.say(
            self.client,
            msgspec.structs.replace(message, **{"generation": generation, **changes}),
        )

    def word(self, count: int = 1) -> say.Finished:
        """Wait for the final word on the n-th save."""
        return self.bench.wait_for(say.Finished, self.client, count)


def noise(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).standard_normal(count // 4).astype(np.float32).tobytes()


def _recipe(total: int, chunk_bytes: int) -> say.Recipe:
    tensor = Tensor("w", "float32", (total // 4,), "parameter", True, "cpu")
    chunks, pieces = [], []
    for number, start in enumerate(range(0, total, chunk_bytes)):
        length = min(chunk_bytes, total - start)
        chunks.append(say.ChunkPlan("float32", SLOT_HEADER_BYTES + start, length))
        box = Box((start // 4,), ((start + length) // 4,))
        pieces.append(Piece(0, number, 0, length, box))
    return say.Recipe(
        recipe=1, plan=None, layout=DIGEST, tensors=(tensor,), aliases={}, chunks=tuple(chunks),
        pieces=Columns.pack(pieces),
    )  # fmt: skip
