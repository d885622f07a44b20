"""HTTP/1.1 messages on a socket, read whole and written whole, slowly, or in part."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

_PER_HOP = ("connection", "keep-alive", "transfer-encoding")
_RESET = struct.pack("ii", 1, 0)  # a linger of 0 s: close() sends RST
_BEAT_S = 0.02  # slow bodies go in pieces, about one a beat
_SLOW_BUFFER_BYTES = 16 * 1024  # else the kernel takes megabytes for a slow reader


@dataclass(frozen=True)
class Message:
    """A request or an answer: its first line, its headers as they came, its body unchunked."""

    start: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    @property
    def is_last(self) -> bool:
        """Whether the connection ends after this message."""
        return self.header("connection").lower() == "close" or "HTTP/1.0" in self.start

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.header("transfer-encoding").lower()

    def header(self, name: str) -> str:
        """Return the value of a header, named in lower case; nothing where there is none."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def without(self, *names: str) -> Message:
        kept = tuple((key, value) for key, value in self.headers if key.lower() not in names)
        return replace(self, headers=kept)

    def edited(self, name: str, edit: Callable[[str], str]) -> Message:
        """Change the value of a header where it is there."""
        pairs = ((key, edit(old) if key.lower() == name else old) for key, old in self.headers)
        return replace(self, headers=tuple(pairs))

    def measured(self) -> Message:
        """Frame the body by its length, on a connection that goes on."""
        bare = self.without(*_PER_HOP, "content-length")
        return replace(bare, headers=(*bare.headers, ("Content-Length", str(len(self.body)))))

    def bare(self) -> Message:
        """Frame no body: the length in the headers is that of another answer, as with HEAD."""
        return replace(self.without(*_PER_HOP), body=b"")

    def head(self) -> bytes:
        lines = [self.start, *(f"{key}: {value}" for key, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Wire:
    """One end of a connection; one thread uses it, any may `shutdown`.

    Reading and writing raise `OSError` when the other end is gone, or `closing` is set.
    """

    def __init__(self, sock: socket.socket, closing: threading.Event) -> None:
        self._sock = sock
        self._closing = closing
        self._file = sock.makefile("rb")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive_head(self) -> Message | None:
        """Return the next message without its body; None at the end of the connection."""
        lines = []
        while (line := self._file.readline(65536)) not in (b"\r\n", b""):
            lines.append(line.decode("latin-1").rstrip("\r\n"))
        if not lines or not line:
            return None
        pairs = (line.partition(":") for line in lines[1:])
        return Message(lines[0], tuple((name, value.strip()) for name, _, value in pairs))

    def receive_request(self, head: Message, bytes_per_s: float | None = None) -> Message:
        """Return the request with its body, taken from the kernel at a rate."""
        if bytes_per_s is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER_BYTES)
        if head.is_chunked:
            return replace(head, body=self._chunks())
        size = int(head.header("content-length") or 0)
        return replace(head, body=self._exactly(size, bytes_per_s))

    def receive_answer(self, head: Message) -> Message:
        """Return the answer with its body, which ends with the connection if it says no length."""
        if head.is_chunked:
            return replace(head, body=self._chunks())
        size = head.header("content-length")
        return replace(head, body=self._exactly(int(size)) if size else self._file.read())

    def send(self, message: Message, *, cut: int | None = None, bytes_per_s: float = 0.0) -> None:
        """Send a message framed as its headers say; its body up to `cut`, at a rate if not 0."""
        body = message.body[:cut]
        if message.is_chunked and body:
            body = b"%x\r\n%b\r\n" % (len(body), body)
        if message.is_chunked:
            body += b"0\r\n\r\n"
        self._sock.sendall(message.head())
        piece = max(1, int(bytes_per_s * _BEAT_S)) if bytes_per_s else len(body)
        for at in range(0, len(body), piece or 1):
            self._sock.sendall(memoryview(body)[at : at + piece])
            self._pause(piece, bytes_per_s)

    def wait_closed(self) -> None:
        """Wait until the other end closes, or this one is shut down."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        poll.poll()

    def shutdown(self) -> None:
        """Wake the thread that waits here; closing would not."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Close with RST."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def _exactly(self, size: int, bytes_per_s: float | None = None) -> bytes:
        parts = []
        piece = max(1, int(bytes_per_s * _BEAT_S)) if bytes_per_s else size
        while size:
            data = self._file.read(min(piece, size))
            if not data:
                raise ConnectionAbortedError
            parts.append(data)
            size -= len(data)
            self._pause(len(data), bytes_per_s)
        return b"".join(parts)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self._file.readline(1024).partition(b";")[0], 16):
            parts.append(self._exactly(size))
            self._exactly(2)
        while self._file.readline(65536).strip():
            pass  # trailers
        return b"".join(parts)

    def _pause(self, size: int, bytes_per_s: float | None) -> None:
        if bytes_per_s and self._closing.wait(size / bytes_per_s):
            raise ConnectionAbortedError
