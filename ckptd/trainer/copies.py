"""Copies of live tensors into a slot: at once, or the larger part of them beside the next step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ckptd.model.tensor import REPLICATED_KINDS
from ckptd.trainer.flatten import Leaf
from ckptd.trainer.guard import Copied, Guard
from ckptd.trainer.pinning import side_stream
from ckptd.trainer.wrappers import is_lazy

# Above this a copy of its own is as fast, and the memory of a replaced tensor is worth giving back.
JOIN_BYTES = 256 << 10
# To defer a copy costs a sample, which takes as long as to copy so much.
DEFER_BYTES = 32 << 10


class Source(NamedTuple):
    """A leaf by its place, which of its parts, and what of that; `cut` None: all."""

    leaf: int
    part: int
    cut: tuple[slice, ...] | None


class Part(NamedTuple):
    """A piece: where it comes from, and where it goes; `start` is its first byte in the slot."""

    source: Source
    place: torch.Tensor
    start: int

    def tensor(self, leaves: Sequence[Leaf]) -> torch.Tensor:
        """Return the memory that it is copied out of."""
        return leaves[self.source.leaf].parts[self.source.part]


class Copies:
    """The copies of one set of live tensors, ready to run again as long as these stay as they are.

    Small tensors that lie side by side in the slot are concatenated into it as bytes: one call for
    all of them costs a fraction of a copy each. Views of a tensor that the job gave new memory
    (``p.data = ...``) would copy the old contents, so addresses are compared before each copy; until
    then the old memory is kept.

    With `defers`, parameters and optimizer tensors of more than `DEFER_BYTES` are left to `begin`.
    """

    def __init__(
        self, slot: memoryview, parts: Sequence[Part], leaves: Sequence[Leaf], *, defers: bool
    ) -> None:
        self.defers = defers
        self._leaves = leaves
        self._joined: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._runs: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._now: list[Copied] = []
        self._late: list[Copied] = []
        self._cuts: list[tuple[torch.Tensor, int, tuple[int, ...]]] = []
        for run in _runs(parts, leaves, DEFER_BYTES if defers else JOIN_BYTES):
            if len(run) > 1:
                self._join(slot, run)
            else:
                self._add(run[0])

    def holds(self, leaves: Sequence[Leaf]) -> bool:
        """Tell whether these are the same tensors in the same memory."""
        return (
            leaves is self._leaves
            and list(map(torch.Tensor.data_ptr, self._joined)) == self._addresses
            and all(map(torch.Tensor.is_contiguous, self._joined))
            and all(
                t.data_ptr() == start and t.stride() == stride for t, start, stride in self._cuts
            )
        )

    def run(self) -> None:
        """Run all copies; on return the tensors may be changed."""
        self._run_now()
        _copy(self._late)

    def begin(self) -> Deferred | None:
        """Run the copies that cannot wait; the rest, None if there is none, is for `Deferred.run`."""
        if not self._late:
            self._run_now()
            return None
        self._join_runs()
        # What a tensor is now: the job may give it other memory (``p.data = ...``) meanwhile.
        late = [copied._replace(source=copied.source.detach()) for copied in self._late]
        return Deferred(self._now, late)

    def _run_now(self) -> None:
        self._join_runs()
        _copy(self._now)

    def _join_runs(self) -> None:
        for run, sources in self._runs:
            torch.cat(sources, out=run)

    def _join(self, slot: memoryview, run: Sequence[Part]) -> None:
        tensors = [part.tensor(self._leaves) for part in run]
        size = run[-1].start + run[-1].place.nbytes - run[0].start
        whole = torch.frombuffer(slot, dtype=torch.uint8, count=size, offset=run[0].start)
        self._joined += tensors
        self._addresses += [tensor.data_ptr() for tensor in tensors]
        self._runs.append((whole, [tensor.view(-1).view(torch.uint8) for tensor in tensors]))

    def _add(self, part: Part) -> None:
        leaf = self._leaves[part.source.leaf]
        live, cut = part.tensor(self._leaves), part.source.cut
        tensor = live.detach()
        source = live if cut is None else tensor[cut]
        if cut is not None:
            self._cuts.append((live, tensor.data_ptr(), tensor.stride()))
        is_late = self.defers and leaf.kind in REPLICATED_KINDS and not is_lazy(tensor)
        copies = self._late if is_late and part.place.nbytes > DEFER_BYTES else self._now
        copies.append(Copied(leaf.fqn, source, part.place))


class Deferred:
    """Copies that go on while the job does, until it changes what they read.

    The thread that trains makes it and calls `wait` before it changes anything; one other thread
    calls `run`, and `changed` after it.
    """

    def __init__(self, now: Sequence[Copied], late: Sequence[Copied]) -> None:
        """Sample the tensors of `late`, copy those of `now`, and start what a GPU does by itself.

        What is copied from a GPU `now` is so before any work that it is given from here on; this
        thread does not wait for either.
        """
        self._guard = Guard(late)
        self._is_over = threading.Event()
        self._rest: list[tuple[torch.cuda.Event | None, list[Copied]]] = []
        self._events: list[torch.cuda.Event] = []
        for device in {copied.source.device: None for copied in (*now, *late)}:
            first = [copied for copied in now if copied.source.device == device]
            rest = [copied for copied in late if copied.source.device == device]
            if device.type == "cuda" and (*first, *rest)[0].place.is_pinned():
                self._events.append(_start(device, first, rest))
                continue
            _copy(first)
            is_cuda = device.type == "cuda"
            ready = torch.cuda.current_stream(device).record_event() if is_cuda else None
            if rest:
                self._rest.append((ready, rest))

    def run(self) -> None:
        """Do the copies, or wait until they are done; whatever happens, `wait` waits no longer."""
        try:
            for ready, group in self._rest:
                if ready is None:
                    _copy(group)
                else:
                    _copy_after(ready, group)
            for event in self._events:
                event.synchronize()
        finally:
            self._is_over.set()

    def wait(self) -> None:
        """Make what this thread does next come after the copies.

        Work that a GPU has yet to do waits there, and this returns at once.
        """
        for event in self._events:
            torch.cuda.current_stream(event.device).wait_event(event)
        if self._rest:
            self._is_over.wait()

    def changed(self) -> list[str]:
        """Return the names of tensors that were changed before they were copied; see `Guard`."""
        return self._guard.changed()


def _copy(copies: Sequence[Copied]) -> None:
    """Copy; on return everything is there. From page-locked memory the copies overlap each other."""
    if not copies:
        return
    places, sources = [c.place for c in copies], [c.source for c in copies]
    devices = {source.device for source in sources if source.device.type == "cuda"}
    torch._foreach_copy_(places, sources, non_blocking=bool(devices))
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


def _start(
    device: torch.device, first: Sequence[Copied], rest: Sequence[Copied]
) -> torch.cuda.Event:
    """Start copies from a GPU beside its work; the event is over when they are.

    Work that it is given from now on, in this stream or the default one, waits for the `first` ones there: a forward pass may change
    buffers, and no hook tells. They are small, and large copies ahead of them would hold it up.
    """
    stream, current = side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for group in (first, rest):
            if group:
                places, sources = [c.place for c in group], [c.source for c in group]
                torch._foreach_copy_(places, sources, non_blocking=True)
            event: torch.cuda.Event = stream.record_event()
            if group is first:
                current.wait_event(event)
                torch.cuda.default_stream(device).wait_event(event)
        return event


def _copy_after(ready: torch.cuda.Event, group: Sequence[Copied]) -> None:
    """Copy from a GPU into memory that is not page-locked, which this thread waits for."""
    stream = side_stream(group[0].source.device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        _copy(group)


def _runs(
    parts: Sequence[Part], leaves: Sequence[Leaf], join_bytes: int
) -> Iterator[list[Part]]:  # fmt: skip
    """Yield the parts in order, those together that can be concatenated."""
    run: list[Part] = []
    end = -1
    for part in parts:
        tensor = part.tensor(leaves)
        is_plain = part.source.cut is None and _is_plain(tensor, join_bytes)
        if run and not (is_plain and part.start == end):
            yield run
            run = []
        run.append(part)
        end = part.start + part.place.nbytes if is_plain else -1
    if run:
        yield run


def _is_plain(tensor: torch.Tensor, join_bytes: int) -> bool:
    """Tell whether the bytes of a small tensor are, in order, what is stored."""
    return (
        tensor.nbytes <= join_bytes
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not is_lazy(tensor)
    )
