"""A proxy before an S3 server that breaks chosen requests: refused, cut, held, slow, damaged."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.fakes.faults import (
    DeleteErrors,
    Fault,
    Flip,
    FlipRequest,
    OkWithError,
    ResetAfter,
    ResetBefore,
    Short,
    Silent,
    Slow,
    Status,
    Truncated,
)
from tests.fakes.http_wire import Message, Wire

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DeleteErrors", "Fault", "FaultProxy", "Flip", "FlipRequest", "OkWithError", "Request",
    "ResetAfter", "ResetBefore", "Rule", "Short", "Silent", "Slow", "Status", "Truncated",
]  # fmt: skip

WAIT_S = 20.0  # far beyond anything that happens; a test that waits so long has failed
_MODIFIED = re.compile(r"(?<=<LastModified>)[^<]+")
_CONTENTS = re.compile(r"<Contents>.*?</Contents>", re.DOTALL)


class Request(NamedTuple):
    """What a client asked, and the status that it was sent: None where it was sent none (yet)."""

    method: str
    path: str  # decoded
    query: str  # as it came
    headers: dict[str, str]  # names in lower case
    status: int | None


@dataclass
class Rule:
    """Which requests a fault befalls. `hits` counts them, each before the fault acts."""

    fault: Fault
    method: str | None
    key: str | None
    query: str | None
    skip: int
    times: int | None
    hits: int = 0

    def take(self, asked: Request) -> bool:
        """Judge one more request; whoever calls holds the lock of the proxy."""
        if self.method not in (None, asked.method) or (self.key or "") not in asked.path:
            return False
        if (self.query or "") not in asked.query + "\n" + unquote(asked.query):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


class FaultProxy:
    """Listens at `url` and passes each request on to `server_url`, unless a rule befalls it.

    Requests go on as they came, `Host` included, when they have come whole; the first rule that
    takes a request decides. The proxy itself says 100-continue. It may be used from any thread.
    """

    def __init__(self, server_url: str) -> None:
        self.strip_headers: set[str] = set()  # of requests, names in lower case
        self.clock_shift_s = 0.0  # of Date, Last-Modified and <LastModified>
        self.unsorted_listings = False  # reverses the <Contents> of ListObjectsV2
        self.connections = 0  # accepted so far
        split = urlsplit(server_url)
        self._server = (split.hostname or "", split.port or 80)
        self._closing = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._rules: list[Rule] = []
        self._requests: list[Request] = []
        self._wires: set[Wire] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)
        self._acceptor.start()

    def fail(
        self, fault: Fault, *, method: str | None = None, key: str | None = None,
        query: str | None = None, skip: int = 0, times: int | None = 1,
    ) -> Rule:  # fmt: skip
        """Let a fault befall requests whose path and query contain these strings.

        The first `skip` that match pass, the next `times` do not; None is for ever.
        """
        rule = Rule(fault, method, key, query, skip, times)
        with self._changed:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules."""
        with self._changed:
            self._rules.clear()

    def wait_hits(self, rule: Rule, hits: int = 1) -> None:
        """Wait until a rule has befallen so many requests."""
        with self._changed:
            assert self._changed.wait_for(lambda: rule.hits >= hits, WAIT_S)

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order in which their heads came."""
        with self._changed:
            return list(self._requests)

    def note(self, asked: Request) -> tuple[int, Fault]:
        """Keep a request; return its number and what becomes of it."""
        with self._changed:
            self._requests.append(asked)
            rule = next((rule for rule in self._rules if rule.take(asked)), None)
            self._changed.notify_all()
            return len(self._requests) - 1, rule.fault if rule else Fault()

    def note_status(self, number: int, status: int) -> None:
        with self._changed:
            self._requests[number] = self._requests[number]._replace(status=status)

    def connect(self) -> Wire:
        """Open a connection to the server."""
        return self._hold(socket.create_connection(self._server))

    def drop(self, wire: Wire) -> None:
        """Close a connection and forget it."""
        with self._changed:
            self._wires.discard(wire)
            wire.close()

    def close(self) -> None:
        """End all connections and threads; may be called again."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), close() does not
        self._acceptor.join(WAIT_S)
        with self._changed:
            for wire in self._wires:
                wire.shutdown()
        for thread in self._threads:
            thread.join(WAIT_S)
        self._listener.close()
        assert not any(thread.is_alive() for thread in (self._acceptor, *self._threads))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                link = Link(self, self._hold(sock))
                thread = threading.Thread(target=link.run, name="fault-proxy link", daemon=True)
                thread.start()
                self._threads = [old for old in self._threads if old.is_alive()] + [thread]

    def _hold(self, sock: socket.socket) -> Wire:
        wire = Wire(sock, self._closing)
        with self._changed:
            self._wires.add(wire)
            if self._closing.is_set():
                wire.shutdown()
        return wire


