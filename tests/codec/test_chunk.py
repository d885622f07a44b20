"""Chunks: what goes in comes out, and nothing else passes."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.codec import chunk as chunks
from ckptd.codec.blocks import PLANES32, RAW, ZSTD, planes_codec
from ckptd.codec.chunk import (
    BLOCK_BYTES,
    Decoder,
    Encoder,
    header_bytes,
    read_header,
    stored_bound,
)
from ckptd.codec.native import NATIVE
from ckptd.errors import CorruptError
from ckptd.model import dtypes
from ckptd.model.manifest import MAX_CHUNK_BYTES
from ckptd.units import MIB

ENCODER = Encoder()
DECODER = Decoder()


@pytest.fixture(scope="module", params=["C", "numpy"], autouse=True)
def _loops(request):
    """Run everything with the C loops and without them."""
    global ENCODER, DECODER
    native = NATIVE if request.param == "C" else None
    if request.param == "C" and native is None:
        pytest.skip("this package was built without a C compiler")
    ENCODER, DECODER = Encoder(native), Decoder(native)


FLOATS = [name for name in dtypes.BY_NAME if planes_codec(name) is not None]


def store(raw: bytes, dtype: str, mode="auto", copied=None):
    out = bytearray(stored_bound(len(raw)))
    encoded = ENCODER.encode(memoryview(raw), dtype, memoryview(out), mode=mode, copied=copied)
    return encoded, bytes(out[: encoded.stored_bytes])


def load(stored: bytes, dtype: str, raw_bytes: int, name: str) -> bytes:
    out = bytearray(raw_bytes)
    DECODER.decode(stored, memoryview(out), hash=name, dtype=dtype, raw_bytes=raw_bytes)
    return bytes(out)


def weights(dtype: str, raw_bytes: int, seed: int = 0) -> bytes:
    """Bytes like those of trained weights of a floating-point type."""
    count = raw_bytes // 2
    normal = np.random.default_rng(seed).standard_normal(count) * 0.02
    if dtype == "bfloat16":
        array = (normal.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        array = normal.astype({2: np.float16, 3: np.float32, 4: np.float64}[planes_codec(dtype)])
    return array.tobytes()[:raw_bytes]


def noise(raw_bytes: int) -> bytes:
    return np.random.default_rng(1).bytes(raw_bytes)


def codecs_of(stored: bytes, dtype: str, raw_bytes: int, name: str) -> list[int]:
    header = read_header(stored, hash=name, dtype=dtype, raw_bytes=raw_bytes)
    return [block.codec for block in header.blocks]


def forge(
    stored: bytes, dtype: str, raw_bytes: int, *edits: tuple[int, bytes]
) -> tuple[str, bytes]:
    """Edit a chunk at offsets, then make checksum and hash fit, as an attacker would."""
    forged = bytearray(stored)
    for offset, data in edits:
        forged[offset : offset + len(data)] = data
    size = header_bytes(raw_bytes)
    forged[size - 8 : size] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(forged[: size - 8])))
    digests = b"".join(forged[at + 5 : at + 21] for at in range(24, size - 8, 21))
    name = dtype.encode() + b"\0" + struct.pack("<Q", raw_bytes) + digests
    return xxhash.xxh3_128_hexdigest(name), bytes(forged)


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "zstd", "none"])
@pytest.mark.parametrize("dtype", sorted(dtypes.BY_NAME))
@pytest.mark.parametrize("raw_bytes", [16, 4096, BLOCK_BYTES, 2 * BLOCK_BYTES + 48])
def test_any_bytes_of_any_dtype_come_back(dtype, mode, raw_bytes):
    for raw in (noise(raw_bytes), bytes(raw_bytes), b"\x00\x3c\x01\x80" * (raw_bytes // 4)):
        encoded, stored = store(raw, dtype, mode)
        assert len(stored) <= stored_bound(raw_bytes)
        assert load(stored, dtype, raw_bytes, encoded.hash) == raw


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["auto", "zstd"])
def test_weights_are_stored_as_planes_and_come_back(dtype, mode):
    raw = weights(dtype, BLOCK_BYTES + 8000)
    encoded, stored = store(raw, dtype, mode)
    assert codecs_of(stored, dtype, len(raw), encoded.hash) == [planes_codec(dtype)] * 2
    assert len(stored) < 0.95 * len(raw)
    assert load(stored, dtype, len(raw), encoded.hash) == raw


@pytest.mark.parametrize("dtype", FLOATS)
def test_words_without_a_sign_save_its_bit(dtype):
    raw = weights(dtype, BLOCK_BYTES + 8000)
    word = np.dtype(f"<u{chunks_word(dtype)}")
    bare = np.frombuffer(raw, word) & word.type((1 << (8 * word.itemsize - 1)) - 1)
    encoded, stored = store(bare.tobytes(), dtype)
    assert codecs_of(stored, dtype, len(raw), encoded.hash) == [planes_codec(dtype) + 3] * 2
    assert load(stored, dtype, len(raw), encoded.hash) == bare.tobytes()
    signed = store(raw, dtype)[0].stored_bytes
    assert signed - encoded.stored_bytes == pytest.approx(len(raw) / word.itemsize / 8, rel=0.02)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_sign_that_the_sample_did_not_show_is_kept(dtype):
    size = chunks_word(dtype)
    word = np.dtype(f"<u{size}")
    top = word.type(1 << (8 * size - 1))
    words = np.frombuffer(weights(dtype, BLOCK_BYTES), word) & ~top
    words[BLOCK_BYTES // size - 1] |= top
    encoded, stored = store(words.tobytes(), dtype)
    assert codecs_of(stored, dtype, BLOCK_BYTES, encoded.hash) == [planes_codec(dtype)]
    assert load(stored, dtype, BLOCK_BYTES, encoded.hash) == words.tobytes()


def chunks_word(dtype: str) -> int:
    """Return the bytes of a word of a floating-point type."""
    return {2: 2, 3: 4, 4: 8}[planes_codec(dtype)]


def test_weights_shrink_as_much_as_measured():
    for dtype, ratio in (("bfloat16", 0.68), ("float32", 0.845)):
        raw = weights(dtype, BLOCK_BYTES)
        assert len(store(raw, dtype)[1]) < ratio * len(raw)


@given(
    words=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    repeat=st.integers(1, 300),
    dtype=st.sampled_from(FLOATS),
    mode=st.sampled_from(["auto", "zstd", "none"]),
)
@settings(max_examples=150, deadline=None)
def test_every_bit_pattern_survives(words, repeat, dtype, mode):
    raw = np.tile(np.array(words, "<u8"), repeat * 2).tobytes()
    encoded, stored = store(raw, dtype, mode)
    assert load(stored, dtype, len(raw), encoded.hash) == raw


def test_zeros_shrink_to_almost_nothing():
    for dtype in ("float32", "bfloat16", "float64", "int64", "bool"):
        assert len(store(bytes(4 * MIB), dtype)[1]) < 2000


def test_noise_is_left_raw():
    for dtype in ("float32", "uint8"):
        raw = noise(BLOCK_BYTES)
        encoded, stored = store(raw, dtype, "auto")
        assert codecs_of(stored, dtype, len(raw), encoded.hash) == [RAW]


def test_each_block_has_the_codec_that_suits_it():
    raw = noise(BLOCK_BYTES) + weights("float32", BLOCK_BYTES) + bytes(BLOCK_BYTES)
    encoded, stored = store(raw, "float32")
    assert codecs_of(stored, "float32", len(raw), encoded.hash) == [RAW, PLANES32, ZSTD]
    assert load(stored, "float32", len(raw), encoded.hash) == raw


def test_integers_are_stored_as_zstd():
    raw = np.arange(BLOCK_BYTES // 8, dtype="<i8").tobytes()
    encoded, stored = store(raw, "int64")
    assert codecs_of(stored, "int64", len(raw), encoded.hash) == [ZSTD]


@pytest.mark.parametrize("looks", ["zeros", "weights"])
def test_a_sample_that_misleads_costs_nothing(looks):
    raw = bytearray(noise(BLOCK_BYTES))  # all but the runs that are sampled
    for at in range(0, BLOCK_BYTES, BLOCK_BYTES // 4):
        raw[at : at + 2048] = bytes(2048) if looks == "zeros" else weights("float32", 2048, at)
    encoded, stored = store(bytes(raw), "float32")
    assert codecs_of(stored, "float32", len(raw), encoded.hash) == [RAW]
    assert load(stored, "float32", len(raw), encoded.hash) == bytes(raw)


def test_small_savings_are_taken_only_where_asked_for():
    some_zeros = np.frombuffer(noise(BLOCK_BYTES), np.uint8).copy()
    some_zeros[np.random.default_rng(2).random(BLOCK_BYTES) < 0.07] = 0  # saves about 2.4 %
    raw = some_zeros.tobytes()
    for mode, codec in (("auto", RAW), ("zstd", ZSTD), ("none", RAW)):
        encoded, stored = store(raw, "uint8", mode)
        assert codecs_of(stored, "uint8", len(raw), encoded.hash) == [codec]


def test_a_block_of_another_length_than_the_header_says_is_refused():
    raw = weights("float32", 2048)
    encoded, stored = store(raw, "float32")
    header = read_header(stored, hash=encoded.hash, dtype="float32", raw_bytes=2048)
    part, out = stored[header.blocks[0].stored_offset :], memoryview(bytearray(2048))
    longer = header.blocks[0]._replace(stored_bytes=len(part) + 1)
    lying = chunks.Header("float32", 2048, (longer,), encoded.hash)
    DECODER.decode_block(header, 0, part, out)
    for bad_header, bad in ((header, part + b"\0"), (header, part[:-1]), (lying, part)):
        with pytest.raises(CorruptError, match="bytes"):
            DECODER.decode_block(bad_header, 0, bad, out)
    with pytest.raises(ValueError, match="for a block"):
        DECODER.decode_block(header, 0, part, out[:-1])


def test_the_hash_names_the_content_and_not_the_codec():
    raw = weights("float32", 8192)
    hashes = {store(raw, "float32", mode)[0].hash for mode in ("auto", "zstd", "none")}
    assert len(hashes) == 1
    assert store(raw, "int32")[0].hash not in hashes
    assert store(raw[:4096], "float32")[0].hash not in hashes


def test_coding_twice_gives_the_same_bytes():
    raw = weights("bfloat16", 2 * BLOCK_BYTES)
    first = store(raw, "bfloat16")
    store(noise(4096), "float64")  # scratch of another chunk in between
    assert store(raw, "bfloat16") == first


def test_source_and_target_may_lie_at_any_address():
    raw = weights("float32", BLOCK_BYTES + 4)
    shifted = memoryview(b"x" + raw)[1:]
    out = memoryview(bytearray(3 + stored_bound(len(raw))))[3:]
    encoded = ENCODER.encode(shifted, "float32", out, mode="auto")
    back = memoryview(bytearray(1 + len(raw)))[1:]
    DECODER.decode(
        out[: encoded.stored_bytes], back, hash=encoded.hash, dtype="float32", raw_bytes=len(raw)
    )
    assert back == raw


def test_one_block_can_be_read_alone():
    raw = weights("float32", 3 * BLOCK_BYTES)
    encoded, stored = store(raw, "float32")
    head = stored[: header_bytes(len(raw))]
    header = read_header(head, hash=encoded.hash, dtype="float32", raw_bytes=len(raw))
    assert header.stored_bytes == encoded.stored_bytes
    block = header.blocks[1]
    out = bytearray(BLOCK_BYTES)
    part = stored[block.stored_offset : block.stored_offset + block.stored_bytes]
    DECODER.decode_block(header, 1, part, memoryview(out))
    assert out == raw[BLOCK_BYTES : 2 * BLOCK_BYTES]


def test_arguments_that_cannot_be_stored_are_refused():
    out = memoryview(bytearray(8192))
    for raw, dtype in ((b"", "uint8"), (b"abc", "float32"), (b"abcd", "float31")):
        with pytest.raises(ValueError, match="cannot store"):
            ENCODER.encode(memoryview(raw), dtype, out, mode="auto")
    with pytest.raises(ValueError, match="cannot store"):
        ENCODER.encode(memoryview(bytes(8192)), "uint8", out, mode="none")


# --- the source changes while it is read -------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "zstd", "none"])
def test_d2_a_source_that_changes_after_the_copy_changes_nothing(mode):
    original = weights("float32", 2 * BLOCK_BYTES)
    source = bytearray(original)
    turn = 0

    def overwrite() -> None:  # the writer comes right after each copy, in place of what was copied
        nonlocal turn
        source[turn * BLOCK_BYTES : (turn + 1) * BLOCK_BYTES] = noise(BLOCK_BYTES)
        turn += 1

    out = memoryview(bytearray(stored_bound(len(source))))
    encoded = ENCODER.encode(memoryview(source), "float32", out, mode=mode, copied=overwrite)
    assert turn == 2
    stored = bytes(out[: encoded.stored_bytes])
    assert load(stored, "float32", len(original), encoded.hash) == original


def test_d2_a_slot_that_moved_on_ends_the_chunk_and_not_the_encoder():
    def moved() -> None:
        raise InterruptedError

    raw = weights("float32", BLOCK_BYTES)
    with pytest.raises(InterruptedError):
        store(raw, "float32", copied=moved)
    encoded, stored = store(raw, "float32")
    assert load(stored, "float32", len(raw), encoded.hash) == raw


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_d2_every_flipped_bit_is_found(mode):
    raw = weights("float32", 2048)
    encoded, stored = store(raw, "float32", mode)
    for at in range(len(stored)):
        bad = bytearray(stored)
        bad[at] ^= 1 << (at % 8)
        try:
            back = load(bytes(bad), "float32", len(raw), encoded.hash)
        except CorruptError:
            continue
        # Unused bits of a zstd frame may carry anything; the bytes are right all the same.
        assert back == raw
        assert at >= header_bytes(len(raw)) + 3 * len(raw) // 4


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_every_truncation_and_extension_is_found(mode):
    raw = weights("float32", 2048)
    encoded, stored = store(raw, "float32", mode)
    for bad in [stored[:n] for n in range(len(stored))] + [stored + b"\0", stored + stored]:
        with pytest.raises(CorruptError):
            load(bad, "float32", len(raw), encoded.hash)


def test_j6_a_chunk_under_another_name_or_type_or_length_is_refused():
    raw = weights("float32", 2048)
    encoded, stored = store(raw, "float32")
    other = store(noise(2048), "float32")[0]
    for name, dtype, raw_bytes in (
        (other.hash, "float32", 2048),
        (encoded.hash, "int32", 2048),
        (encoded.hash, "float32", 2044),
        (encoded.hash, "float32", 2 * MIB),
        (encoded.hash, "float31", 2048),
        (encoded.hash.upper(), "float32", 2048),
        ("", "float32", 2048),
        (encoded.hash, "float32", 0),
        (encoded.hash, "float32", -4),
        (encoded.hash, "float32", 1 << 60),
    ):
        with pytest.raises(CorruptError):
            read_header(stored, hash=name, dtype=dtype, raw_bytes=raw_bytes)


def test_a_forged_header_is_refused_although_checksum_and_name_fit():
    raw = weights("float32", 2048)
    encoded, stored = store(raw, "float32")
    assert forge(stored, "float32", 2048) == (encoded.hash, stored)
    for edit in (
        (8, b"\2\0"),  # a later version
        (10, b"\5"),  # int32
        (11, b"\1"),  # the reserved byte
        (12, b"\2\0\0\0"),  # two blocks
        (16, struct.pack("<Q", 1 << 63)),
        (24, b"\2"),  # planes of another word size
        (24, b"\0"),  # raw, yet shorter
        (24, b"\7"),
        (25, struct.pack("<I", 0)),
        (25, struct.pack("<I", 2048)),  # coded, yet not shorter
        (25, struct.pack("<I", 0xFFFFFFFF)),
    ):
        name, bad = forge(stored, "float32", 2048, edit)
        with pytest.raises(CorruptError):
            read_header(bad, hash=name, dtype="float32", raw_bytes=2048)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_forged_chunks_decode_to_what_the_digest_says_or_not_at_all(data):
    raw = weights("float32", 2048)
    _, stored = store(raw, "float32")
    edits = data.draw(
        st.lists(
            st.tuples(st.integers(24, len(stored) - 1), st.binary(min_size=1, max_size=8)),
            max_size=4,
        )
    )
    name, bad = forge(stored, "float32", 2048, *edits)
    bad = bad[: data.draw(st.integers(len(bad) - 40, len(bad)))]
    with contextlib.suppress(CorruptError):
        assert load(bad, "float32", 2048, name) == raw


@given(st.binary(max_size=200))
def test_any_bytes_as_a_chunk_are_corrupt(data):
    with pytest.raises(CorruptError):
        load(data, "uint8", 100, "0" * 32)
    with pytest.raises(CorruptError):
        load(b"CKPTDCH1" + data, "uint8", 100, "0" * 32)


def test_j7_a_pickle_or_a_zip_in_place_of_a_chunk_is_corrupt():
    for magic in (b"\x80\x05\x95", b"PK\x03\x04", b"\x7fELF", b"\x28\xb5\x2f\xfd"):
        with pytest.raises(CorruptError, match="does not start"):
            load(magic + bytes(500), "uint8", 100, "0" * 32)


# --- zstd frames inside of blocks --------------------------------------------------------------


def hostile_frames(size: int) -> dict[str, bytes]:
    """Frames that must not pass for a block of `size` bytes."""
    compress = zstandard.ZstdCompressor(level=1).compress
    plain = bytes(size)
    good = compress(plain)
    dictionary = zstandard.ZstdCompressionDict(noise(4096), dict_type=1)
    # Made by hand: states `size` and a window of 128 MiB, then one run-length block.
    wide = b"\x28\xb5\x2f\xfd\x40" + bytes([17 << 3]) + struct.pack("<H", size - 256)
    wide += struct.pack("<I", size << 3 | 3)[:3] + b"\0"
    assert len(zstandard.ZstdDecompressor().decompress(wide)) == size
    return {
        "bomb": compress(bytes(16 * MIB)),
        "states less": compress(bytes(size - 1)),
        "states more": compress(bytes(size + 1)),
        "giant": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 62),
        "unknown size": zstandard.ZstdCompressor(write_content_size=False).compress(plain),
        "wide window": wide,
        "two frames": compress(plain[: size // 2]) + compress(plain[size // 2 :]),
        "frame twice": good + good,
        "trailing junk": good + b"\0",
        "skippable first": b"\x50\x2a\x4d\x18\4\0\0\0abcd" + good,
        "skippable last": good + b"\x50\x2a\x4d\x18\4\0\0\0abcd",
        "skippable only": b"\x50\x2a\x4d\x18\4\0\0\0abcd",
        "dictionary": zstandard.ZstdCompressor(dict_data=dictionary).compress(noise(64) * 32),
        "truncated": good[:-1],
        "header only": good[:6],
        "empty": b"",
        "lies": good[:5] + struct.pack("<H", size - 256 + 1) + good[7:],
    }


FRAMES = hostile_frames(2048)


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_s3_x4_j5_a_hostile_frame_in_a_block_is_refused(name):
    frame = FRAMES[name]
    if not 0 < len(frame) < 2048:
        frame = frame[:2047] or b"\0"
    rows = [
        (ZSTD, frame, "uint8", 2048),
        (PLANES32, bytes(6144) + frame, "float32", 8192),
    ]
    for codec, stored, dtype, raw_bytes in rows:
        digest = xxhash.xxh3_128_digest(bytes(raw_bytes))
        header = chunks.Header(
            dtype, raw_bytes, (chunks.Block(codec, 53, len(stored), digest),), "0" * 32
        )
        with pytest.raises(CorruptError):
            DECODER.decode_block(header, 0, stored, memoryview(bytearray(raw_bytes)))


def test_the_frame_that_the_hostile_ones_are_made_of_is_fine():
    good = zstandard.ZstdCompressor(level=1).compress(bytes(2048))
    digest = xxhash.xxh3_128_digest(bytes(2048))
    header = chunks.Header("uint8", 2048, (chunks.Block(ZSTD, 53, len(good), digest),), "0" * 32)
    DECODER.decode_block(header, 0, good, memoryview(bytearray(2048)))


def test_header_and_bound_depend_on_the_raw_length_alone():
    assert header_bytes(1) == header_bytes(BLOCK_BYTES) == 53
    assert header_bytes(BLOCK_BYTES + 1) == 74
    assert stored_bound(MAX_CHUNK_BYTES) == header_bytes(MAX_CHUNK_BYTES) + MAX_CHUNK_BYTES
