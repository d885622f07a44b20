"""Bytes seen as arrays of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Buffer = bytes | bytearray | memoryview
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[Any]
"""An array of unsigned integers of one of the word sizes."""


def as_bytes(buffer: Buffer) -> Bytes:
    """View `buffer` as single bytes, without a copy; writable if it is.

    Raises:
        ValueError: it is not contiguous.
    """
    return np.frombuffer(buffer, dtype=np.uint8)
