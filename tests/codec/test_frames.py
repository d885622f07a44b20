"""The gate before zstd, by itself: each reason to refuse is its own."""

from __future__ import annotations

import struct

import pytest
import zstandard

from ckptd.codec.frames import frame_bytes, unpack_frame
from ckptd.errors import CorruptError

# Frame headers by hand (RFC 8878, 3.1.1.1): 8-byte content size, a window descriptor of 1 KiB.
HEADER = b"\x28\xb5\x2f\xfd\xc0\x00"


def claim(size: int, tail: bytes) -> bytes:
    return HEADER + struct.pack("<Q", size) + tail


def test_a_frame_says_how_long_it_is():
    data = zstandard.ZstdCompressor().compress(bytes(5000))
    assert frame_bytes(data, max_bytes=5000) == 5000
    assert frame_bytes(memoryview(data), max_bytes=1 << 30) == 5000
    unpacked = unpack_frame(zstandard.ZstdDecompressor(), data, min_bytes=5000, max_bytes=5000)
    assert unpacked == bytes(5000)


def test_s3_x4_a_claim_that_the_length_of_the_frame_belies_is_refused():
    rest = bytes(18)
    assert frame_bytes(claim(1 << 20, rest), max_bytes=1 << 30) == 1 << 20
    with pytest.raises(CorruptError, match="too large"):
        frame_bytes(claim((1 << 20) + 1, rest), max_bytes=1 << 20)
    with pytest.raises(CorruptError, match="too large"):
        frame_bytes(claim(1 << 26, rest), max_bytes=1 << 30)
    with pytest.raises(CorruptError, match="too large"):
        frame_bytes(claim((1 << 64) - 1, rest), max_bytes=1 << 62)


def test_s3_x4_the_best_that_zstd_can_do_is_not_belied():
    data = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    assert frame_bytes(data, max_bytes=64 << 20) == 64 << 20


def test_s3_x4_a_frame_that_names_a_dictionary_is_refused():
    named = b"\x28\xb5\x2f\xfd\x21\x07\x05" + b"\x29\0\0hello"
    with pytest.raises(CorruptError, match="dictionary"):
        frame_bytes(named, max_bytes=100)


def test_s3_x4_only_the_plain_magic_is_a_frame():
    for data in (b"", b"\x28\xb5\x2f", b"\x50\x2a\x4d\x18\0\0\0\0", b"\x27\xb5\x2f\xfd" + bytes(9)):
        with pytest.raises(CorruptError, match="not a zstd frame"):
            frame_bytes(data, max_bytes=100)
    with pytest.raises(CorruptError, match="header"):
        frame_bytes(b"\x28\xb5\x2f\xfd\xc0", max_bytes=100)
