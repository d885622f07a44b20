"""Floating-point words taken apart into planes, so that the exponent can be coded by itself.

Each word is rotated left by one, which brings the sign down to bit 0 and makes the exponent the top
byte. The rotated words are then halved again and again: the low halves of all words, then the low
halves of what is left, until two bytes remain, of which the low one is a plane and the high one the
exponent plane::

    2-byte words    u8 bits 0-7                                    exponent: bits 8-15
    4-byte words    u16 bits 0-15, u8 bits 16-23                   exponent: bits 24-31
    8-byte words    u32 bits 0-31, u16 bits 32-47, u8 bits 48-55   exponent: bits 56-63

Mantissa bits of trained weights are noise; all that a general compressor gains on them is heat.
Shifts on whole words with a cast at the end are 2 to 6 times faster in numpy than byte transposes
with strided copies, and numpy lets go of the GIL in all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.codec.buffers import Bytes, Words

# Words that are worked on at a time: 128 to 512 KiB, so that scratch stays in a core's own cache.
_TILE = 1 << 16

_HALF: dict[int, np.dtype[Any]] = {n: np.dtype(f"<u{n // 2}") for n in (8, 4, 2)}
WORD: dict[int, np.dtype[Any]] = {n: np.dtype(f"<u{n}") for n in (8, 4, 2)}


class Planes:
    """Splits and joins words of one size. Owns scratch: one per thread.

    Attributes:
        word_bytes: 2, 4 or 8.
    """

    def __init__(self, word_bytes: int) -> None:
        self.word_bytes = word_bytes
        sizes = [size for size in (8, 4, 2) if size <= word_bytes]
        self._scratch = [np.empty(_TILE, WORD[size]) for size in sizes]
        self._spare = np.empty(_TILE, WORD[word_bytes])

    def mantissa_bytes(self, raw_bytes: int) -> int:
        """Return the bytes of all planes but the exponent's, which has ``raw_bytes / word_bytes``."""
        return raw_bytes - raw_bytes // self.word_bytes

    def split(self, words: Words, mantissa: Bytes, exponent: Bytes) -> None:
        """Fill `mantissa` with the mantissa planes, in order, and `exponent` with its plane.

        `mantissa` must be aligned to half a word, or else this is slow.
        """
        planes = self._views(mantissa, len(words))
        for start in range(0, len(words), _TILE):
            part = slice(start, start + _TILE)
            self._split(words[part], [plane[part] for plane in planes], exponent[part])

    def join(self, mantissa: Bytes, exponent: Bytes, words: Words) -> None:
        """Undo `split`."""
        planes = self._views(mantissa, len(words))
        for start in range(0, len(words), _TILE):
            part = slice(start, start + _TILE)
            self._join([plane[part] for plane in planes], exponent[part], words[part])

    def _views(self, mantissa: Bytes, count: int) -> list[Words]:
        views: list[Words] = []
        at = 0
        for size in (8, 4, 2):
            if size <= self.word_bytes:
                end = at + count * size // 2
                views.append(mantissa[at:end].view(_HALF[size]))
                at = end
        return views

    def _split(self, words: Words, planes: list[Words], exponent: Bytes) -> None:
        count = len(words)
        rest, spare = self._scratch[0][:count], self._spare[:count]
        np.left_shift(words, 1, out=rest)
        np.right_shift(words, 8 * self.word_bytes - 1, out=spare)
        np.bitwise_or(rest, spare, out=rest)
        for level, plane in enumerate(planes):
            np.copyto(plane, rest, casting="unsafe")
            np.right_shift(rest, 8 * plane.itemsize, out=rest)
            is_last = level + 1 == len(planes)
            high = exponent if is_last else self._scratch[level + 1][:count]
            np.copyto(high, rest, casting="unsafe")
            rest = high

    def _join(self, planes: list[Words], exponent: Bytes, words: Words) -> None:
        count = len(words)
        rest: Words = exponent
        for plane, scratch in zip(reversed(planes), reversed(self._scratch), strict=True):
            wide = scratch[:count]
            np.copyto(wide, rest)
            np.left_shift(wide, 8 * plane.itemsize, out=wide)
            np.bitwise_or(wide, plane, out=wide)
            rest = wide
        spare = self._spare[:count]
        np.left_shift(rest, 8 * self.word_bytes - 1, out=spare)
        np.right_shift(rest, 1, out=rest)
        np.bitwise_or(rest, spare, out=words)
