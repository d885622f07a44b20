"""Element types by the names that torch gives them, without torch.

The codes stand in chunk headers and never change; a new type gets a new code.
"""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """An element type: its stored code, its name, and the bytes of one element."""

    code: int
    name: str
    itemsize: int


_TABLE = (
    Dtype(1, "bool", 1),
    Dtype(2, "uint8", 1),
    Dtype(3, "int8", 1),
    Dtype(4, "int16", 2),
    Dtype(5, "int32", 4),
    Dtype(6, "int64", 8),
    Dtype(7, "uint16", 2),
    Dtype(8, "uint32", 4),
    Dtype(9, "uint64", 8),
    Dtype(10, "float16", 2),
    Dtype(11, "bfloat16", 2),
    Dtype(12, "float32", 4),
    Dtype(13, "float64", 8),
    Dtype(14, "complex32", 4),
    Dtype(15, "complex64", 8),
    Dtype(16, "complex128", 16),
    Dtype(17, "float8_e4m3fn", 1),
    Dtype(18, "float8_e5m2", 1),
    Dtype(19, "float8_e4m3fnuz", 1),
    Dtype(20, "float8_e5m2fnuz", 1),
    Dtype(21, "float8_e8m0fnu", 1),
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
