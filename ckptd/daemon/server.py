"""The socket side of a daemon: clients come and go, messages become events."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from ckptd.engine import events as ev
from ckptd.engine.replies import without_memory
from ckptd.engine.runner import Outlet, Runner, Share
from ckptd.errors import CkptdError, ProtocolError
from ckptd.shm.arena import Arena
from ckptd.wire import messages as say
from ckptd.wire.accept import Door
from ckptd.wire.channel import Channel
from ckptd.wire.peer import peer_pid, peer_pidfd

log = logging.getLogger("ckptd.daemon")

FRAME_TIMEOUT_S = 30.0
HELLO_TIMEOUT_S = 10.0
MAX_CLIENTS = 1024
MAX_WAITING = 64  # messages of one client that the engine has not come to
_PATROL_S = 5.0


@dataclass
class _Peer:
    """A connection. `pidfd` becomes readable when the process at its other end dies.

    `is_member` is True from its hello to its goodbye.
    """

    number: int
    channel: Channel
    pidfd: int | None
    pid: int
    since: float
    has_spoken: bool = False
    is_member: bool = False
    waiting: int = 0
    is_leaving: bool = False


class Server:
    """Accepts clients on a listening socket and carries messages to and from a runner.

    One thread calls `serve`; `outlet` is for the runner's thread, `wake` and `stop` for any thread
    and for signal handlers.
    """

    def __init__(self, listener: socket.socket, allowed_uids: set[int]) -> None:
        self._listener = listener
        self._door = Door(listener, allowed_uids)
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        # Peers whose connection ended, while their process still lived when last looked.
        self._unreaped: dict[int, _Peer] = {}
        self._followed: dict[int, int] = {}  # the pidfds of processes without a connection
        self._next = 1
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._is_stopped = False
        self._patrolled = 0.0
        self.outlet = Outlet(
            send=self._order_send, drop=self._order_drop, handled=self._order_next,
            lend=self._order_lend,
        )  # fmt: skip

    def wake(self) -> None:
        """Make `serve` look at its orders. Safe in a signal handler."""
        with contextlib.suppress(OSError):  # a full pipe wakes just as well
            os.write(self._wake_out, b"w")

    def wake_fd(self) -> int:
        """Return what `signal.set_wakeup_fd` is to be given; `serve` takes it back at its end."""
        return self._wake_out

    def stop(self) -> None:
        """Make `serve` return."""
        self._is_stopped = True
        self.wake()

    def follow(self, number: int, pidfd: int | None) -> None:
        """Tell of the death of a process that a former daemon knew; owns its `pidfd`.

        No connection will get its number. To be called before `serve`.
        """
        self._next = max(self._next, number + 1)
        if pidfd is not None:
            self._followed[number] = pidfd
            self._selector.register(
                pidfd, selectors.EVENT_READ, lambda: self._followed_died(number)
            )  # fmt: skip

    def serve(self, runner: Runner) -> None:
        """Carry messages until `stop`, then close every connection."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._drain_pipe)
        self._runner = runner
        try:
            while not self._is_stopped:
                for key, _ in self._selector.select(timeout=self._patience()):
                    key.data()
                self._obey()
                self._patrol()
        finally:
            self._obey()
            for peer in list(self._peers.values()):
                self._hang_up(peer)
            for peer in list(self._unreaped.values()):
                self._reap(peer)
            for pidfd in self._followed.values():
                os.close(pidfd)
            self._door.close()
            self._selector.close()
            if threading.current_thread() is threading.main_thread():  # only there it can be set
                signal.set_wakeup_fd(-1)  # its number may soon be another file's
            os.close(self._wake_in)
            os.close(self._wake_out)

    # --- from the runner's thread --------------------------------------------------------------

    def _order_send(self, client: int, message: say.FromDaemon) -> None:
        self._orders.put(lambda: self._send(client, message))
        self.wake()

    def _order_lend(self, client: int, message: say.Lent | say.Ceded, share: Share) -> None:
        self._orders.put(lambda: self._lend(client, message, share))
        self.wake()

    def _order_drop(self, client: int) -> None:
        self._orders.put(lambda: self._leave(client))
        self.wake()

    def _order_next(self, client: int) -> None:
        self._orders.put(lambda: self._was_handled(client))
        self.wake()

    # --- on the serving thread -----------------------------------------------------------------

    def _obey(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._orders.get_nowait()()

    def _drain_pipe(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_in, 4096)

    def _accept(self) -> None:
        client = self._door.accept()
        if client is None:
            return
        if len(self._peers) >= MAX_CLIENTS:
            client.close()
            return
        peer = _Peer(
            self._next, Channel(client, say.FromTrainer), peer_pidfd(client), peer_pid(client),
            since=time.monotonic(),
        )  # fmt: skip
        self._next += 1
        self._peers[peer.number] = peer
        self._selector.register(peer.channel, selectors.EVENT_READ, lambda: self._ready(peer))
        if peer.pidfd is not None:
            # A forked data loader keeps the socket open when its parent dies: the pidfd tells.
            self._selector.register(peer.pidfd, selectors.EVENT_READ, lambda: self._lost(peer))

    def _ready(self, peer: _Peer) -> None:
        if peer.number not in self._peers:
            return
        if peer.channel.wants_write and not peer.channel.write_ready():
            self._lost(peer)
            return
        try:
            messages = peer.channel.read_ready() if peer.waiting < MAX_WAITING else []
            if messages is None:
                self._lost(peer)
                return
            for message in messages:
                self._said(peer, message)
            # Not before: one read may bring several messages, and the last one's descriptor.
            if peer.channel.taken_fds and peer.channel.partial_since_s is None:
                raise ProtocolError("a descriptor that no message announced")
        except CkptdError as error:
            log.warning("client %d (pid %d): %s", peer.number, peer.pid, error)
            self._send(peer.number, say.Refused(type(error).__name__, str(error)))
            self._lost(peer)
            return
        self._interest(peer)

    def _said(self, peer: _Peer, message: say.Message) -> None:
        peer.has_spoken = True
        peer.waiting += 1
        if isinstance(message, say.Arena):
            arena = Arena.adopt(peer.channel.take_fd(), message.slots, message.slot_bytes)
            identity = os.fstat(arena.fileno()).st_ino
            self._runner.give_arena(peer.number, message.arena, arena)
            self._runner.post(ev.Mapped(peer.number, message, identity))
            return
        if isinstance(message, say.Hello):
            self._forget(peer.pid)
            peer.is_member = True
        elif isinstance(message, say.Goodbye):
            peer.is_member = message.keeps  # its memory is ceded once the process is dead
        # The channel decodes nothing but the union of what a trainer may say.
        self._runner.post(ev.Said(peer.number, cast("say.FromTrainer", message), peer.pid))

    def _lend(self, client: int, message: say.Lent | say.Ceded, share: Share) -> None:
        fd = share() if client in self._peers else None
        if fd is None:
            self._send(client, without_memory(message))
            return
        try:
            self._send(client, message, [fd])
        finally:
            os.close(fd)

    def _send(self, client: int, message: say.FromDaemon, fds: Sequence[int] = ()) -> None:
        peer = self._peers.get(client)
        if peer is None:
            return
        if isinstance(message, say.Welcome):
            peer.channel.accept_large_frames()
        try:
            peer.channel.queue(message, fds)
        except (ProtocolError, OSError) as error:  # it reads nothing, or no descriptor is left
            log.warning("client %d (pid %d): %s", peer.number, peer.pid, error)
            self._lost(peer)
            return
        if not peer.channel.write_ready():
            self._lost(peer)
            return
        self._interest(peer)

    def _leave(self, client: int) -> None:
        peer = self._peers.get(client)
        if peer is not None:
            peer.is_leaving = True
            self._interest(peer)

    def _interest(self, peer: _Peer) -> None:
        """Watch for what the peer may do next; hang up once a leaving one has all its messages."""
        if peer.number not in self._peers:
            return
        if peer.is_leaving and not peer.channel.wants_write:
            self._hang_up(peer)
            return
        reading = selectors.EVENT_READ if peer.waiting < MAX_WAITING else 0
        self._watch(peer, reading | (selectors.EVENT_WRITE if peer.channel.wants_write else 0))

    def _watch(self, peer: _Peer, events: int) -> None:
        is_watched = peer.channel in self._selector.get_map()
        if not events and is_watched:
            self._selector.unregister(peer.channel)
        elif events and is_watched:
            self._selector.modify(peer.channel, events, lambda: self._ready(peer))
        elif events:
            self._selector.register(peer.channel, events, lambda: self._ready(peer))

    def _was_handled(self, client: int) -> None:
        """Read on from a client that had said more than the engine could take."""
        peer = self._peers.get(client)
        if peer is not None:
            peer.waiting -= 1
            if peer.waiting == MAX_WAITING - 1:
                self._interest(peer)

    def _lost(self, peer: _Peer) -> None:
        """End a connection that broke, and tell the engine whether the process is dead too.

        The kernel closes the sockets of a dying process before its pidfd says that it is dead, a
        long time before where a device has to be released: the pidfd is watched on.
        """
        if peer.number in self._peers:
            is_dead = _is_dead(peer)
            self._hang_up(peer, is_watched_on=not is_dead and peer.is_member)
            self._runner.post(ev.Gone(peer.number, is_dead=is_dead))

    def _hang_up(self, peer: _Peer, *, is_watched_on: bool = False) -> None:
        del self._peers[peer.number]
        self._watch(peer, 0)
        peer.channel.close()
        self._unreaped[peer.number] = peer
        if peer.pidfd is None or not is_watched_on:
            self._reap(peer)
        else:
            self._selector.modify(peer.pidfd, selectors.EVENT_READ, lambda: self._died(peer))

    def _died(self, peer: _Peer) -> None:
        if peer.number in self._unreaped:
            self._reap(peer)
            self._runner.post(ev.Gone(peer.number, is_dead=True))

    def _followed_died(self, number: int) -> None:
        pidfd = self._followed.pop(number)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        self._runner.post(ev.Gone(number, is_dead=True))

    def _forget(self, pid: int) -> None:
        """Watch no more connections that a process had before: it has a new one."""
        for peer in [other for other in self._unreaped.values() if other.pid == pid]:
            self._reap(peer)

    def _reap(self, peer: _Peer) -> None:
        del self._unreaped[peer.number]
        if peer.pidfd is not None:
            self._selector.unregister(peer.pidfd)
            os.close(peer.pidfd)

    def _patience(self) -> float | None:
        """Return how long to wait: not for ever while some client owes us bytes."""
        owing = any(not p.has_spoken or p.channel.partial_since_s for p in self._peers.values())
        return _PATROL_S if owing else None

    def _patrol(self) -> None:
        """Drop clients that never said hello, or that take for ever over one frame."""
        now = time.monotonic()
        if now - self._patrolled < _PATROL_S:
            return
        self._patrolled = now
        for peer in list(self._peers.values()):
            partial = peer.channel.partial_since_s
            if (not peer.has_spoken and now - peer.since > HELLO_TIMEOUT_S) or (
                partial is not None and now - partial > FRAME_TIMEOUT_S
            ):
                log.warning("client %d (pid %d) is too slow; dropped", peer.number, peer.pid)
                self._lost(peer)


def _is_dead(peer: _Peer) -> bool:
    if peer.pidfd is None:
        return not os.path.exists(f"/proc/{peer.pid}")
    return bool(select.select([peer.pidfd], [], [], 0)[0])
