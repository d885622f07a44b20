"""Nodes of a job in one process: their daemons are runners, what dead ranks left lies in real arenas."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import torch

from ckptd.engine import events as ev
from ckptd.engine.replies import without_memory
from ckptd.engine.runner import Outlet, Runner, Share
from ckptd.engine.state import Engine
from ckptd.plan.split import split, whole_share
from ckptd.shm.arena import Arena
from ckptd.store.memory import MemoryStore
from ckptd.trainer.attempts import Attempt, start_attempt
from ckptd.trainer.boards import LocalBoard
from ckptd.trainer.filling import Request, Resumed
from ckptd.trainer.flatten import flatten
from ckptd.trainer.layouts import fingerprint_bytes, layout_of
from ckptd.trainer.link import Link
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.proposals import Root
from ckptd.trainer.recall import Recall
from ckptd.trainer.resuming import Resuming
from ckptd.trainer.snapshots import Snapshots
from ckptd.trainer.terms import Terms
from ckptd.units import MIB
from ckptd.wire import messages as say
from tests.fakes.engines import hello

WAIT_S = 20.0  # far beyond anything that happens; a test that waits so long has failed

Change = Callable[[say.Lent], say.Lent]


class NodePort:
    """One conversation with a node's daemon. See `Port`."""

    def __init__(self, node: Node, number: int, wake_fd: int) -> None:
        self.number = number
        self.asked: list[say.FromTrainer] = []
        self.inbox: list[say.FromDaemon] = []
        self.fds: list[int] = []
        self._node = node
        self._wake_fd = wake_fd

    def fileno(self) -> int | None:
        return None

    def send(self, message: say.FromTrainer, arena: Arena | None = None) -> None:
        self.asked.append(message)
        if isinstance(message, say.Settle):
            self._node.on_settle()
        runner = self._node.runner
        if not isinstance(message, say.Arena):
            runner.post(ev.Said(self.number, message))
            return
        assert arena is not None
        theirs = Arena.adopt(os.dup(arena.fileno()), arena.slots, arena.slot_bytes)
        self._node.arenas.append(theirs)
        runner.give_arena(self.number, message.arena, theirs)
        runner.post(ev.Mapped(self.number, message, os.fstat(arena.fileno()).st_ino))

    def receive(self) -> list[say.FromDaemon]:
        with self._node.changed:
            found, self.inbox = self.inbox, []
            return found

    def take_fd(self) -> int:
        return self.fds.pop(0)

    def close(self) -> None:
        """End the conversation; the process lives, for all that the daemon knows."""
        with self._node.changed:
            self._wake_fd = -1  # its number may soon be another file's
        self._node.runner.post(ev.Gone(self.number, is_dead=False))

    def hear(self, message: say.FromDaemon, fd: int | None = None) -> None:
        with self._node.changed:
            self.inbox.append(message)
            self.fds += [] if fd is None else [fd]
            self._node.changed.notify_all()
            with contextlib.suppress(OSError):
                os.write(self._wake_fd, b"w")

    def wait_for(self, kind: type) -> Any:
        """Take all that came, once something of a kind has."""
        with self._node.changed:
            is_there = lambda: any(isinstance(message, kind) for message in self.inbox)  # noqa: E731
            assert self._node.changed.wait_for(is_there, WAIT_S), kind
            found, self.inbox = self.inbox, []
            return next(message for message in found if isinstance(message, kind))


class Node:
    """A daemon. What it lends can be `change`d on its way."""

    def __init__(self) -> None:
        outlet = Outlet(self._send, lambda _client: None, lend=self._lend)
        self.runner = Runner(Engine(linger_s=None), outlet, workers=1)
        self.changed = threading.Condition()  # guards the inboxes
        self.ports: list[NodePort] = []
        self.arenas: list[Arena] = []
        self.change: Change | None = None
        self.on_settle: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self.runner.run)
        self._thread.start()

    def open(self, wake_fd: int = -1) -> NodePort:
        self.ports.append(NodePort(self, len(self.ports) + 1, wake_fd))
        return self.ports[-1]

    def close(self) -> None:
        self.runner.post(ev.StopAsked(0.0))
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        for arena in self.arenas:  # an engine that leaves work behind lets them go with its process
            arena.close()
        for port in self.ports:
            for fd in port.fds:
                os.close(fd)

    def _send(self, client: int, message: say.FromDaemon) -> None:
        self.ports[client - 1].hear(message)

    def _lend(self, client: int, message: say.Lent | say.Ceded, share: Share) -> None:
        fd = share()
        if fd is None:
            message = without_memory(message)
        if isinstance(message, say.Lent) and self.change is not None:
            message = self.change(message)
        if fd is not None and not message.slots:
            os.close(fd)
            fd = None
        self.ports[client - 1].hear(message, fd)


class Left(NamedTuple):
    """What one rank left, as it sees it itself: its arena, and where its snapshot lies there."""

    snapshots: Snapshots
    arena: Arena
    slot: int

    def overwrite(self) -> None:
        """Begin to write over it, as one that was only paused may."""
        self.arena.slot(self.slot).begin(999, 999)


