"""Chunks of each released format stay readable: the stored bytes are in ``tests/golden``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ckptd.codec.chunk import Decoder, Encoder, read_header, stored_bound
from ckptd.codec.native import NATIVE

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = GOLDEN / "chunks-format1.json"
UNSIGNED_INDEX = GOLDEN / "chunks-format1-unsigned.json"


def write_golden() -> None:
    """Make the golden files of format 1. Run by hand, once: what is there is never replaced."""
    double = np.random.default_rng(7).standard_normal(1024) * 0.02
    normal = double.astype(np.float32)
    samples = {
        "raw": ("float32", normal, "none"),
        "zstd": ("int64", np.arange(512), "auto"),
        "planes16": ("bfloat16", (normal.view(np.uint32) >> 16).astype(np.uint16), "auto"),
        "planes32": ("float32", normal, "auto"),
        "planes64": ("float64", double, "auto"),
    }
    write_samples(samples, INDEX)


def write_golden_unsigned() -> None:
    """Make those of the codecs for words without a sign, which came later."""
    double = np.random.default_rng(7).standard_normal(1027) ** 2 * 1e-6
    single = double.astype(np.float32)
    samples = {
        "planes16u": ("bfloat16", (single.view(np.uint32) >> 16).astype(np.uint16), "auto"),
        "planes32u": ("float32", single, "auto"),
        "planes64u": ("float64", double, "auto"),
    }
    write_samples(samples, UNSIGNED_INDEX)


def write_samples(samples: dict[str, tuple[str, np.ndarray, str]], index: Path) -> None:
    """Write a chunk of each, and what is known of them."""
    rows = {}
    for name, (dtype, array, mode) in samples.items():
        raw = array.tobytes()
        out = bytearray(stored_bound(len(raw)))
        encoded = Encoder().encode(memoryview(raw), dtype, memoryview(out), mode=mode)
        with (GOLDEN / f"chunk-format1-{name}").open("xb") as file:
            file.write(out[: encoded.stored_bytes])
        rows[name] = {
            "dtype": dtype, "raw_bytes": len(raw), "hash": encoded.hash,
            "raw_xxh3_128": xxhash.xxh3_128_hexdigest(raw),
        }  # fmt: skip
    with index.open("x") as file:
        json.dump(rows, file, indent=1)


CODECS = "raw zstd planes16 planes32 planes64 planes16u planes32u planes64u"


@pytest.mark.parametrize(("code", "name"), list(enumerate(CODECS.split())))
@pytest.mark.parametrize("native", [NATIVE, None], ids=["C", "numpy"])
def test_r5_a_chunk_of_format_1_decodes(code, name, native):
    row = {**json.loads(INDEX.read_text()), **json.loads(UNSIGNED_INDEX.read_text())}[name]
    stored = (GOLDEN / f"chunk-format1-{name}").read_bytes()
    expected = {"hash": row["hash"], "dtype": row["dtype"], "raw_bytes": row["raw_bytes"]}
    out = bytearray(row["raw_bytes"])
    assert read_header(stored, **expected).blocks[0].codec == code
    Decoder(native).decode(stored, memoryview(out), **expected)
    assert xxhash.xxh3_128_hexdigest(bytes(out)) == row["raw_xxh3_128"]
