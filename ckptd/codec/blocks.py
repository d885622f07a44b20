"""The codecs of a block: one byte each, which stands in chunk headers and never changes meaning.

====  ==========  =====================================================================
code  name        stored form of the raw bytes
====  ==========  =====================================================================
0     raw         the raw bytes
1     zstd        one zstd frame of the raw bytes
2     planes16    2-byte words: mantissa planes as they are, then one zstd frame of the
                  exponent plane (the planes: `ckptd.codec.planes`)
3     planes32    the same for 4-byte words
4     planes64    the same for 8-byte words
5     planes16u   the same for words without a sign, whose high plane has seven bits
6     planes32u
7     planes64u
====  ==========  =====================================================================

Frames state their content size, use no dictionary, and need a window of at most 8 MiB. A coded
block is always shorter than its raw bytes. Words are little-endian. Any block may be raw or zstd;
planes are only for floating-point types of that word size (complex types: of that component).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import zstandard

from ckptd.codec.buffers import Buffer, Bytes, as_bytes
from ckptd.codec.entropy import EntropyCoder
from ckptd.codec.frames import unpack_frame
from ckptd.codec.native import NATIVE, Native
from ckptd.codec.planes import WORD, Planes
from ckptd.errors import CorruptError
from ckptd.units import KIB, MIB

BLOCK_BYTES = 1 * MIB

RAW, ZSTD, PLANES16, PLANES32, PLANES64, PLANES16U, PLANES32U, PLANES64U = range(8)

Mode = Literal["auto", "zstd", "none"]

_WORD_BYTES = {PLANES16: 2, PLANES32: 4, PLANES64: 8}
_UNSIGNED = {PLANES16: PLANES16U, PLANES32: PLANES32U, PLANES64: PLANES64U}
_PLANES_OF = {
    "float16": PLANES16, "bfloat16": PLANES16, "complex32": PLANES16,
    "float32": PLANES32, "complex64": PLANES32,
    "float64": PLANES64, "complex128": PLANES64,
}  # fmt: skip

# Below this saving, decoding costs more than the store gains.
_WORTHWHILE = 0.97
_SAMPLE_RUNS = 4
_SAMPLE_RUN_BYTES = 2 * KIB
_MIN_BYTES = 64
_NEARLY = 1.02
_REPEATS = 0.95
_ALIKE = 1 / 64

_ENTROPY = -1  # a way to make a zstd frame, not a codec of its own


def planes_codec(dtype: str) -> int | None:
    """Return the planes codec of an element type, None for types without an exponent plane."""
    return _PLANES_OF.get(dtype)


def allowed_codecs(dtype: str) -> frozenset[int]:
    """Return the codecs that a block of this element type may have."""
    planes = planes_codec(dtype)
    return frozenset({RAW, ZSTD} if planes is None else {RAW, ZSTD, planes, _UNSIGNED[planes]})


def _make_planes(native: Native | None) -> dict[int, Planes]:
    signed = {code: Planes(size, native=native) for code, size in _WORD_BYTES.items()}
    unsigned = {
        _UNSIGNED[code]: Planes(size, is_signed=False, native=native)
        for code, size in _WORD_BYTES.items()
    }
    return {**signed, **unsigned}


class BlockEncoder:
    """Codes blocks. Owns zstd contexts and about 4 MiB of scratch: one per thread.

    Blocks of a chunk are mostly alike: what suited one is tried on the next without a sample, as
    long as it makes about the same of it. `native` None goes without the C loops.
    """

    def __init__(self, native: Native | None = NATIVE) -> None:
        self._entropy = EntropyCoder(native)
        self._zstd = zstandard.ZstdCompressor(level=1, write_content_size=True)
        self._probe = zstandard.ZstdCompressor(level=-1)  # matches only: a fifth of the time
        self._planes = _make_planes(native)
        self._exponent = np.empty(BLOCK_BYTES // 2, np.uint8)
        self._room = np.empty(_SAMPLE_RUNS * _SAMPLE_RUN_BYTES, np.uint8)
        self._habit: tuple[int, float] | None = None

    def begin(self) -> None:
        """Forget what suited the blocks before: the next one is of another chunk."""
        self._habit = None

    def encode(self, raw: Bytes, dtype: str, out: Bytes, mode: Mode) -> tuple[int, int]:
        """Store the block `raw` at the start of `out`, in the codec that suits it.

        Args:
            raw: At most `BLOCK_BYTES`, aligned to a word; nobody else may write to it meanwhile.
            dtype: The element type; `raw` is whole elements.
            out: At least as long as `raw`, and apart from it; it is overwritten up to that length,
                however little is stored.
            mode: ``auto`` leaves raw what a sample says would shrink by less than 3 %, ``zstd``
                codes whatever shrinks at all, ``none`` nothing.

        Returns:
            The codec and the stored length, which is at most that of `raw`.
        """
        # What is coded is shorter than what is raw, or it is raw.
        room = out[: len(raw) - 1]
        if self._habit is not None and len(raw) >= _MIN_BYTES:
            code, share = self._habit
            stored = self._code(code, raw, room)
            if stored and abs(stored - share * len(raw)) < len(raw) * _ALIKE:
                return max(code, ZSTD), stored
        for code in self._choose(raw, dtype, mode):
            stored = self._code(code, raw, room)
            if stored:
                self._habit = code, stored / len(raw)
                return max(code, ZSTD), stored
        self._habit = None
        out[: len(raw)] = raw
        return RAW, len(raw)

    def _choose(self, raw: Bytes, dtype: str, mode: Mode) -> tuple[int, ...]:
        """Return the codes to try, one after the other, by what they make of a few KiB."""
        if mode == "none" or len(raw) < _MIN_BYTES:
            return ()
        sample = _sample(raw)
        limit = len(sample) if mode == "zstd" else len(sample) * _WORTHWHILE
        matched = self._matched_bytes(sample)
        planes = planes_codec(dtype)
        if planes is None:
            # Five times as fast, and of most numbers it makes the same.
            stored = self._entropy.encode(sample, self._room[: len(sample)]) or len(sample)
            code = _ENTROPY if stored < matched * _NEARLY else ZSTD
            return (code,) if min(stored, matched) < limit else ()
        codes: tuple[int, ...] = (planes,)
        if not _has_sign(sample, WORD[_WORD_BYTES[planes]]):
            codes = (_UNSIGNED[planes], planes)
        stored = self._code(codes[0], sample, self._room[: len(sample)]) or len(sample)
        if matched < stored:
            codes, stored = (ZSTD,), matched
        return codes if stored < limit else ()

    def _matched_bytes(self, sample: Bytes) -> int:
        """Estimate what zstd makes of the sample where it finds repetitions, its length elsewhere."""
        found = len(self._probe.compress(sample.data))
        return len(self._zstd.compress(sample.data)) if found < len(sample) * _REPEATS else found

    def _code(self, code: int, raw: Bytes, out: Bytes) -> int:
        """Code `raw` one way; return the length, 0 if that way does not work or does not fit."""
        if code == _ENTROPY:
            return self._entropy.encode(raw, out)
        if code == ZSTD:
            frame = self._zstd.compress(raw.data)
            if len(frame) > len(out):
                return 0
            out[: len(frame)] = as_bytes(frame)
            return len(frame)
        planes = self._planes[code]
        words = raw.view(WORD[planes.word_bytes])
        exponent = self._exponent[: len(words)]
        if not planes.split(words, out, exponent):
            return 0
        mantissa_bytes = planes.mantissa_bytes(len(words))
        stored = self._entropy.encode(exponent, out[mantissa_bytes:])
        return mantissa_bytes + stored if stored else 0


class BlockDecoder:
    """Decodes blocks. Owns a zstd context and scratch: one per thread."""

    def __init__(self, native: Native | None = NATIVE) -> None:
        self._zstd = zstandard.ZstdDecompressor()
        self._planes = _make_planes(native)

    def decode(self, codec: int, stored: Buffer, out: memoryview) -> None:
        """Decode one block into `out`, which has exactly the raw length and is whole words.

        Raises:
            CorruptError: `stored` is not a block of that codec and length; `out` is garbage then.
        """
        raw_bytes = len(out)
        if codec == RAW:
            if len(stored) != raw_bytes:
                raise CorruptError(f"raw block of {len(stored)} bytes where {raw_bytes} belong")
            as_bytes(out)[:] = as_bytes(stored)
        elif codec == ZSTD:
            plain = unpack_frame(self._zstd, stored, min_bytes=raw_bytes, max_bytes=raw_bytes)
            as_bytes(out)[:] = as_bytes(plain)
        elif codec in self._planes:
            self._decode_planes(self._planes[codec], stored, out)
        else:
            raise CorruptError(f"unknown codec {codec}")

    def _decode_planes(self, planes: Planes, stored: Buffer, out: memoryview) -> None:
        count, rest = divmod(len(out), planes.word_bytes)
        mantissa_bytes = planes.mantissa_bytes(count)
        if rest or len(stored) < mantissa_bytes:
            raise CorruptError("planes that are too short, or of a block that is not whole words")
        frame = memoryview(stored)[mantissa_bytes:]
        plain = unpack_frame(self._zstd, frame, min_bytes=count, max_bytes=count)
        words = np.frombuffer(out, dtype=WORD[planes.word_bytes])
        planes.join(as_bytes(stored)[:mantissa_bytes], as_bytes(plain), words)


def _sample(raw: Bytes) -> Bytes:
    """Return a few runs of consecutive bytes from all over `raw`, or all of it if it is short."""
    share = len(raw) // (_SAMPLE_RUNS * 16) * 16  # runs start at whole words of any size
    if share <= _SAMPLE_RUN_BYTES:
        return raw[: _SAMPLE_RUNS * _SAMPLE_RUN_BYTES]
    rows = raw[: share * _SAMPLE_RUNS].reshape(_SAMPLE_RUNS, share)
    return np.ascontiguousarray(rows[:, :_SAMPLE_RUN_BYTES]).reshape(-1)


def _has_sign(sample: Bytes, word: np.dtype[Any]) -> bool:
    return bool(sample.view(f"<i{word.itemsize}").min() < 0)
