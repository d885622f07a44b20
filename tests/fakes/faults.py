"""What may become of a request on its way to an S3 server and back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.client import responses
from typing import TYPE_CHECKING

from tests.fakes.http_wire import Message

if TYPE_CHECKING:
    from tests.fakes.fault_proxy import Link


class Fault:
    """What becomes of one request; this one leaves it alone. `act` runs in a thread of the proxy."""

    def act(self, link: Link) -> None:
        link.answer(link.ask())


@dataclass(frozen=True)
class Status(Fault):
    """Answer with an error of S3, the server unasked."""

    code: int
    xml_code: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def act(self, link: Link) -> None:
        link.read()
        link.answer(_made(self.code, _error(self.xml_code), self.headers))


@dataclass(frozen=True)
class ResetBefore(Fault):
    """Reset the connection before the server sees the request; `reads` its body first."""

    reads: bool = False

    def act(self, link: Link) -> None:
        if self.reads:
            link.read()
        link.reset()


@dataclass(frozen=True)
class ResetAfter(Fault):
    """Let the server act, then reset the connection in place of the answer."""

    def act(self, link: Link) -> None:
        link.ask()
        link.reset()


@dataclass(frozen=True)
class Silent(Fault):
    """Never answer, the server unasked. Without `reads` not even the body is read, or continued."""

    reads: bool = True

    def act(self, link: Link) -> None:
        if self.reads:
            link.read()
        link.hang()


@dataclass(frozen=True)
class Slow(Fault):
    """Trickle the body of the answer; with `reads`, take the request's body slowly instead."""

    bytes_per_s: float
    reads: bool = False

    def act(self, link: Link) -> None:
        if self.reads:
            link.read(self.bytes_per_s)
        link.answer(link.ask(), bytes_per_s=0.0 if self.reads else self.bytes_per_s)


@dataclass(frozen=True)
class Truncated(Fault):
    """End the answer's body before its Content-Length, and close the connection."""

    keep: float = 0.5

    def act(self, link: Link) -> None:
        answer = link.ask()
        link.answer(answer, cut=int(len(answer.body) * self.keep))


@dataclass(frozen=True)
class Short(Fault):
    """Answer with fewer bytes, as if that were all; Content-Range keeps telling of the others."""

    keep: float = 0.5
    adapts_range: bool = False

    def act(self, link: Link) -> None:
        answer = link.ask()
        body = answer.body[: int(len(answer.body) * self.keep)]
        if self.adapts_range:
            answer = answer.edited("content-range", lambda old: _shorter(old, len(body)))
        link.answer(replace(answer, body=body))


@dataclass(frozen=True)
class Flip(Fault):
    """Flip one bit of the answer's body, `at` a share of its length."""

    at: float = 0.5

    def act(self, link: Link) -> None:
        link.answer(_flipped(link.ask(), self.at))


@dataclass(frozen=True)
class FlipRequest(Fault):
    """Flip one bit of the request's body on its way to the server."""

    at: float = 0.5

    def act(self, link: Link) -> None:
        link.read()
        link.request = _flipped(link.request, self.at)
        link.answer(link.ask())


@dataclass(frozen=True)
class OkWithError(Fault):
    """Answer 200 and an error in the body, as S3 may do to copies and completes; server unasked."""

    xml_code: str

    def act(self, link: Link) -> None:
        link.read()
        link.answer(_made(200, _error(self.xml_code)))


@dataclass(frozen=True)
class DeleteErrors(Fault):
    """Answer `POST ?delete` with 200 and an error for each key, the server unasked."""

    xml_code: str

    def act(self, link: Link) -> None:
        keys = re.findall(r"<Key>.*?</Key>", link.read().decode(), re.DOTALL)
        rows = "".join(_error(self.xml_code, key) for key in keys)
        link.answer(_made(200, f"<DeleteResult>{rows}</DeleteResult>"))


def _made(status: int, xml: str, headers: dict[str, str] | None = None) -> Message:
    """Make an answer that no server gave."""
    fixed = {"Content-Type": "application/xml", "Date": formatdate(usegmt=True)}
    return Message(
        f"HTTP/1.1 {status} {responses.get(status, 'Unknown')}",
        tuple({**fixed, **(headers or {})}.items()),
        f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode(),
    )


def _error(code: str, key: str = "") -> str:
    return f"<Error>{key}<Code>{code}</Code><Message>made by a test</Message></Error>"


def _flipped(message: Message, at: float) -> Message:
    body = bytearray(message.body)
    if body:
        body[min(int(len(body) * at), len(body) - 1)] ^= 0x10
    return replace(message, body=bytes(body))


def _shorter(content_range: str, size: int) -> str:
    """Let "bytes FIRST-LAST/ALL" tell of `size` bytes."""
    first, _, rest = content_range.removeprefix("bytes ").partition("-")
    return f"bytes {first}-{int(first) + size - 1}/{rest.partition('/')[2]}"
