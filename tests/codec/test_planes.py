"""Planes: the C loops and numpy's do the same, and what is split can be joined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.codec import native
from ckptd.codec.native import NATIVE
from ckptd.codec.planes import WORD, Planes

needs_c = pytest.mark.skipif(NATIVE is None, reason="this package was built without a C compiler")


def split(planes: Planes, words: np.ndarray, offset: int = 0) -> tuple[bytes, bytes] | None:
    """Return mantissa planes and exponents; the mantissa is written at an odd address if asked."""
    room = np.zeros(offset + words.nbytes + 64, np.uint8)
    exponent = np.zeros(len(words), np.uint8)
    if not planes.split(words, room[offset : offset + words.nbytes + 8], exponent):
        return None
    size = planes.mantissa_bytes(len(words))
    return room[offset : offset + size].tobytes(), exponent.tobytes()


def join(planes: Planes, parts: tuple[bytes, bytes]) -> np.ndarray:
    mantissa, exponent = (np.frombuffer(part, np.uint8) for part in parts)
    words = np.zeros(len(exponent), WORD[planes.word_bytes])
    planes.join(mantissa, exponent, words)
    return words


def words_of(seed: int, count: int, word_bytes: int, *, is_signed: bool) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 1 << 63, count, np.uint64)
    words = (raw << np.uint64(1) if is_signed else raw) >> np.uint64(64 - 8 * word_bytes)
    return words.astype(WORD[word_bytes])


@given(
    seed=st.integers(0, 1 << 30),
    count=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 4097, 65_536, 65_543, 131_072])),
    word_bytes=st.sampled_from([2, 4, 8]),
    is_signed=st.booleans(),
    offset=st.integers(0, 9),
)
@settings(deadline=None)
def test_what_is_split_is_joined_alike_with_and_without_c(
    seed, count, word_bytes, is_signed, offset
):
    words = words_of(seed, count, word_bytes, is_signed=is_signed)
    portable = Planes(word_bytes, is_signed=is_signed, native=None)
    parts = split(portable, words, offset)
    assert parts is not None
    assert len(parts[0]) == portable.mantissa_bytes(count)
    assert np.array_equal(join(portable, parts), words)
    if NATIVE is not None:
        quick = Planes(word_bytes, is_signed=is_signed)
        assert split(quick, words, offset) == parts
        assert np.array_equal(join(quick, parts), words)


@pytest.mark.parametrize("loops", [pytest.param(NATIVE, marks=needs_c, id="C"), None])
@pytest.mark.parametrize("word_bytes", [2, 4, 8])
def test_a_sign_anywhere_is_seen(word_bytes, loops):
    planes = Planes(word_bytes, is_signed=False, native=loops)
    for place in (0, 1, 63, 64, 1000, 1002):
        words = words_of(1, 1003, word_bytes, is_signed=False)
        words[place] |= WORD[word_bytes].type(1 << (8 * word_bytes - 1))
        assert split(planes, words) is None


def test_the_exponent_is_a_plane_by_itself():
    words = np.array([1.0, -2.0, 0.5, 3.0], np.float32).view(np.uint32)
    assert split(Planes(4, native=None), words) == (
        bytes.fromhex("0000 0100 0000 0000  00 00 00 80"), bytes.fromhex("7f 80 7e 80")
    )  # fmt: skip


@needs_c
def test_the_library_that_was_built_is_the_one_in_use():
    assert native.load() is not None