class Ended(NamedTuple):
    """How `resume` ended on one rank."""

    resumed: Resumed | None
    error: Exception | None
    resuming: Resuming
    asked: list[say.FromTrainer]


class Job:
    """A root, attempts that leave something, and attempts that resume."""

    _numbers = itertools.count(1)

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.url = f"memory://nodes-{next(self._numbers)}"
        self.store = MemoryStore.shared(self.url)
        self.left: list[Left] = []

    def begin(self) -> Attempt:
        return start_attempt(self.store, Meeting(LocalBoard(), 0, 1), WAIT_S)

    def leave(
        self, states: list[dict[str, Any]], step: int, *, attempt: Attempt | None = None,
        on: list[int] | None = None, sequence: int = 1, is_planned: bool = True,
        metrics: dict[str, float] | None = None, chunk_bytes: int = MIB, is_dead: bool = True,
    ) -> list[Left]:  # fmt: skip
        """Let a rank for each state hand a snapshot off, to the first node or to those `on`, and die."""
        attempt = attempt or self.begin()
        flats = [flatten(state) for state in states]
        layouts = [layout_of(flat) for flat in flats]
        plan = split(layouts, chunk_bytes) if is_planned else None
        left = []
        for rank, (flat, layout) in enumerate(zip(flats, layouts, strict=True)):
            node = self.nodes[on[rank] if on else 0]
            snapshots = Snapshots(slots=2, local_ranks=1, is_shared=True, chunk_bytes=chunk_bytes)
            share = plan.shares[rank] if plan else whole_share(layout)
            cut = snapshots.cut(layout, plan.digest if plan else None, share)
            captured = snapshots.capture(
                cut, flat.leaves, step=step, sequence=sequence, timeout_s=0.0
            )
            assert captured is not None
            port = node.open()
            mine = hello(rank, len(states), attempt.ordinal, root=self.url)
            port.send(msgspec.structs.replace(mine, token=attempt.token))
            port.wait_for(say.Welcome)
            arena = captured.arena
            port.send(say.Arena(captured.arena_number, arena.slots, arena.slot_bytes), arena)
            port.send(cut.recipe)
            port.send(
                say.Handoff(
                    step=step, sequence=sequence, arena=captured.arena_number,
                    slot=captured.slot.index, generation=captured.generation,
                    recipe=cut.recipe.recipe, values=msgspec.json.encode(flat.values),
                    fingerprints=b"" if plan else fingerprint_bytes(flat.leaves),
                    metrics=metrics or {}, previous=None, captured_at=1.7e9,
                )
            )  # fmt: skip
            port.wait_for(say.Taken)
            node.runner.post(ev.Gone(port.number, is_dead))
            left.append(Left(snapshots, arena, captured.slot.index))
        self.left += left
        return left

    def resume(
        self, states: list[dict[str, Any]], *, on: list[int | None] | None = None,
        step: int | None = None, **terms: Any,
    ) -> list[Ended]:  # fmt: skip
        """Resume in a new attempt: a thread is a rank, on the first node or on those `on`."""
        attempt = self.begin()
        board = LocalBoard()
        ended: dict[int, Ended] = {}

        def work(rank: int) -> None:
            place = on[rank] if on else 0
            mine = hello(rank, len(states), attempt.ordinal, root=self.url)
            mine = msgspec.structs.replace(mine, token=attempt.token)
            ports: list[NodePort] = []

            def open_port(wake_fd: int) -> NodePort:
                ports.append(self.nodes[place or 0].open(wake_fd))
                return ports[-1]

            link = Link(open_port, mine, give_up_s=5.0)
            root = Root(self.url, {}, may_commit=True)
            resuming = Resuming(root, Meeting(board, rank, len(states)), WAIT_S)
            resumed = error = None
            try:
                recall = Recall(link if place is not None else None, WAIT_S, attempt.ordinal)
                request = Request(states[rank], Terms(**terms), rank, len(states))
                resumed = resuming.run(request, step, recall=recall)
            except Exception as caught:  # noqa: BLE001 - the test judges it
                error = caught
            asked = [message for port in ports for message in port.asked]
            ended[rank] = Ended(resumed, error, resuming, asked)
            link.close()

        threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank-{rank}")
            for rank in range(len(states))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * WAIT_S)
        return [ended[rank] for rank in range(len(states))]

    def close(self) -> None:
        for left in self.left:
            left.snapshots.close()


class Group:
    """In place of torch.distributed, for threads that are named after their rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.sent = 0
        self._barrier = threading.Barrier(world_size)
        self._value: torch.Tensor | None = None

    def broadcast(self, tensor: torch.Tensor, sender: int) -> None:
        """Hang, as a collective does, as long as one rank does not enter it."""
        is_sender = threading.current_thread().name == f"rank-{sender}"
        if is_sender:
            self._value, self.sent = tensor.clone(), self.sent + 1
        self._barrier.wait(WAIT_S)
        if not is_sender:
            assert self._value is not None
            tensor.copy_(self._value)
        self._barrier.wait(WAIT_S)
