"""Zstandard frames from an untrusted source: judged by their header before anything is allocated.

A frame header is a claim. `zstandard` allocates what the header states (13 bytes can state an
exabyte) and ignores `max_output_size` where a size is stated, so the claim is held against what the
caller expects first. Only one frame with a stated size, no dictionary and a small window passes;
what comes out has exactly the stated length and nothing may follow the frame.
"""

from __future__ import annotations

import zstandard

from ckptd.codec.buffers import Buffer
from ckptd.errors import CorruptError
from ckptd.units import MIB

MAGIC = b"\x28\xb5\x2f\xfd"
MAX_WINDOW_BYTES = 8 * MIB

# A zstd block makes at most 128 KiB and takes at least 4 bytes (RFC 8878, 3.1.1.2): a frame that
# states more than this per byte cannot be whole.
_MAX_RATIO = 1 << 15


def frame_bytes(data: Buffer, *, max_bytes: int) -> int:
    """Return the length that the zstd frame at the start of `data` decompresses to.

    Raises:
        CorruptError: no zstd frame, no stated length, a length over `max_bytes`, a window over
            `MAX_WINDOW_BYTES`, or a dictionary.
    """
    if bytes(data[:4]) != MAGIC:
        raise CorruptError("not a zstd frame")
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise CorruptError(f"bad zstd frame header ({error})") from None
    if frame.content_size > min(max_bytes, len(data) * _MAX_RATIO):  # unknown is 2**64 - 1
        raise CorruptError(f"zstd frame of unknown or too large size (at most {max_bytes} bytes)")
    if frame.window_size > MAX_WINDOW_BYTES or frame.dict_id:
        raise CorruptError("zstd frame that wants a dictionary or too large a window")
    return int(frame.content_size)


def unpack_frame(
    decompressor: zstandard.ZstdDecompressor, data: Buffer, *, min_bytes: int, max_bytes: int
) -> bytes:
    """Decompress `data`, which must be exactly one frame of `min_bytes` to `max_bytes`.

    `decompressor` must belong to the calling thread.

    Raises:
        CorruptError: it is anything else.
    """
    size = frame_bytes(data, max_bytes=max_bytes)
    if size < min_bytes:
        raise CorruptError(f"zstd frame of {size} bytes where {min_bytes} belong")
    try:
        plain = decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"bad zstd frame ({error})") from None
    if len(plain) != size:
        raise CorruptError(f"zstd frame that states {size} bytes and holds {len(plain)}")
    return plain
