"""Stored records: JSON, in one zstd frame where it is long.

What comes back from a store is hostile until shown otherwise, and JSON readers are lenient: a
repeated key silently wins, ``NaN`` and ``1e999`` become numbers, nesting is bounded by whatever the
stack allows. So a strict gate stands before the typed decoding, and everything that the gate or the
types refuse is one error.
"""

from __future__ import annotations

import json
import math
import re
from types import UnionType
from typing import Any, NoReturn, TypeVar, overload

import msgspec
import numpy as np
import zstandard

from ckptd.codec.buffers import as_bytes
from ckptd.codec.frames import MAGIC, unpack_frame
from ckptd.errors import CorruptError, UnsupportedFormatError
from ckptd.model.manifest import FORMAT
from ckptd.model.ready import make_ready
from ckptd.units import KIB, MIB

MAX_RECORD_BYTES = 256 * MIB
MAX_DEPTH = 100
"""Brackets inside of brackets in a record."""
MAX_VALUES = 1 << 24
"""Commas and opening brackets in a record, those inside of strings included: a cheap upper bound of
what parsing allocates, which is about 120 bytes for each (three bytes of JSON make a list)."""

_PLAIN_BYTES = 64 * KIB
_MAX_INT_CHARS = 20  # all 64-bit integers, signed or not; larger ones are tagged values
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

T = TypeVar("T")


class _Format(msgspec.Struct):
    format: object = None


make_ready(_Format)


def encode_record(record: msgspec.Struct) -> bytes:
    """Return the stored form of a record, after proof that `decode_record` will take it.

    A record that cannot be read is a checkpoint that cannot be restored, so what JSON cannot say
    (a NaN in a field of floats becomes ``null``) is found here, while the step can still fail.

    Raises:
        ValueError: the record, as stored, would be refused by `decode_record`.
    """
    plain = msgspec.json.encode(record)
    try:
        _decode_plain(plain, type(record), MAX_RECORD_BYTES)
    except (CorruptError, UnsupportedFormatError) as error:
        raise ValueError(
            f"a {type(record).__name__} that could not be read back: {error}"
        ) from None
    if len(plain) <= _PLAIN_BYTES:
        return plain
    return zstandard.ZstdCompressor(
        level=3, write_content_size=True, write_checksum=True
    ).compress(plain)  # fmt: skip