class Link:
    """One client's connection, and the one to the server that serves it."""

    def __init__(self, proxy: FaultProxy, client: Wire) -> None:
        self.request = Message("")
        self._proxy = proxy
        self._client = client
        self._server: Wire | None = None
        self._number = 0
        self._is_read = False
        self._is_over = False

    def run(self) -> None:
        """Serve until one side has enough."""
        try:
            while not self._is_over and (head := self._client.receive_head()):
                self._begin(head).act(self)
        except (OSError, ValueError):
            pass  # a side is gone, or speaks no HTTP: the other learns by the end of its connection
        finally:
            self._drop_server()
            self._proxy.drop(self._client)

    def read(self, bytes_per_s: float | None = None) -> bytes:
        """Return the body of the request, taken from the client the first time."""
        if not self._is_read:
            self._is_read = True
            if self.request.header("expect").lower() == "100-continue":
                self._client.send(Message("HTTP/1.1 100 Continue"))
            self.request = self._client.receive_request(self.request, bytes_per_s)
        return self.request.body

    def ask(self) -> Message:
        """Return the answer of the server, which has acted by then."""
        self.read()
        if self._server is None:
            self._server = self._proxy.connect()
        self._server.send(self.request.without(*self._proxy.strip_headers))
        while (head := self._server.receive_head()) and head.status < 200:
            pass  # 100-continue was said already
        if head is None:
            raise ConnectionAbortedError
        answer = head if self._is_bare(head) else self._server.receive_answer(head)
        if head.is_last:
            self._drop_server()
        return answer

    def answer(self, answer: Message, *, bytes_per_s: float = 0.0, cut: int | None = None) -> None:
        """Send an answer; `cut` ends its body there, and the connection."""
        answer = self._dressed(answer)
        self._is_over |= cut is not None
        self._proxy.note_status(self._number, answer.status)
        answer = answer.bare() if self._is_bare(answer) else answer.measured()
        self._client.send(answer, cut=cut, bytes_per_s=bytes_per_s)

    def reset(self) -> None:
        """Close the client's connection with RST."""
        self._is_over = True
        self._client.reset()

    def hang(self) -> None:
        """Wait until the client or the proxy closes."""
        self._is_over = True
        self._client.wait_closed()

    def _begin(self, head: Message) -> Fault:
        method, target, _ = head.start.split(" ")
        path, _, query = target.partition("?")
        headers = {key.lower(): value for key, value in head.headers}
        self.request, self._is_read = head, False
        self._is_over = head.is_last
        asked = Request(method, unquote(path), query, headers, None)
        self._number, fault = self._proxy.note(asked)
        return fault

    def _is_bare(self, answer: Message) -> bool:
        """Whether an answer has no body, whatever its head says."""
        return self.request.start.startswith("HEAD ") or answer.status in (204, 304)

    def _dressed(self, answer: Message) -> Message:
        """Apply the standing modes to an answer."""
        shift = timedelta(seconds=self._proxy.clock_shift_s)
        if shift:
            for name in ("date", "last-modified"):
                answer = answer.edited(name, lambda old: _shifted_http(old, shift))
        if not answer.header("content-type").endswith("/xml"):
            return answer
        text = answer.body.decode("latin-1")  # whatever a fault made of it
        if shift:
            text = _MODIFIED.sub(lambda found: _shifted_iso(found[0], shift), text)
        if self._proxy.unsorted_listings and "list-type=2" in self.request.start:
            rows = _CONTENTS.findall(text)
            text = _CONTENTS.sub(lambda _: rows.pop(), text)
        return replace(answer, body=text.encode("latin-1"))

    def _drop_server(self) -> None:
        if self._server is not None:
            self._proxy.drop(self._server)
            self._server = None


def _shifted_http(date: str, shift: timedelta) -> str:
    return format_datetime(parsedate_to_datetime(date) + shift, usegmt=True)


def _shifted_iso(date: str, shift: timedelta) -> str:
    moved = datetime.fromisoformat(date.replace("Z", "+00:00")) + shift
    return moved.isoformat(timespec="milliseconds").replace("+00:00", "Z")
