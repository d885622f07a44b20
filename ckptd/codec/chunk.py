"""Chunks, format 1: the stored form of raw bytes of one element type.

All numbers are little-endian, except that digests stand as xxHash prints them (big-endian)::

    offset        bytes  field
    0             8      magic, ``CKPTDCH1``
    8             2      u16: format version, 1
    10            1      u8: code of the element type (`ckptd.model.dtypes`)
    11            1      u8: 0
    12            4      u32: number of blocks n, ``ceil(raw length / 1 MiB)``
    16            8      u64: raw length in bytes; 1 to 64 MiB, whole elements
    24 + 21 * i   1      u8: codec of block i (`ckptd.codec.blocks`)
    25 + 21 * i   4      u32: stored length of block i; the raw length if raw, else less
    29 + 21 * i   16     xxh3-128 of the raw bytes of block i
    24 + 21 * n   8      u64: xxh3-64 of all the bytes before
    32 + 21 * n   ...    the stored blocks, back to back, nothing after the last

A block is 1 MiB of raw bytes, the last one what is left. The chunk's hash, which is its name in the
store, is the xxh3-128, in 32 hex digits, of the name of the element type in ASCII, a NUL, the raw
length as u64, and the digests of the blocks in order. So the header proves the name, and each block
proves itself: a reader that wants a few bytes of a chunk fetches its header and those blocks. The
hash does not depend on how blocks are coded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from ckptd.codec.blocks import BLOCK_BYTES, RAW, BlockDecoder, BlockEncoder, Mode, allowed_codecs
from ckptd.codec.buffers import Buffer, Bytes, as_bytes
from ckptd.codec.native import NATIVE, Native
from ckptd.errors import CorruptError
from ckptd.model import dtypes
from ckptd.model.manifest import MAX_CHUNK_BYTES

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "Decoder",
    "Encoded",
    "Encoder",
    "Header",
    "Mode",
    "block_count",
    "header_bytes",
    "read_header",
    "stored_bound",
]

MAGIC = b"CKPTDCH1"
VERSION = 1

_FIXED = struct.Struct("<8sHBBIQ")
_BLOCK = struct.Struct("<BI16s")
_SUM = struct.Struct("<Q")


def block_count(raw_bytes: int) -> int:
    """Return the number of blocks of a chunk."""
    return -(-raw_bytes // BLOCK_BYTES)


def header_bytes(raw_bytes: int) -> int:
    """Return the length of a chunk's header, which depends on the chunk's raw length only."""
    return _FIXED.size + block_count(raw_bytes) * _BLOCK.size + _SUM.size


def stored_bound(raw_bytes: int) -> int:
    """Return the most bytes that a chunk of this raw length takes when stored."""
    return header_bytes(raw_bytes) + raw_bytes


class Encoded(NamedTuple):
    """What `Encoder.encode` made: the chunk's hash, and how many bytes of `out` it fills."""

    hash: str
    stored_bytes: int


class Block(NamedTuple):
    """A block as the header describes it. `stored_offset` counts from the start of the chunk."""

    codec: int
    stored_offset: int
    stored_bytes: int
    digest: bytes


@dataclass(frozen=True)
class Header:
    """A chunk's header, checked against the chunk's name and element type."""

    dtype: str
    raw_bytes: int
    blocks: tuple[Block, ...]
    hash: str

    @property
    def stored_bytes(self) -> int:
        """The stored length of the whole chunk, header included."""
        return self.blocks[-1].stored_offset + self.blocks[-1].stored_bytes

    def block_raw_bytes(self, index: int) -> int:
        """Return the raw length of a block: `BLOCK_BYTES`, less only for the last."""
        return min(BLOCK_BYTES, self.raw_bytes - index * BLOCK_BYTES)


