from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import ProtocolError
from ckptd.model.columns import Columns
from ckptd.model.tensor import Tensor
from ckptd.wire import frames
from ckptd.wire.frames import FrameReader, encode
from ckptd.wire.messages import (
    PROTOCOL,
    Arena,
    Ask,
    ChunkPlan,
    Forfeit,
    FromDaemon,
    FromTrainer,
    Handoff,
    Hello,
    Message,
    Recipe,
    Report,
)

HELLO = Hello(
    protocol=PROTOCOL, root="s3://b/r", storage_options={"key": "k"}, attempt=1, token="t",
    rank=0, world_size=2, compression="auto", commit_timeout_s=60.0,
)  # fmt: skip
RECIPE = Recipe(
    1, None, "0" * 32, (Tensor("w", "float32", (2, 3), "parameter", True, "cpu"),), {},
    (ChunkPlan("float32", 4096, 24),), Columns(),
)  # fmt: skip
HANDOFF = Handoff(5, 1, 1, 0, 1, 1, b"{}", b"", {"loss": 1.5}, None, 1e9)

counts = st.integers(0, 1 << 48)
some_messages = st.lists(
    st.one_of(
        st.just(HELLO), st.just(RECIPE), st.just(HANDOFF), st.just(Ask()),
        st.builds(Arena, counts, st.integers(1, 64), counts),
        st.builds(Forfeit, counts, st.integers(1, 1 << 48), st.just("failed"), st.text(max_size=50)),
    ), max_size=6,
)  # fmt: skip


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def read(data: bytes, type_: object = FromTrainer) -> list[Message]:
    return FrameReader(type_).feed(data)


