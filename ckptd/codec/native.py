"""The codec's inner loops in C, where the package was built with a compiler.

What they do stands in ``planes.c`` and ``entropy.c`` beside this; `ckptd.codec.planes` and
`ckptd.codec.entropy` do the same without them, slower. Calls let go of the interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
import sys

from ckptd.codec.buffers import Bytes, Words

_PATH = os.path.join(os.path.dirname(__file__), "libckptdcodec.so.1")


class Native:
    """The library. Each method checks lengths; arrays must be contiguous. For any thread."""

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            OSError, AttributeError: it cannot be loaded, or is another version's.
        """
        library = ctypes.CDLL(path)
        number, size, address = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
        self._split = library.ckptd_split
        self._split.argtypes = [number, number, address, size, address, address]
        self._split.restype = number
        self._join = library.ckptd_join
        self._join.argtypes = [number, number, address, address, size, address, address]
        self._join.restype = None
        self._entropy = library.ckptd_entropy
        self._entropy.argtypes = [address, size, address, size, address]
        self._entropy.restype = size
        library.ckptd_entropy_scratch.restype = size
        self.entropy_scratch_bytes: int = library.ckptd_entropy_scratch()

    def split(self, words: Words, mantissa: Bytes, exponent: Bytes, *, is_signed: bool) -> bool:
        """See `ckptd.codec.planes.Planes.split`."""
        assert len(exponent) >= len(words)
        return bool(
            self._split(
                words.itemsize, is_signed, _at(words), len(words), _at(mantissa), _at(exponent)
            )
        )

    def join(
        self, mantissa: Bytes, exponent: Bytes, words: Words, scratch: Bytes, *, is_signed: bool
    ) -> None:
        """See `ckptd.codec.planes.Planes.join`; `scratch` has a byte for each word."""
        assert len(exponent) >= len(words) <= len(scratch)
        self._join(
            words.itemsize, is_signed, _at(mantissa), _at(exponent), len(words), _at(words),
            _at(scratch),
        )  # fmt: skip

    def entropy(self, plain: Bytes, out: Bytes, scratch: Words) -> int:
        """Write `plain` to `out` as one zstd frame; 0 if that does not fit, or this cannot say it.

        `scratch` is at least `entropy_scratch_bytes`, aligned to 8 bytes.
        """
        assert scratch.nbytes >= self.entropy_scratch_bytes
        return int(self._entropy(_at(plain), len(plain), _at(out), len(out), _at(scratch)))


def load() -> Native | None:
    """Load the library; None where the package was built without it."""
    if sys.byteorder != "little":
        return None
    try:
        return Native(_PATH)
    except (OSError, AttributeError):
        return None


def _at(array: Words) -> int:
    """Return the address of a contiguous array, in a third of a microsecond if it is writable."""
    if array.flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))  # refuses gaps
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address


NATIVE: Native | None = load()