class Encoder:
    """Makes chunks. Owns zstd contexts and about 4 MiB of scratch: one per thread, never shared.

    `native` None goes without the C loops.
    """

    def __init__(self, native: Native | None = NATIVE) -> None:
        self._blocks = BlockEncoder(native)
        self._copy = np.empty(BLOCK_BYTES, np.uint8)

    def encode(
        self,
        source: memoryview,
        dtype: str,
        out: memoryview,
        *,
        mode: Mode,
        copied: Callable[[], None] | None = None,
    ) -> Encoded:
        """Store `source` as a chunk at the start of `out`.

        Another process may write to `source` meanwhile: each block is read exactly once, into
        memory that is ours, and that copy is hashed and coded. So the chunk always proves itself;
        whether it is a mixture of two states is for `copied` to find out.

        Args:
            source: The raw bytes: contiguous, whole elements, 1 to `MAX_CHUNK_BYTES` bytes.
            dtype: The name of the element type.
            out: At least `stored_bound` of the source's length.
            mode: How hard to try; see `BlockEncoder.encode`.
            copied: Called after each block was copied, before it is used. What it raises ends the
                call; `out` is garbage then, and the encoder may be used again.

        Raises:
            ValueError: the arguments are not as said.
        """
        raw, room = as_bytes(source), as_bytes(out)
        if not _is_whole(dtype, len(raw)) or len(room) < stored_bound(len(raw)):
            raise ValueError(f"cannot store {len(raw)} bytes of {dtype} in {len(room)} bytes")
        self._blocks.begin()
        blocks: list[Block] = []
        at = header_bytes(len(raw))
        for start in range(0, len(raw), BLOCK_BYTES):
            part = raw[start : start + BLOCK_BYTES]
            # A block that will be raw for certain is copied straight to its place.
            copy = (room[at:] if mode == "none" else self._copy)[: len(part)]
            np.copyto(copy, part)
            if copied is not None:
                copied()
            digest = xxhash.xxh3_128_digest(copy.data)
            codec, stored = RAW, len(copy)
            if mode != "none":
                codec, stored = self._blocks.encode(copy, dtype, room[at:], mode)
            blocks.append(Block(codec, at, stored, digest))
            at += stored
        header = _pack_header(dtype, len(raw), blocks)
        room[: len(header)] = as_bytes(header)
        return Encoded(_chunk_hash(dtype, len(raw), blocks), at)


def read_header(head: Buffer, *, hash: str, dtype: str, raw_bytes: int) -> Header:  # noqa: A002
    """Read the header at the start of `head` and check that it is the one of this chunk.

    Args:
        head: At least `header_bytes` of the raw length; what follows is not looked at.
        hash: The chunk's hash, from its name.
        dtype: The element type that the caller's manifest states.
        raw_bytes: The raw length that the caller's manifest states.

    Raises:
        CorruptError: it is not.
    """
    size = header_bytes(raw_bytes)
    if not _is_whole(dtype, raw_bytes) or len(head) < size:
        raise CorruptError(f"chunk {hash} is too short for a header, or not whole elements")
    data = bytes(memoryview(head)[:size])
    magic, version, code, zero, count, length = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise CorruptError(f"chunk {hash} does not start as a chunk does")
    if version != VERSION:
        raise CorruptError(f"chunk {hash} has format version {version}, known is {VERSION}")
    if _SUM.unpack_from(data, size - _SUM.size)[0] != _checksum(data[: -_SUM.size]):
        raise CorruptError(f"chunk {hash}: the header's checksum does not match")
    stated = (code, zero, count, length)
    if stated != (dtypes.BY_NAME[dtype].code, 0, block_count(raw_bytes), raw_bytes):
        raise CorruptError(f"chunk {hash} is not {raw_bytes} bytes of {dtype}")
    header = Header(dtype, raw_bytes, _read_blocks(data), hash)
    if _chunk_hash(dtype, raw_bytes, header.blocks) != hash:
        raise CorruptError(f"chunk {hash} holds something else than its name says")
    _check_blocks(header)
    return header


