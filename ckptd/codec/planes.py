"""Floating-point words taken apart into planes, so that the exponent can be coded by itself.

Each word is rotated left by one, which brings the sign down to bit 0 and makes the exponent the top
byte. The rotated words are then halved again and again: the low halves of all words, then the low
halves of what is left, until two bytes remain, of which the low one is the high plane and the high
one the exponent plane::

    2-byte words    high: u8 bits 0-7                                    exponent: bits 8-15
    4-byte words    u16 bits 0-15, high: u8 bits 16-23                   exponent: bits 24-31
    8-byte words    u32 bits 0-31, u16 bits 32-47, high: u8 bits 48-55   exponent: bits 56-63

Where no word has a sign (the second moments of Adam), nothing is rotated: the exponent plane is the
same, the planes below hold the bits from 0 on, and the high plane is left with seven bits a word.
Eight of these stand in seven bytes, the first in the lowest bits; the last group is filled up with
zeros. That saves a bit of each word.

Mantissa bits of trained weights are noise; all that a general compressor gains on them is heat.
The loops are in C (``planes.c``); without that library they are numpy's, on whole words: shifts with
a cast at the end are 2 to 6 times faster there than byte transposes with strided copies, and numpy
lets go of the interpreter lock in all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.codec.buffers import Bytes, Words
from ckptd.codec.native import NATIVE, Native

# Words that numpy works on at a time: 128 to 512 KiB, so that scratch stays in a core's own cache.
_TILE = 1 << 16
_BLOCK_BYTES = 1 << 20

_HALF: dict[int, np.dtype[Any]] = {n: np.dtype(f"<u{n // 2}") for n in (8, 4, 2)}
WORD: dict[int, np.dtype[Any]] = {n: np.dtype(f"<u{n}") for n in (8, 4, 2)}


class Planes:
    """Splits and joins words of one size, at most 1 MiB of them. Owns scratch: one per thread.

    Attributes:
        word_bytes: 2, 4 or 8.
        is_signed: False for words none of which has its top bit set.
    """

    def __init__(
        self, word_bytes: int, *, is_signed: bool = True, native: Native | None = NATIVE
    ) -> None:
        self.word_bytes = word_bytes
        self.is_signed = is_signed
        self._native = native
        if native is None:
            self._portable = _Portable(word_bytes, is_signed=is_signed)
        else:
            self._scratch = np.empty(_BLOCK_BYTES // word_bytes, np.uint8)

    def mantissa_bytes(self, count: int) -> int:
        """Return the bytes of all planes but the exponents', for `count` words."""
        high = count if self.is_signed else 7 * -(-count // 8)
        return (self.word_bytes - 2) * count + high

    def split(self, words: Words, mantissa: Bytes, exponent: Bytes) -> bool:
        """Fill `mantissa` with all planes but the exponents', in order, and `exponent` with theirs.

        False, with both undefined, if some word has a sign where none is expected. `mantissa` may
        lie at any address; it has room for a byte less than a whole word for each, rounded up to
        eight words.
        """
        assert len(mantissa) >= (self.word_bytes - 2) * len(words) + (len(words) + 7) // 8 * 8
        if self._native is not None:
            return self._native.split(words, mantissa, exponent, is_signed=self.is_signed)
        size = self.mantissa_bytes(len(words))
        return self._portable.split(words, mantissa[:size], exponent)

    def join(self, mantissa: Bytes, exponent: Bytes, words: Words) -> None:
        """Undo `split`. `mantissa` is `mantissa_bytes` long and may lie at any address."""
        assert len(mantissa) == self.mantissa_bytes(len(words))
        if self._native is not None:
            self._native.join(
                mantissa, exponent, words, self._scratch, is_signed=self.is_signed
            )  # fmt: skip
        else:
            self._portable.join(mantissa, exponent, words)


class _Portable:
    """The same with numpy."""

    def __init__(self, word_bytes: int, *, is_signed: bool) -> None:
        self._bits = 8 * word_bytes
        self._is_signed = is_signed
        self._rest, self._spare = (np.empty(_TILE, WORD[word_bytes]) for _ in range(2))
        # Planes in the store lie at odd addresses, which numpy works on by copying them anyway.
        count = _BLOCK_BYTES // word_bytes
        halves = [_HALF[size] for size in (8, 4, 2) if size <= word_bytes]
        self._planes: list[Words] = [np.empty(count, half) for half in halves]

    def split(self, words: Words, mantissa: Bytes, exponent: Bytes) -> bool:
        count = len(words)
        if not self._is_signed and int(np.bitwise_or.reduce(words)) >> (self._bits - 1):
            return False
        for start in range(0, count, _TILE):
            part = slice(start, min(start + _TILE, count))
            self._split(words[part], [plane[part] for plane in self._planes], exponent[part])
        at = 0
        for plane in self._planes[:-1]:
            mantissa[at : at + count * plane.itemsize] = plane[:count].view(np.uint8)
            at += count * plane.itemsize
        high = self._planes[-1]
        mantissa[at:] = high[:count] if self._is_signed else _pack(high, count)
        return True

    def join(self, mantissa: Bytes, exponent: Bytes, words: Words) -> None:
        count = len(words)
        at = 0
        for plane in self._planes[:-1]:
            plane[:count].view(np.uint8)[:] = mantissa[at : at + count * plane.itemsize]
            at += count * plane.itemsize
        rest = mantissa[at:]
        self._planes[-1][:count] = rest if self._is_signed else _unpack(rest, count)
        for start in range(0, count, _TILE):
            part = slice(start, min(start + _TILE, count))
            self._join([plane[part] for plane in self._planes], exponent[part], words[part])

    def _split(self, words: Words, planes: list[Words], exponent: Bytes) -> None:
        rest, spare = self._rest[: len(words)], self._spare[: len(words)]
        if self._is_signed:
            np.left_shift(words, 1, out=rest)
            np.right_shift(words, self._bits - 1, out=spare)
            np.bitwise_or(rest, spare, out=rest)
        else:
            np.copyto(rest, words)
        for i, plane in enumerate(planes):
            if i:
                np.right_shift(rest, 8 * planes[i - 1].itemsize, out=rest)
            np.copyto(plane, rest, casting="unsafe")
        if not self._is_signed:
            np.bitwise_and(planes[-1], 0x7F, out=planes[-1])
        np.right_shift(words, self._bits - 9, out=rest)
        np.copyto(exponent, rest, casting="unsafe")

    def _join(self, planes: list[Words], exponent: Bytes, words: Words) -> None:
        wide, spare = self._rest[: len(words)], self._spare[: len(words)]
        np.copyto(words, planes[0])
        shift = 8 * planes[0].itemsize
        for plane in planes[1:]:
            np.copyto(wide, plane)
            np.left_shift(wide, shift, out=wide)
            np.bitwise_or(words, wide, out=words)
            shift += 8 * plane.itemsize
        if self._is_signed:
            np.left_shift(words, self._bits - 1, out=spare)
            np.right_shift(words, 1, out=words)
            np.bitwise_or(words, spare, out=words)
        np.copyto(wide, exponent)
        np.left_shift(wide, self._bits - 9, out=wide)
        np.bitwise_or(words, wide, out=words)


# Eight values of seven bits, a byte each, become 56 bits: pairs, then fours, then all.
_SQUEEZE = (
    (0x007F007F007F007F, 0x7F007F007F007F00, 1),
    (0x00003FFF00003FFF, 0x3FFF00003FFF0000, 2),
    (0x000000000FFFFFFF, 0x0FFFFFFF00000000, 4),
)


def _pack(values: Bytes, count: int) -> Bytes:
    padded = np.zeros(-(-count // 8) * 8, np.uint8)
    padded[:count] = values[:count]
    groups = padded.view("<u8")
    for low, high, shift in _SQUEEZE:
        groups = (groups & np.uint64(low)) | (groups & np.uint64(high)) >> np.uint64(shift)
    return np.ascontiguousarray(groups.view(np.uint8).reshape(-1, 8)[:, :7]).reshape(-1)


def _unpack(packed: Bytes, count: int) -> Bytes:
    wide = np.zeros((len(packed) // 7, 8), np.uint8)
    wide[:, :7] = packed.reshape(-1, 7)
    groups = wide.reshape(-1).view("<u8")
    for low, high, shift in reversed(_SQUEEZE):
        back = np.uint64(high >> shift)
        groups = (groups & np.uint64(low)) | (groups & back) << np.uint64(shift)
    return groups.view(np.uint8)[:count]