@settings(max_examples=60, deadline=None)
@given(some_messages, st.data())
def test_messages_survive_any_split_of_the_stream(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader(FromTrainer)
    got = []
    for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += reader.feed(stream[a:b])
    assert got == sent
    assert not reader.is_partial


def test_messages_survive_byte_by_byte() -> None:
    reader = FrameReader(FromTrainer)
    stream = encode(HELLO) + encode(HANDOFF)
    got = [message for i in range(len(stream)) for message in reader.feed(stream[i : i + 1])]
    assert got == [HELLO, HANDOFF]


def test_a_message_comes_as_soon_as_its_last_byte_and_the_rest_is_partial() -> None:
    reader = FrameReader(FromTrainer)
    stream = encode(HELLO)
    assert reader.feed(stream[:-1]) == []
    assert reader.is_partial
    assert reader.feed(stream[-1:] + encode(HANDOFF)[:3]) == [HELLO]
    assert reader.is_partial


HELLO_BODY = encode(HELLO)[4:]
VALUE = b"\xa3key\xa1k"  # the options' only entry
HOSTILE = {
    "zero length": b"\0\0\0\0",
    "length over the limit": (frames.MAX_HELLO_BYTES + 1).to_bytes(4, "big"),
    "length of 4 GiB": b"\xff\xff\xff\xff",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "never used opcode": framed(b"\xc1"),
    "json": framed(b'{"say":"ask"}'),
    "empty map": framed(b"\x80"),
    "trailing garbage": framed(HELLO_BODY + b"\0"),
    "two messages in one frame": framed(HELLO_BODY + HELLO_BODY),
    "cut inside": framed(HELLO_BODY[:-1]),
    "array that claims 4 billion": framed(b"\xdd\xff\xff\xff\xff"),
    "string that claims 4 GB": framed(b"\xdb\xff\xff\xff\xffab"),
    "nested 50,000 deep": framed(b"\x91" * 50_000),
    "unknown tag": framed(msgspec.msgpack.encode({"say": "nope"})),
    "tag of the other side": encode(Report(b"{}")),
    "unknown field": framed(msgspec.msgpack.encode({"say": "ask", "more": 1})),
    "no tag": framed(msgspec.msgpack.encode({"arena": 1})),
    "bool for a number": framed(
        msgspec.msgpack.encode({"say": "arena", "arena": True, "slots": 1, "slot_bytes": 1})
    ),
    "number out of range": framed(
        msgspec.msgpack.encode({"say": "arena", "arena": 1 << 60, "slots": 1, "slot_bytes": 1})
    ),
    "too many slots": framed(
        msgspec.msgpack.encode({"say": "arena", "arena": 1, "slots": 65, "slot_bytes": 1})
    ),
    "options nested too deep": framed(
        HELLO_BODY.replace(VALUE, b"\xa3key" + b"\x91" * 50_000 + b"\xc0")
    ),
    "options with a list as key": framed(HELLO_BODY.replace(VALUE, b"\xa3key\x81\x81\x01\x01\x01")),
    "options that claim 4 billion": framed(HELLO_BODY.replace(VALUE, b"\xa3key\xdd\xff\xff\xff\xff")),
    "broken utf-8": framed(HELLO_BODY.replace(VALUE, b"\xa3key\xa1\xff")),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_m5_hostile_bytes_are_a_protocol_error(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(HOSTILE[name])
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=300))
def test_m5_random_bytes_are_waited_for_or_refused(data: bytes) -> None:
    reader = FrameReader(FromTrainer)
    try:
        assert reader.feed(data) == []
    except ProtocolError:
        assert not reader.is_partial
    else:
        assert reader.is_partial == bool(data)


@pytest.mark.parametrize("name", ["length of 4 GiB", "array that claims 4 billion"])
def test_s2_what_is_claimed_is_not_allocated(name: str) -> None:
    reader = FrameReader(FromTrainer)
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        reader.feed(HOSTILE[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_s2_an_announced_frame_holds_only_what_came() -> None:
    reader = FrameReader(FromTrainer, max_bytes=frames.MAX_FRAME_BYTES)
    tracemalloc.start()
    reader.feed(frames.MAX_FRAME_BYTES.to_bytes(4, "big") + b"\0" * 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.is_partial
    assert peak < 1 << 20


def test_a_frame_of_exactly_the_limit_passes_and_one_byte_more_does_not() -> None:
    data = encode(Report(b"x" * 1000))
    assert len(FrameReader(FromDaemon, max_bytes=len(data) - 4).feed(data)) == 1
    with pytest.raises(ProtocolError):
        FrameReader(FromDaemon, max_bytes=len(data) - 5).feed(data[:4])


def test_the_limit_can_be_raised_after_the_hello() -> None:
    large = encode(Report(b"x" * (1 << 20)))
    reader = FrameReader(FromDaemon)
    reader.max_bytes = frames.MAX_FRAME_BYTES
    assert reader.feed(large) == [Report(b"x" * (1 << 20))]


def test_a_broken_reader_takes_nothing_more() -> None:
    reader = FrameReader(FromTrainer)
    with pytest.raises(ProtocolError):
        reader.feed(b"\0\0\0\0")
    with pytest.raises(ProtocolError):
        reader.feed(encode(HELLO))


def test_bytes_are_not_moved_again_for_each_piece() -> None:
    # 4 MiB in pieces of 64 bytes: a reader that joins anew each time would copy 137 GB here.
    stream = memoryview(encode(Report(b"x" * (4 << 20))))
    reader = FrameReader(FromDaemon, max_bytes=frames.MAX_FRAME_BYTES)
    got = []
    for at in range(0, len(stream), 64):
        got += reader.feed(stream[at : at + 64])
    assert len(got) == 1


@pytest.mark.parametrize("value", [object(), 1 << 70, "\ud800"])
def test_what_msgpack_cannot_carry_is_refused_at_the_sender(value: object) -> None:
    with pytest.raises(ProtocolError, match="Hello message cannot be sent"):
        encode(msgspec.structs.replace(HELLO, storage_options={"key": value}))


def test_a_message_too_large_is_refused_at_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ProtocolError, match="at most"):
        encode(Report(b"x" * 101))
