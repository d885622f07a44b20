"""A rank of a job without torch: it speaks the protocol, and knows what it handed over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ckptd.errors import DaemonUnavailableError
from ckptd.model.box import Box
from ckptd.model.columns import Columns
from ckptd.model.keys import StepId
from ckptd.model.tensor import Held, Layout, Tensor
from ckptd.pipeline.catalog import list_commits, read_manifest, read_ranks
from ckptd.pipeline.read import read_chunks
from ckptd.pipeline.verify import verify_all
from ckptd.plan.pack import pack
from ckptd.plan.reading import Wanted, plan_reads
from ckptd.plan.split import Share, split, whole_share
from ckptd.shm.arena import Arena
from ckptd.shm.slots import SLOT_HEADER_BYTES
from ckptd.store.base import Store
from ckptd.units import KIB
from ckptd.wire import messages as say
from ckptd.wire.address import connect
from ckptd.wire.channel import Channel

PATIENCE_S = 60.0
SHAPES = {"model.big": (300, 1000), "model.bias": (50,), "optimizer.model.bias.exp_avg": (50,)}

Arrays = dict[str, npt.NDArray[np.float32]]


def contents(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Arrays:
    """Return the tensors of a step: other numbers in every step, the same on every rank."""
    rng = np.random.default_rng(step)
    return {fqn: rng.standard_normal(shape, np.float32) for fqn, shape in sorted(shapes.items())}


def layout_of(shapes: dict[str, tuple[int, ...]]) -> Layout:
    held = []
    for fqn, shape in sorted(shapes.items()):
        kind = "optimizer" if fqn.startswith("optimizer") else "parameter"
        tensor = Tensor(fqn, "float32", shape, kind, kind == "parameter", "cpu")  # type: ignore[arg-type]
        held.append(Held(tensor, (Box.full(shape),), is_replicated=True))
    return Layout(tuple(held))


class FakeTrainer:
    """One rank with an arena and a connection. For one thread.

    Args:
        socket: the daemon's.
        root: the root, which exists.
        shapes: what this rank holds; by default what all ranks hold, shared out by a plan.
        share: what it writes of that, where the plan is to be overruled; `plan` is its digest.
    """

    def __init__(
        self, socket: str, root: str, *, rank: int = 0, world_size: int = 1, attempt: int = 1,
        slots: int = 2, commit_timeout_s: float = 60.0, chunk_bytes: int = 512 * KIB,
        shapes: dict[str, tuple[int, ...]] = SHAPES, is_planned: bool = True,
        share: Share | None = None,
    ) -> None:  # fmt: skip
        self.socket = socket
        self.rank = rank
        self.shapes = shapes
        self.hello = say.Hello(
            protocol=say.PROTOCOL, root=root, storage_options={}, attempt=attempt, token="fake",
            rank=rank, world_size=world_size, compression="auto",
            commit_timeout_s=commit_timeout_s,
        )  # fmt: skip
        layout = layout_of(shapes)
        plan = split([layout] * world_size, chunk_bytes) if is_planned else None
        if share is None:
            share = plan.shares[rank] if plan is not None else whole_share(layout)
        self.packed = pack(layout, share, chunk_bytes=chunk_bytes, header_bytes=SLOT_HEADER_BYTES)
        slot_bytes = max(self.packed.slot_bytes, 2 * SLOT_HEADER_BYTES)
        self.recipe = say.Recipe(
            recipe=1, plan=plan.digest if plan is not None else None, layout=layout.digest(),
            tensors=self.packed.tensors, aliases={}, pieces=Columns.pack(self.packed.pieces),
            chunks=tuple(
                say.ChunkPlan(c.dtype, c.offset_bytes, c.raw_bytes) for c in self.packed.chunks
            ),
        )  # fmt: skip
        self.arena = Arena.create(slots, slot_bytes)
        self.fingerprints = b""
        self.handoffs: dict[int, say.Handoff] = {}
        self.written: set[int] = set()
        self.finished: dict[int, say.Finished] = {}
        self.heard: list[say.Message] = []
        self.previous: StepId | None = None
        self._channel: Channel | None = None

    # --- talking ---------------------------------------------------------------------------------

    def dial(self) -> FakeTrainer:
        """Open a connection, as `ckptd status` does: it may ask for a report."""
        self.hang_up()
        self._channel = Channel(connect(self.socket, deadline_s=10.0), say.FromDaemon)
        self._channel.accept_large_frames()
        return self

    def connect(self, socket: str | None = None) -> FakeTrainer:
        """Open a new conversation: hello, welcome, arena, recipe."""
        self.socket = socket or self.socket
        self.dial()
        self.say(self.hello)
        self.wait_for(say.Welcome)
        self.say(say.Arena(1, self.arena.slots, self.arena.slot_bytes), [self.arena.fileno()])
        self.say(self.recipe)
        return self

    def say(self, message: say.Message, fds: Sequence[int] = ()) -> None:
        assert self._channel is not None
        self._channel.send(message, fds, deadline_s=PATIENCE_S)

    def receive(self, timeout_s: float) -> None:
        """Take what comes within `timeout_s`, at least one message if there is one.

        Raises:
            DaemonUnavailableError: the connection ended.
        """
        assert self._channel is not None
        for message in self._channel.receive(timeout_s):
            self.heard.append(message)
            if isinstance(message, say.Written):
                self.written.add(message.step)
            elif isinstance(message, say.Finished):
                self.finished[message.step] = message
                if message.state == "committed":
                    found = StepId(attempt=self.hello.attempt, step=message.step)
                    self.previous = max(found, self.previous or found)

    def wait_for(self, kind: type[say.Message], timeout_s: float = PATIENCE_S) -> Any:
        """Wait for the next message of a kind."""
        begin, deadline = len(self.heard), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.receive(0.2)
            for message in self.heard[begin:]:
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} in {timeout_s} s; heard {self.heard[begin:]}")

    def outcome(self, step: int, timeout_s: float = PATIENCE_S) -> say.Finished | None:
        """Wait for the final word on a step; None if the connection ends before it comes."""
        deadline = time.monotonic() + timeout_s
        while step not in self.finished:
            if time.monotonic() > deadline:
                raise AssertionError(f"no final word on step {step} in {timeout_s} s")
            try:
                self.receive(0.2)
            except DaemonUnavailableError:
                break
        return self.finished.get(step)

    def report(self) -> dict[str, Any]:
        """Ask for what `ckptd status` shows; all that was said before is in it."""
        self.say(say.Ask())
        return msgspec.json.decode(self.wait_for(say.Report).body, type=dict[str, Any])

    def hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def goodbye(self) -> None:
        with contextlib.suppress(DaemonUnavailableError):
            self.say(say.Goodbye())
        self.hang_up()

    # --- saving ----------------------------------------------------------------------------------

    def fill(
        self, step: int, sequence: int, *, slot: int = 0, arrays: Arrays | None = None
    ) -> None:
        """Put a snapshot into a slot; `offer` hands it off."""
        arrays = arrays or contents(step, self.shapes)
        target = self.arena.slot(slot)
        generation = target.begin(step, sequence)
        for piece in self.packed.pieces:
            at = self.packed.chunks[piece.chunk].offset_bytes + piece.offset_bytes
            tensor = self.packed.tensors[piece.tensor]
            part = arrays[tensor.fqn][piece.box.slices((0,) * len(tensor.shape))]
            target.view[at : at + piece.length_bytes] = np.ascontiguousarray(part).tobytes()
        target.finish()
        self.handoffs[step] = say.Handoff(
            step=step, sequence=sequence, arena=1, slot=slot, generation=generation, recipe=1,
            values=msgspec.json.encode({"epoch": {"t": "int", "v": step}}),
            fingerprints=self.fingerprints, metrics={"loss": 1.0},
            previous=str(self.previous) if self.previous else None, captured_at=1.7e9,
        )  # fmt: skip

    def offer(self, step: int) -> None:
        """Hand off what `fill` made: for the first time, or again; or watch what is written."""
        handoff = self.handoffs[step]
        if step in self.written:
            self.say(say.Watch(step, handoff.sequence, handoff.previous))
        else:
            self.say(handoff)

    def save(
        self, step: int, sequence: int, *, slot: int = 0, arrays: Arrays | None = None
    ) -> None:
        """Fill a slot and hand it off."""
        self.fill(step, sequence, slot=slot, arrays=arrays)
        self.offer(step)

    def forfeit(self, step: int, sequence: int, reason: str = "no") -> None:
        self.say(say.Forfeit(step, sequence, "failed", reason))

    def close(self) -> None:
        self.hang_up()
        self.arena.close()

    def __enter__(self) -> FakeTrainer:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


# --- what the store holds ------------------------------------------------------------------------


def committed_steps(store: Store) -> list[int]:
    """Return the committed steps, oldest first."""
    return sorted(commit.id.step for commit in list_commits(store))


def assert_all_whole(store: Store) -> list[int]:
    """Check that everything listed is whole, each byte re-hashed; return the steps."""
    reports = list(verify_all(store, is_data=True))
    assert [report.damage for report in reports] == [()] * len(reports)
    return sorted(report.id.step for report in reports)


def load(store: Store, id_: StepId) -> Arrays:
    """Return the tensors of a checkpoint."""
    manifest = read_manifest(store, id_)
    records = read_ranks(store, manifest, range(manifest.world_size))
    wanted = [Wanted(t.fqn, Box.full(tuple(t.shape))) for t in manifest.tensors]
    arrays = {t.fqn: np.full(t.shape, np.nan, np.float32) for t in manifest.tensors}

    def sink(region: Any, raw: memoryview) -> None:
        box = region.box
        part = np.frombuffer(raw, np.float32).reshape(box.shape)
        fqn = wanted[region.wanted].fqn
        arrays[fqn][box.slices((0,) * len(box.shape))] = part

    read_chunks(store, plan_reads(wanted, records), sink)
    return arrays


def assert_holds(store: Store, id_: StepId, arrays: Arrays) -> None:
    """Check that a checkpoint holds exactly these bytes."""
    found = load(store, id_)
    assert sorted(found) == sorted(arrays)
    for fqn, array in arrays.items():
        assert found[fqn].tobytes() == array.tobytes(), fqn
