"""Bytes to zstd frames by entropy coding alone: for exponents, which repeat, but in no sequences."""

from __future__ import annotations

import numpy as np
import zstandard

from ckptd.codec.buffers import Bytes, as_bytes
from ckptd.codec.native import NATIVE, Native


class EntropyCoder:
    """Codes planes. Owns zstd contexts and, with the C loops, about 1 MiB: one per thread.

    `native` None is the way without C; both write frames that any zstd decoder reads.
    """

    def __init__(self, native: Native | None = NATIVE) -> None:
        # As good as no match search.
        params = zstandard.ZstdCompressionParameters.from_level(
            1, min_match=7, hash_log=6, window_log=17, write_content_size=1, write_checksum=0
        )
        self._zstd = zstandard.ZstdCompressor(compression_params=params)
        self._native = native
        scratch_bytes = native.entropy_scratch_bytes if native else 0
        self._scratch = np.empty(scratch_bytes // 8 + 1, np.uint64)

    def encode(self, plain: Bytes, out: Bytes) -> int:
        """Write `plain` as one frame to the start of `out`; 0 if the frame does not fit there.

        More of `out` than the frame may be written.
        """
        if self._native is not None:
            stored = self._native.entropy(plain, out, self._scratch)
            if stored:
                return stored
        # What the C loops leave aside: little, without shape, or without a short description.
        frame = self._zstd.compress(plain.data)
        if len(frame) > len(out):
            return 0
        out[: len(frame)] = as_bytes(frame)
        return len(frame)
