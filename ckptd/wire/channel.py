"""The one place where messages and descriptors go through a socket."""

from __future__ import annotations

import array
import math
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ckptd.errors import DaemonUnavailableError, ProtocolError
from ckptd.units import MIB, format_bytes, format_span
from ckptd.wire import frames
from ckptd.wire.messages import Message

MAX_PENDING_FDS = 2
MAX_QUEUE_BYTES = 8 * MIB
MAX_QUEUE_FDS = 16  # a trainer waits for one before it asks for another

_READ_BYTES = 256 << 10
# Room for just the descriptors that are allowed: of more, the kernel installs these and says
# MSG_CTRUNC, so a peer that sends 253 costs two table entries for a moment.
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_PENDING_FDS * _FD_BYTES)
_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)

_Ancillary: TypeAlias = "list[tuple[int, int, array.array[int]]]"


@dataclass
class _Segment:
    """Bytes that wait to be written, and descriptors that go with the first of them."""

    data: bytearray
    fds: list[int]

    def close(self) -> None:
        """Close the descriptors: they were sent, or never will be."""
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """Messages over a connected stream socket, which the channel owns from then on.

    Two ways to use it, not both: blocking with deadlines (`send`, `receive`: the trainer; one
    thread may send while another receives), or from one selector loop (`read_ready`, `queue`,
    `write_ready`: the daemon). A forked child does not talk on its parent's channel: everything but
    `close` raises there.

    Attributes:
        taken_fds: descriptors that came and nobody took yet, in order of arrival; close-on-exec.
            `close` closes those that are still here.
    """

    def __init__(
        self, sock: socket.socket, type_: Any, *, max_queue_bytes: int = MAX_QUEUE_BYTES
    ) -> None:  # fmt: skip
        sock.settimeout(0)
        self.taken_fds: list[int] = []
        self._socket = sock
        self._reader = frames.FrameReader(type_)
        self._max_queue_bytes = max_queue_bytes
        self._outgoing: deque[_Segment] = deque()
        self._queued_bytes = 0
        self._large_bytes = 0  # what is left of a message that is larger than the queue may be
        self._is_cut = False  # a send stopped inside a frame: nothing may follow it
        self._partial_since_s: float | None = None
        self._pid = os.getpid()

    # --- both ways ---------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    def accept_large_frames(self) -> None:
        """Accept frames of `frames.MAX_FRAME_BYTES` from here on: the hello was accepted."""
        self._reader.max_bytes = frames.MAX_FRAME_BYTES

    @property
    def partial_since_s(self) -> float | None:
        """When (monotonic) the frame began that has not ended yet; None between frames.

        A loop drops a peer that takes too long over one frame: dripping bytes does not reset this.
        """
        return self._partial_since_s

    def take_fd(self) -> int:
        """Return the oldest descriptor that came; the caller owns it.

        Raises:
            ProtocolError: if none came: a message announced one and it did not travel with it.
        """
        if not self.taken_fds:
            raise ProtocolError("a descriptor was announced and none came")
        return self.taken_fds.pop(0)

    def close(self) -> None:
        """Close the socket and every descriptor that was not taken or sent. May be repeated."""
        self._drop_fds()
        while self._outgoing:
            self._outgoing.popleft().close()
        self._socket.close()

    # --- blocking, with deadlines ------------------------------------------------------------

    def send(self, message: Message, fds: Sequence[int] = (), *, deadline_s: float) -> None:
        """Send a message whole, `fds` with its first byte; they stay the caller's.

        Raises:
            DaemonUnavailableError: if the other end is gone or did not take it within `deadline_s`.
                Nothing can be sent after that, but what it said before may still be received.
            ProtocolError: if the message cannot be sent at all; the channel is as before.
        """
        data = memoryview(frames.encode(message))
        self._check_process()
        if self._is_cut:
            raise DaemonUnavailableError("the connection broke during an earlier message")
        end_s = time.monotonic() + deadline_s
        ancillary = _rights(fds)
        self._is_cut = True
        while data:
            sent = self._send_some(data, ancillary)
            if sent:
                data, ancillary = data[sent:], []
            elif not _poll(self._socket, select.POLLOUT, end_s):
                raise DaemonUnavailableError(
                    f"the other end took nothing for {format_span(deadline_s)}; is it stopped?"
                )
        self._is_cut = False

    def receive(self, deadline_s: float) -> list[Message]:
        """Wait for messages and return those that came, at least one; nothing at the deadline.

        Raises:
            DaemonUnavailableError: if the other end closed the connection or is gone.
            ProtocolError: as `read_ready`.
        """
        end_s = time.monotonic() + deadline_s
        while True:
            messages = self.read_ready()
            if messages is None:
                raise DaemonUnavailableError("the other end closed the connection")
            if messages or not _poll(self._socket, select.POLLIN, end_s):
                return messages

    # --- from a selector loop ----------------------------------------------------------------

    def read_ready(self) -> list[Message] | None:
        """Read once, without waiting, and return the messages that this completed.

        None when the other end closed the connection or is gone.

        Raises:
            ProtocolError: if what came is not the protocol, or brought more descriptors than
                `MAX_PENDING_FDS` or than this process has room for. All untaken ones are closed;
                the caller closes the channel.
        """
        self._check_process()
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _READ_BYTES, _ANCILLARY_BYTES, _RECEIVE_FLAGS
            )
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        self.taken_fds += _received(ancillary)
        try:
            self._judge_fds(is_truncated=bool(flags & socket.MSG_CTRUNC))
            return self._gather(data) if data else None
        except ProtocolError:
            self._drop_fds()
            raise

    def queue(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Put a message behind those that wait for `write_ready`, `fds` with its first byte.

        The descriptors stay the caller's: they are duplicated here.

        Raises:
            ProtocolError: if more than `max_queue_bytes` would wait, or `MAX_QUEUE_FDS` descriptors:
                the other end does not read, and is to be dropped. One message may be larger, where
                nothing waits before it, and does not count for those behind it.
            OSError: no descriptor is left to this process.
        """
        self._check_process()
        data = frames.encode(message)
        behind = self._queued_bytes - self._large_bytes + len(data)
        has_room = behind <= self._max_queue_bytes or not self._outgoing
        if not has_room or len(fds) + sum(len(s.fds) for s in self._outgoing) > MAX_QUEUE_FDS:
            raise ProtocolError(
                f"the other end does not read: {format_bytes(self._queued_bytes)} wait for it"
            )
        if fds or not self._outgoing:
            self._outgoing.append(_Segment(bytearray(), [os.dup(fd) for fd in fds]))
        if len(data) > self._max_queue_bytes:
            self._large_bytes = len(data)
        self._outgoing[-1].data += data
        self._queued_bytes += len(data)

    @property
    def wants_write(self) -> bool:
        """Tell whether queued bytes wait."""
        return bool(self._outgoing)

    def write_ready(self) -> bool:
        """Write queued bytes, without waiting; False when the other end is gone."""
        self._check_process()
        try:
            while self._outgoing:
                self._write_some(self._outgoing[0])
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return True

    # --- inside ------------------------------------------------------------------------------

    def _write_some(self, segment: _Segment) -> None:
        with memoryview(segment.data) as view:
            sent = self._socket.sendmsg([view[:_READ_BYTES]], _rights(segment.fds), _SEND_FLAGS)
        segment.close()
        del segment.data[:sent]
        self._queued_bytes -= sent
        self._large_bytes = max(0, self._large_bytes - sent)
        if not segment.data:
            self._outgoing.popleft()

    def _judge_fds(self, *, is_truncated: bool) -> None:
        # Where the descriptor table is full, the kernel leaves some out and says no more than this.
        if is_truncated or len(self.taken_fds) > MAX_PENDING_FDS:
            raise ProtocolError("more descriptors came than are accepted or fit this process")

    def _gather(self, data: bytes) -> list[Message]:
        messages = self._reader.feed(data)
        if not self._reader.is_partial:
            self._partial_since_s = None
        elif messages or self._partial_since_s is None:
            self._partial_since_s = time.monotonic()
        return messages

    def _send_some(self, data: memoryview, ancillary: _Ancillary) -> int:
        try:
            return self._socket.sendmsg([data], ancillary, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise DaemonUnavailableError(f"the connection is gone: {error}") from error

    def _drop_fds(self) -> None:
        while self.taken_fds:
            os.close(self.taken_fds.pop())

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise DaemonUnavailableError(
                "this connection belongs to the parent process; a forked child opens its own"
            )


def _rights(fds: Sequence[int]) -> _Ancillary:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    if not _RECEIVE_FLAGS:  # macOS has no MSG_CMSG_CLOEXEC
        for fd in fds:
            os.set_inheritable(fd, False)
    return list(fds)


def _poll(sock: socket.socket, event: int, end_s: float) -> bool:
    """Wait until `event` or the end of the stream; False at `end_s` (monotonic)."""
    poll = select.poll()
    poll.register(sock, event)
    left_s = max(0.0, end_s - time.monotonic())
    return bool(poll.poll(math.ceil(left_s * 1000)))