class Decoder:
    """Reads chunks. Owns a zstd context and about 1 MiB of scratch: one per thread.

    `native` None goes without the C loops.
    """

    def __init__(self, native: Native | None = NATIVE) -> None:
        self._blocks = BlockDecoder(native)

    def view_block(self, header: Header, index: int, stored: Buffer, room: Bytes) -> Bytes:
        """Return a block's raw bytes, checked: `stored` itself if they are raw, else in `room`.

        Raises:
            CorruptError: as `decode_block`.
        """
        block = header.blocks[index]
        if block.codec != RAW:
            self.decode_block(header, index, stored, room.data)
            return room
        if len(stored) != block.stored_bytes or xxhash.xxh3_128_digest(stored) != block.digest:
            raise CorruptError(f"chunk {header.hash}, block {index}: the hash does not match")
        return as_bytes(stored)

    def decode_block(self, header: Header, index: int, stored: Buffer, out: memoryview) -> None:
        """Decode one block and check it against its digest.

        Args:
            header: From `read_header`.
            index: Which block.
            stored: The block's stored bytes, exactly.
            out: Contiguous and of exactly the block's raw length.

        Raises:
            CorruptError: the block is damaged; what is in `out` must not be used.
            ValueError: `out` has another length.
        """
        block = header.blocks[index]
        if out.nbytes != header.block_raw_bytes(index):
            raise ValueError(f"{out.nbytes} bytes for a block of {header.block_raw_bytes(index)}")
        if len(stored) != block.stored_bytes:
            raise CorruptError(f"chunk {header.hash}, block {index}: {len(stored)} bytes")
        plain = out.cast("B")
        try:
            self._blocks.decode(block.codec, stored, plain)
        except CorruptError as error:
            raise CorruptError(f"chunk {header.hash}, block {index}: {error}") from None
        if xxhash.xxh3_128_digest(plain) != block.digest:
            raise CorruptError(f"chunk {header.hash}, block {index}: the hash does not match")

    def decode(
        self,
        stored: Buffer,
        out: memoryview,
        *,
        hash: str,  # noqa: A002 - the field's name everywhere
        dtype: str,
        raw_bytes: int,
    ) -> None:
        """Decode and check a whole chunk into `out`, which has exactly `raw_bytes`.

        Raises:
            CorruptError: the chunk is damaged, or longer or shorter than its header says; what is
                in `out` must not be used.
            ValueError: `out` has another length.
        """
        header = read_header(stored, hash=hash, dtype=dtype, raw_bytes=raw_bytes)
        if len(stored) != header.stored_bytes:
            raise CorruptError(f"chunk {hash}: {len(stored)} bytes, not {header.stored_bytes}")
        if out.nbytes != raw_bytes:
            raise ValueError(f"{out.nbytes} bytes for a chunk of {raw_bytes}")
        parts, plain = memoryview(stored), out.cast("B")
        for index, block in enumerate(header.blocks):
            start = index * BLOCK_BYTES
            self.decode_block(
                header,
                index,
                parts[block.stored_offset : block.stored_offset + block.stored_bytes],
                plain[start : start + BLOCK_BYTES],
            )


def _is_whole(dtype: str, raw_bytes: int) -> bool:
    known = dtypes.BY_NAME.get(dtype)
    return known is not None and 0 < raw_bytes <= MAX_CHUNK_BYTES and not raw_bytes % known.itemsize


def _pack_header(dtype: str, raw_bytes: int, blocks: list[Block]) -> bytes:
    fixed = _FIXED.pack(MAGIC, VERSION, dtypes.BY_NAME[dtype].code, 0, len(blocks), raw_bytes)
    rows = (_BLOCK.pack(block.codec, block.stored_bytes, block.digest) for block in blocks)
    head = fixed + b"".join(rows)
    return head + _SUM.pack(_checksum(head))


def _read_blocks(header: bytes) -> tuple[Block, ...]:
    blocks = []
    at = len(header)
    for codec, stored_bytes, digest in _BLOCK.iter_unpack(header[_FIXED.size : -_SUM.size]):
        blocks.append(Block(codec, at, stored_bytes, digest))
        at += stored_bytes
    return tuple(blocks)


def _check_blocks(header: Header) -> None:
    allowed = allowed_codecs(header.dtype)
    for index, block in enumerate(header.blocks):
        most = header.block_raw_bytes(index) - (block.codec != RAW)
        least = most if block.codec == RAW else 1
        if block.codec not in allowed or not least <= block.stored_bytes <= most:
            raise CorruptError(f"chunk {header.hash}, block {index}: bad codec or stored length")


def _checksum(header: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(header))


def _chunk_hash(dtype: str, raw_bytes: int, blocks: tuple[Block, ...] | list[Block]) -> str:
    digests = b"".join(block.digest for block in blocks)
    name = dtype.encode("ascii") + b"\0" + struct.pack("<Q", raw_bytes)
    return str(xxhash.xxh3_128_hexdigest(name + digests))
