"""The codecs of a block: one byte each, which stands in chunk headers and never changes meaning.

====  ========  =====================================================================
code  name      stored form of the raw bytes
====  ========  =====================================================================
0     raw       the raw bytes
1     zstd      one zstd frame of the raw bytes
2     planes16  2-byte words: mantissa planes as they are, then one zstd frame of the
                exponent plane (the planes: `ckptd.codec.planes`)
3     planes32  the same for 4-byte words
4     planes64  the same for 8-byte words
====  ========  =====================================================================

Frames state their content size, use no dictionary, and need a window of at most 8 MiB. A coded
block is always shorter than its raw bytes. Words are little-endian. Any block may be raw or zstd;
planes are only for floating-point types of that word size (complex types: of that component).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import zstandard

from ckptd.codec.buffers import Buffer, Bytes, as_bytes
from ckptd.codec.frames import unpack_frame
from ckptd.codec.planes import WORD, Planes
from ckptd.errors import CorruptError
from ckptd.units import KIB, MIB

BLOCK_BYTES = 1 * MIB

RAW, ZSTD, PLANES16, PLANES32, PLANES64 = range(5)

Mode = Literal["auto", "zstd", "none"]

_WORD_BYTES = {PLANES16: 2, PLANES32: 4, PLANES64: 8}
_PLANES_OF = {
    "float16": PLANES16, "bfloat16": PLANES16, "complex32": PLANES16,
    "float32": PLANES32, "complex64": PLANES32,
    "float64": PLANES64, "complex128": PLANES64,
}  # fmt: skip

# Below this saving, decoding costs more than the store gains.
_WORTHWHILE = 0.97
_SAMPLE_RUNS = 4
_SAMPLE_RUN_BYTES = 2 * KIB


def planes_codec(dtype: str) -> int | None:
    """Return the planes codec of an element type, None for types without an exponent plane."""
    return _PLANES_OF.get(dtype)


def allowed_codecs(dtype: str) -> frozenset[int]:
    """Return the codecs that a block of this element type may have."""
    planes = planes_codec(dtype)
    return frozenset({RAW, ZSTD} if planes is None else {RAW, ZSTD, planes})


class BlockEncoder:
    """Codes blocks. Owns zstd contexts and about 3 MiB of scratch: one per thread."""

    def __init__(self) -> None:
        # Entropy coding with as good as no match search: exponents repeat, but not in sequences.
        params = zstandard.ZstdCompressionParameters.from_level(
            1, min_match=7, hash_log=6, window_log=17, write_content_size=1, write_checksum=0
        )
        self._entropy = zstandard.ZstdCompressor(compression_params=params)
        self._zstd = zstandard.ZstdCompressor(level=1, write_content_size=True)
        self._planes = {codec: Planes(size) for codec, size in _WORD_BYTES.items()}
        self._mantissa = np.empty(BLOCK_BYTES, np.uint8)
        self._exponent = np.empty(BLOCK_BYTES // 2, np.uint8)

    def encode(self, raw: Bytes, dtype: str, out: Bytes, mode: Mode) -> tuple[int, int]:
        """Store the block `raw` at the start of `out`, in the codec that suits it.

        Args:
            raw: At most `BLOCK_BYTES`, aligned to a word; nobody else may write to it meanwhile.
            dtype: The element type; `raw` is whole elements.
            out: At least as long as `raw`, and apart from it.
            mode: ``auto`` leaves raw what a sample says would shrink by less than 3 %, ``zstd``
                codes whatever shrinks at all, ``none`` nothing.

        Returns:
            The codec and the stored length, which is at most that of `raw`.
        """
        codec = RAW if mode == "none" else self._choose(raw, dtype, is_eager=mode == "zstd")
        stored = 0
        if codec == ZSTD:
            stored = _place(out, self._zstd.compress(raw.data), limit=len(raw))
        elif codec != RAW:
            stored = self._encode_planes(self._planes[codec], raw, out)
        if stored:
            return codec, stored
        out[: len(raw)] = raw
        return RAW, len(raw)

    def _choose(self, raw: Bytes, dtype: str, *, is_eager: bool) -> int:
        """Estimate from a few KiB what each codec would make of the block."""
        sample = _sample(raw)
        best, codec = len(self._zstd.compress(sample.data)), ZSTD
        planes = planes_codec(dtype)
        if planes is not None:
            stored = self._split(self._planes[planes], sample)[1]
            if stored < best:
                best, codec = stored, planes
        return codec if is_eager or best < len(sample) * _WORTHWHILE else RAW

    def _encode_planes(self, planes: Planes, raw: Bytes, out: Bytes) -> int:
        frame, stored = self._split(planes, raw)
        if stored >= len(raw):
            return 0
        mantissa_bytes = planes.mantissa_bytes(len(raw))
        out[:mantissa_bytes] = self._mantissa[:mantissa_bytes]
        return mantissa_bytes + _place(out[mantissa_bytes:], frame, limit=stored + 1)

    def _split(self, planes: Planes, raw: Bytes) -> tuple[bytes, int]:
        """Fill the mantissa scratch; return the exponent's frame and the length of both."""
        words = raw.view(WORD[planes.word_bytes])
        mantissa_bytes = planes.mantissa_bytes(len(raw))
        exponent = self._exponent[: len(words)]
        planes.split(words, self._mantissa[:mantissa_bytes], exponent)
        frame = self._entropy.compress(exponent.data)
        return frame, mantissa_bytes + len(frame)


class BlockDecoder:
    """Decodes blocks. Owns a zstd context and scratch: one per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()
        self._planes = {codec: Planes(size) for codec, size in _WORD_BYTES.items()}
        self._mantissa = np.empty(BLOCK_BYTES, np.uint8)

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
        if rest:
            raise CorruptError("planes of a block that is not whole words")
        mantissa_bytes = planes.mantissa_bytes(len(out))
        frame = memoryview(stored)[mantissa_bytes:]
        plain = unpack_frame(self._zstd, frame, min_bytes=count, max_bytes=count)
        mantissa = self._mantissa[:mantissa_bytes]  # stored planes lie at any address
        mantissa[:] = as_bytes(stored)[:mantissa_bytes]
        words = np.frombuffer(out, dtype=WORD[planes.word_bytes])
        planes.join(mantissa, as_bytes(plain), words)


def _sample(raw: Bytes) -> Bytes:
    """Return a few runs of consecutive bytes from all over `raw`, or all of it if it is short."""
    share = len(raw) // (_SAMPLE_RUNS * 16) * 16  # runs start at whole words of any size
    if share <= _SAMPLE_RUN_BYTES:
        return raw
    rows = raw[: share * _SAMPLE_RUNS].reshape(_SAMPLE_RUNS, share)
    return np.ascontiguousarray(rows[:, :_SAMPLE_RUN_BYTES]).reshape(-1)


def _place(out: Bytes, frame: bytes, *, limit: int) -> int:
    """Copy `frame` to the start of `out` if it is shorter than `limit`; return the bytes placed."""
    if len(frame) >= limit:
        return 0
    out[: len(frame)] = as_bytes(frame)
    return len(frame)