@overload
def decode_record(
    data: bytes, type_: type[T], *, key: str, max_bytes: int = MAX_RECORD_BYTES
) -> T: ...
@overload
def decode_record(
    data: bytes, type_: UnionType, *, key: str, max_bytes: int = MAX_RECORD_BYTES
) -> Any: ...
def decode_record(data: bytes, type_: Any, *, key: str, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """Read a stored record and check everything that can be checked without a store.

    Any bytes may be given. Memory stays within a constant times the smaller of `max_bytes` and what
    `data` can decompress to.

    Args:
        data: JSON, or one zstd frame of it.
        type_: A struct type, or a union of tagged struct types. A `check` method is called.
        key: Where the bytes are from, for the message.
        max_bytes: The most that the JSON may take.

    Raises:
        UnsupportedFormatError: the record's ``format`` is newer than this version knows.
        CorruptError: anything else is wrong with it.
    """
    try:
        return _decode_plain(unpack_record(data, max_bytes), type_, max_bytes)
    except CorruptError as error:
        raise CorruptError(str(error), key=key) from None
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{error}: {key}") from None


def unpack_record(data: bytes, max_bytes: int) -> bytes:
    """Return the JSON of a stored record, unread.

    Raises:
        CorruptError: a frame that is none, or of more than `max_bytes`.
    """
    if data[: len(MAGIC)] != MAGIC:
        return data
    return unpack_frame(zstandard.ZstdDecompressor(), data, min_bytes=0, max_bytes=max_bytes)


def _decode_plain(plain: bytes, type_: Any, max_bytes: int) -> Any:
    if len(plain) > max_bytes:
        raise CorruptError(f"record of {len(plain)} bytes (at most {max_bytes})")
    try:
        _check_count(plain)
        record = decode_own(plain, type_)
        if record is None:
            _check_json(plain)
            _check_format(plain)
            record = msgspec.json.decode(plain, type=type_, strict=True)
        check = getattr(record, "check", None)
        if check is not None:
            check()
    # What msgspec and `check` raise are ValueErrors and these; a number beyond a C integer is an
    # OverflowError, nesting that the stack does not hold a RecursionError.
    except (ValueError, msgspec.MsgspecError, OverflowError, RecursionError) as error:
        raise CorruptError(f"bad record ({str(error)[:200]})") from None
    return record


def _check_json(plain: bytes) -> None:
    """Refuse what lenient readers take. Builds no dicts and no numbers, to spend little memory.

    Raises:
        ValueError, RecursionError: it is not strict JSON.
    """
    json.loads(
        plain.decode("utf-8", "strict"),  # a byte order mark stays, and is then refused
        object_pairs_hook=_check_keys,
        parse_constant=_refuse_constant,
        parse_int=_check_int,
        parse_float=_check_float,
    )
    _check_depth(plain)


def decode_own(plain: bytes, type_: Any) -> Any:
    """Decode what is, byte for byte, what `encode_record` writes; None for anything else.

    Such bytes hold no key twice, no number that JSON has not and nothing unknown, or they would not
    come out again: a tenth of the cost of looking for these. It says nothing of what a ``check``
    method would.
    """
    try:
        record = msgspec.json.decode(plain, type=type_, strict=True)
        if msgspec.json.encode(record) != plain:
            return None
    except (ValueError, msgspec.MsgspecError, OverflowError, RecursionError):
        return None
    if getattr(record, "format", FORMAT) != FORMAT:
        return None
    # Only values nest at will; two brackets are around them.
    return record if is_tame(getattr(record, "values", None), MAX_DEPTH - 2) else None


def is_tame(value: object, most: int) -> bool:
    """Tell whether a decoded value nests at most so deep, and has no integer of over 64 bits."""
    level = [value]
    for _ in range(most + 1):
        if any(type(v) is int and not -(1 << 63) <= v < 1 << 64 for v in level):
            return False
        inner: list[object] = []
        for outer in level:
            if type(outer) is dict:
                inner += outer.values()
            elif type(outer) is list:
                inner += outer
        if not inner:
            return True
        level = inner
    return False


def _check_count(plain: bytes) -> None:
    if sum(map(plain.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")


def _check_format(plain: bytes) -> None:
    try:
        number = msgspec.json.decode(plain, type=_Format).format
    except msgspec.ValidationError:
        return  # not an object: the typed decoding says so
    if isinstance(number, int) and not isinstance(number, bool) and number > FORMAT:
        raise UnsupportedFormatError(
            f"format {number} is newer than this ckptd, which knows up to {FORMAT}; upgrade it"
        )


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice in an object")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _check_int(text: str) -> None:
    if len(text) > _MAX_INT_CHARS:
        raise ValueError(f"an integer of {len(text)} characters")


def _check_float(text: str) -> None:
    if math.isinf(float(text)):
        raise ValueError("a number out of range")


def _check_depth(plain: bytes) -> None:
    """Refuse deep nesting. `plain` must be JSON: on other bytes the search for strings can crawl.

    Raises:
        ValueError: there are more than `MAX_DEPTH` brackets around something.
    """
    if plain.count(b"[") + plain.count(b"{") <= MAX_DEPTH:
        return
    brackets = as_bytes(_STRING.sub(b"", plain).translate(None, _NOT_BRACKETS))
    depth = 0
    for start in range(0, len(brackets), MIB):
        # Bit 2 tells ] and } from [ and {.
        closes = (brackets[start : start + MIB] & 4).astype(np.int32)
        depths = depth + np.cumsum(1 - closes // 2, dtype=np.int64)
        if depths.max() > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        depth = int(depths[-1])
