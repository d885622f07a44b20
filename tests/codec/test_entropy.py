"""Entropy coding: any bytes come back through zstd itself, and nothing is written out of bounds."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptd.codec.entropy import EntropyCoder
from ckptd.codec.frames import unpack_frame
from ckptd.codec.native import NATIVE

GUARD = 0xEE
LOOPS = [
    pytest.param(
        NATIVE, id="C",
        marks=pytest.mark.skipif(NATIVE is None, reason="built without a C compiler"),
    ),
    pytest.param(None, id="zstd"),
]  # fmt: skip
CODERS = {None: EntropyCoder(None), NATIVE: EntropyCoder(NATIVE)}


def code(coder: EntropyCoder, plain: np.ndarray, room: int) -> bytes:
    """Code into exactly `room` bytes; b"" if that does not work."""
    out = np.full(room + 64, GUARD, np.uint8)
    size = coder.encode(plain, out[:room])
    assert (out[room:] == GUARD).all()
    return out[:size].tobytes()


def unpack(frame: bytes, size: int) -> bytes:
    return unpack_frame(
        zstandard.ZstdDecompressor(), frame, min_bytes=size, max_bytes=size
    )  # fmt: skip


def drawn(seed: int, size: int, shape: str, width: float) -> np.ndarray:
    """Bytes of many distributions: what makes codes long, tables hard to describe, blocks differ."""
    dice = np.random.default_rng(seed)
    if shape == "even":
        found = dice.integers(0, 1 + int(width * 255), size)
    elif shape == "normal":
        found = np.clip(dice.standard_normal(size) * width * 60 + dice.uniform(0, 255), 0, 255)
    elif shape == "steep":  # each 1.6 times as frequent as the one before: the longest codes
        odds = 1.6 ** np.arange(2 + int(width * 40))
        found = dice.choice(len(odds), size, p=odds / odds.sum()) + dice.integers(0, 200)
    elif shape == "few":
        found = np.zeros(size, np.int64)
        found[dice.integers(0, size, int(width * 50))] = dice.integers(0, 256)
    elif shape == "sorted":
        found = np.sort(dice.integers(0, 256, size))
    elif shape == "halves":  # one half that this table does not suit
        half = size // 2
        found = np.concatenate([np.full(half, 7), dice.integers(0, 256, size - half)])
    else:
        odds = dice.dirichlet(np.full(256, 0.005 + width / 2))
        found = dice.choice(256, size, p=odds)
    return found.astype(np.uint8)


@pytest.mark.parametrize("loops", LOOPS)
@given(
    seed=st.integers(0, 1 << 30),
    size=st.one_of(
        st.sampled_from([1, 1023, 1024, 1025, 1027, 32_767, 32_768, 131_071, 131_072, 131_073,
                         131_327, 131_328, 131_330, 262_144, 262_145, 524_288]),
        st.integers(1, 300_000),
    ),
    shape=st.sampled_from(["even", "normal", "steep", "few", "sorted", "halves", "dirichlet"]),
    width=st.floats(0.01, 1.0),
)  # fmt: skip
@example(seed=0, size=262_144, shape="normal", width=0.05)
@settings(max_examples=150, deadline=None)
def test_any_bytes_come_back_through_zstd(loops, seed, size, shape, width):
    plain = drawn(seed, size, shape, width)
    frame = code(CODERS[loops], plain, size + 64)
    if frame:
        assert unpack(frame, size) == plain.tobytes()
        for room in (len(frame), len(frame) - 1, size // 2):
            again = code(CODERS[loops], plain, room)
            assert len(again) <= room
            assert not again or unpack(again, size) == plain.tobytes()


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("middle", [3, 120, 129, 250])
def test_exponents_shrink_to_their_entropy_wherever_they_lie(loops, middle):
    dice = np.random.default_rng(3)
    plain = (middle + np.floor(np.log2(np.abs(dice.standard_normal(1 << 18))))).astype(np.uint8)
    counts = np.bincount(plain, minlength=256)
    shares = counts[counts > 0] / len(plain)
    entropy_bytes = -(shares * np.log2(shares)).sum() * len(plain) / 8
    frame = code(CODERS[loops], plain, len(plain))
    assert unpack(frame, len(plain)) == plain.tobytes()
    assert len(frame) < 1.03 * entropy_bytes  # whole bits a symbol cost the rest


@pytest.mark.parametrize("loops", LOOPS)
def test_one_symbol_takes_a_few_bytes(loops):
    for size in (1024, 131_072, 524_288, 524_289):
        frame = code(CODERS[loops], np.full(size, 9, np.uint8), size)
        assert 0 < len(frame) < 64
        assert unpack(frame, size) == bytes([9]) * size


def test_noise_does_not_fit_into_its_own_length():
    plain = np.random.default_rng(1).integers(0, 256, 1 << 18).astype(np.uint8)
    for coder in CODERS.values():
        assert not code(coder, plain, len(plain) - 1)
