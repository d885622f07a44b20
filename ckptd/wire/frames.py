"""Messages as bytes on a stream, and back: a length, then msgpack. No input or output here."""

from __future__ import annotations

from typing import Any

import msgspec

from ckptd.errors import ProtocolError
from ckptd.units import KIB, MIB, format_bytes
from ckptd.wire.messages import Message

MAX_HELLO_BYTES = 64 * KIB
MAX_FRAME_BYTES = 64 * MIB

_PREFIX_BYTES = 4
_REASON_CHARS = 200

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Return a message as it travels: its length in 4 bytes, big-endian, then msgpack.

    Raises:
        ProtocolError: if it holds something that msgpack cannot carry, or is larger than
            `MAX_FRAME_BYTES`, which the other end would refuse.
    """
    name = type(message).__name__
    try:
        body = _encoder.encode(message)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a {name} message cannot be sent: {_brief(error)}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a {name} message of {format_bytes(len(body))} cannot be sent: "
            f"at most {format_bytes(MAX_FRAME_BYTES)} travel at once"
        )
    return len(body).to_bytes(_PREFIX_BYTES, "big") + body


class FrameReader:
    """Cuts a stream of bytes into messages of one union.

    Memory held between calls is at most `max_bytes` and a prefix, whatever arrives: a length is
    judged before its frame is gathered. Each byte is moved a constant number of times, however the
    stream is split. Not for several threads at once.

    Attributes:
        max_bytes: the largest frame accepted, without its prefix. Start at `MAX_HELLO_BYTES` and
            raise it to `MAX_FRAME_BYTES` once the hello was accepted; it counts from the next
            `feed` on, so the other end waits for the welcome before it sends anything larger.
    """

    def __init__(self, type_: Any, *, max_bytes: int = MAX_HELLO_BYTES) -> None:
        self.max_bytes = max_bytes
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(type_)
        self._buffer = bytearray()
        self._is_broken = False

    @property
    def is_partial(self) -> bool:
        """Tell whether a frame has begun and not ended: the other end owes the rest of it."""
        return bool(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Take the next bytes and return the messages that they complete, in order.

        Raises:
            ProtocolError: at a frame that is empty, too long, or not exactly one known message.
                Messages before it in `data` are lost and the reader takes nothing more: the
                connection is to be closed.
        """
        if self._is_broken:
            raise ProtocolError("the stream was broken before; close the connection")
        self._buffer += data
        try:
            return self._cut()
        except ProtocolError:
            self._is_broken = True
            self._buffer = bytearray()
            raise

    def _cut(self) -> list[Message]:
        messages = []
        at = 0
        with memoryview(self._buffer) as view:
            while len(view) - at >= _PREFIX_BYTES:
                begin = at + _PREFIX_BYTES
                length = int.from_bytes(view[at:begin], "big")
                if not 0 < length <= self.max_bytes:
                    raise ProtocolError(
                        f"a frame of {length} bytes; 1 to {self.max_bytes} are accepted here"
                    )
                if len(view) < begin + length:
                    break
                messages.append(self._decode(view[begin : begin + length]))
                at = begin + length
        # CPython moves the start of a bytearray instead of its bytes, so this costs no copy.
        del self._buffer[:at]
        return messages

    def _decode(self, frame: memoryview) -> Message:
        with frame:
            try:
                return self._decoder.decode(frame)
            # Deep nesting, unhashable keys and numbers out of range surface as these.
            except (
                msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError
            ) as error:  # fmt: skip
                raise ProtocolError(f"not a message: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """Return the error's text, cut: it may quote what the other end sent."""
    text = str(error)
    return text if len(text) <= _REASON_CHARS else text[:_REASON_CHARS] + "..."
