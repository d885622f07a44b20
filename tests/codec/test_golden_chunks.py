"""Chunks of each released format stay readable: the stored bytes are in ``tests/golden``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ckptd.codec.chunk import Decoder, Encoder, read_header, stored_bound

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = GOLDEN / "chunks-format1.json"


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
    with INDEX.open("x") as file:
        json.dump(rows, file, indent=1)


@pytest.mark.parametrize(
    ("code", "name"), [(0, "raw"), (1, "zstd"), (2, "planes16"), (3, "planes32"), (4, "planes64")]
)
def test_r5_a_chunk_of_format_1_decodes(code, name):
    row = json.loads(INDEX.read_text())[name]
    stored = (GOLDEN / f"chunk-format1-{name}").read_bytes()
    expected = {"hash": row["hash"], "dtype": row["dtype"], "raw_bytes": row["raw_bytes"]}
    out = bytearray(row["raw_bytes"])
    assert read_header(stored, **expected).blocks[0].codec == code
    Decoder().decode(stored, memoryview(out), **expected)
    assert xxhash.xxh3_128_hexdigest(bytes(out)) == row["raw_xxh3_128"]
