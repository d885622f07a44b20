"""A reader of format 1 made from docs/format.md alone, and the root that it reads.

The reader uses nothing of ckptd. The last tests do: they show that ckptd still reads that root too.
``make_root_format1.py`` beside this says how it was made.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard

import ckptd
from ckptd.pipeline.catalog import survey
from ckptd.pipeline.verify import verify_all
from ckptd.store.open import open_store
from tests.golden.make_root_format1 import VALUES, arrays, make_state

ROOT = Path(__file__).parent / "root-format1"
EXPECTED = json.loads((ROOT.parent / "root-format1.json").read_text())
STEP_ID = re.compile(r"[0-9]{12}-[0-9]{4}")
DTYPES = dict(
    enumerate(
        (
            "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
            "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128",
            "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
        ),
        start=1,
    )
)  # fmt: skip
SIZES = (1, 1, 1, 2, 4, 8, 2, 4, 8, 2, 2, 4, 8, 4, 8, 16, 1, 1, 1, 1, 1)
ITEM_BYTES = dict(zip(DTYPES.values(), SIZES, strict=True))
BLOCK = 1 << 20


def record(path: Path) -> dict[str, Any]:
    """Section 3: JSON, or one zstd frame of it."""
    data = path.read_bytes()
    if data[:4] == b"\x28\xb5\x2f\xfd":
        data = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    found: dict[str, Any] = json.loads(data)
    assert found["format"] == 1
    return found


def commits() -> list[tuple[int, int]]:
    """Section 2: (attempt, step) of all checkpoints, the newest first."""
    files = [f for f in (ROOT / "checkpoints").iterdir() if STEP_ID.fullmatch(f.name)]
    return sorted((int(f.name[13:]), int(f.name[:12])) for f in files if f.stat().st_size)[::-1]


def line() -> list[str]:
    """Section 2: step ids from the newest back through ``previous``."""
    all_, ids = commits(), []
    at: tuple[int, int] | None = all_[0]
    while at is not None:
        here = [c for c in all_ if c[0] == at[0] and c <= at]
        ids += [f"{step:012d}-{attempt:04d}" for attempt, step in here]
        previous = record(ROOT / "checkpoints" / ids[-1])["previous"]
        before = (int(previous[13:]), int(previous[:12])) if previous else at
        at = next((c for c in all_ if c[0] == before[0] < at[0] and c <= before), None)
    return ids


def frame(data: bytes, size: int) -> bytes:
    """Open a zstd frame that must hold exactly `size` bytes."""
    assert zstandard.get_frame_parameters(data).content_size == size
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)


def block(codec: int, stored: bytes, size: int) -> bytes:
    """Section 4, codecs."""
    if codec < 2:
        return frame(stored, size) if codec else stored
    width, has_sign = {2: 2, 3: 4, 4: 8}[codec if codec < 5 else codec - 3], codec < 5
    count, at, shift = size // width, 0, 0
    words = np.zeros(count, f"<u{width}")
    for half in [h for h in (4, 2, 1) if 2 * h <= width]:
        if half > 1 or has_sign:
            plane = np.frombuffer(stored, f"<u{half}", count, at).astype(words.dtype)
            at += count * half
        else:
            plane = sevens(stored[at : at + -(-count // 8) * 7], count).astype(words.dtype)
            at += -(-count // 8) * 7
        words |= plane << words.dtype.type(shift)
        shift += 8 * half
    top = np.frombuffer(frame(stored[at:], count), np.uint8).astype(words.dtype)
    if not has_sign:
        return (words | top << words.dtype.type(8 * width - 9)).tobytes()
    words |= top << words.dtype.type(shift)
    one, rest = words.dtype.type(1), words.dtype.type(8 * width - 1)
    return (words >> one | words << rest).tobytes()


def sevens(packed: bytes, count: int) -> np.ndarray[Any, Any]:
    """Section 4, codecs: values of seven bits, the first in the lowest bits."""
    bits = int.from_bytes(packed, "little")
    return np.array([bits >> 7 * i & 0x7F for i in range(count)], np.uint8)


def chunk(data: bytes, name: str, dtype: str, size: int) -> bytes:
    """Section 4: all raw bytes of a chunk, each block proved by its digest, the digests by the name."""
    magic, version, code, zero, count, length = struct.unpack_from("<8sHBBIQ", data)
    assert (magic, version, zero, length) == (b"CKPTDCH1", 1, 0, size)
    assert (DTYPES[code], count) == (dtype, -(-size // BLOCK))
    head = 24 + 21 * count
    assert struct.unpack_from("<Q", data, head)[0] == xxhash.xxh3_64_intdigest(data[:head])
    rows = list(struct.iter_unpack("<BI16s", data[24:head]))
    digests = b"".join(digest for _, _, digest in rows)
    named = dtype.encode() + b"\0" + struct.pack("<Q", size) + digests
    assert xxhash.xxh3_128_hexdigest(named) == name
    raw, at = b"", head + 8
    for i, (codec, stored, digest) in enumerate(rows):
        raw += block(codec, data[at : at + stored], min(BLOCK, size - i * BLOCK))
        assert xxhash.xxh3_128_digest(raw[i * BLOCK :]) == digest
        at += stored
    assert at == len(data)
    return raw


def rank_manifests(manifest: dict[str, Any], step_id: str) -> list[dict[str, Any]]:
    """Section 6, 2: the rank manifests, each the one that the manifest names."""
    found = []
    for rank, size, name in manifest["ranks"]:
        path = ROOT / "ranks" / step_id / f"{rank:05d}"
        assert (path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes())) == (size, name)
        found.append(record(path))
        for field in ("step", "attempt", "world_size", "sequence"):
            assert found[-1][field] == manifest[field]
        assert found[-1]["rank"] == rank == len(found) - 1
    return found


def tensors(step_id: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Section 6: all tensors of a checkpoint: dtype, shape, and bytes in row-major order."""
    manifest = record(ROOT / "checkpoints" / step_id)
    rows = {row[0]: row for row in manifest["tensors"]}
    arrays = {n: np.zeros(row[2], f"V{ITEM_BYTES[row[1]]}") for n, row in rows.items()}
    came = {name: np.zeros(row[2], int) for name, row in rows.items()}
    for part in rank_manifests(manifest, step_id)[::-1]:  # so that lower ranks win
        columns = {k: np.frombuffer(b64decode(v), "<u8") for k, v in part["pieces"].items()}
        numbers = iter(columns.pop("box").tolist())
        for t, c, offset, length in np.stack([*columns.values()], 1).tolist():
            name, dtype, shape, *_ = part["tensors"][t]
            start, stop = ([next(numbers) for _ in shape] for _ in range(2))
            hash_, birth, chunk_dtype, raw_bytes, stored_bytes = part["chunks"][c]
            data = (ROOT / "chunks" / hash_[:2] / f"{hash_}-{birth}").read_bytes()
            assert (chunk_dtype, len(data)) == (dtype, stored_bytes)
            raw = chunk(data, hash_, dtype, raw_bytes)[offset : offset + length]
            box = tuple(map(slice, start, stop))
            values = np.frombuffer(raw, arrays[name].dtype)
            arrays[name][box] = values.reshape([b - a for a, b in zip(start, stop, strict=True)])
            came[name][box] += part["plan"] is not None or not came[name][box].any()
        assert next(numbers, None) is None
    assert all((count == 1).all() for count in came.values())
    return {n: (row[1], row[2], arrays[n].tobytes()) for n, row in rows.items()}


def raw_bytes_of(dtype: str, shape: list[int], runs: list[list[Any]]) -> bytes:
    """Return the bytes of expected numbers, which stand in JSON as pairs of value and count."""
    numbers = np.repeat([float(v) for v, _ in runs], [n for _, n in runs])
    assert len(numbers) == math.prod(shape)
    if dtype == "bfloat16":
        return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return numbers.astype(dtype).tobytes()


def test_the_newest_is_of_the_highest_attempt_and_the_line_goes_back_through_previous():
    assert line() == ["000000000004-0002", "000000000002-0001", "000000000001-0001"]


@pytest.mark.parametrize("short", EXPECTED)
def test_every_tensor_is_what_was_saved(short):
    step, attempt = short.split("-")
    found = tensors(f"{int(step):012d}-{attempt}")
    assert found.keys() == EXPECTED[short].keys()
    for name, (dtype, shape, runs) in EXPECTED[short].items():
        assert found[name] == (dtype, shape, raw_bytes_of(dtype, shape, runs)), name


def test_the_root_has_all_that_the_document_describes():
    first, second = (record(ROOT / "ranks" / f"00000000000{s}-0001" / "00001") for s in (1, 2))
    assert first["plan"] is None
    assert len(b64decode(first["fingerprints"])) == 8 * 13
    assert second["plan"] is not None
    assert second["fingerprints"] == ""
    assert (ROOT / "ranks/000000000001-0001/00001").read_bytes()[:4] == b"\x28\xb5\x2f\xfd"
    assert (ROOT / "checkpoints/000000000003-0001").stat().st_size == 0
    assert record(ROOT / "ranks/000000000003-0001/00001")["record"] == "outcome"
    manifest = record(ROOT / "checkpoints/000000000002-0001")
    assert manifest["aliases"] == {"model.tied": "model.narrow"}
    assert manifest["differing"] == ["mine"]
    assert manifest["metrics"] == {"loss": 0.5, "odd": None}


@pytest.mark.parametrize(
    "name",
    ["raw", "zstd", "planes16", "planes32", "planes64", "planes16u", "planes32u", "planes64u"],
)
def test_each_codec_decodes_as_the_document_says(name):
    index = "chunks-format1-unsigned.json" if name.endswith("u") else "chunks-format1.json"
    row = json.loads((ROOT.parent / index).read_text())[name]
    data = (ROOT.parent / f"chunk-format1-{name}").read_bytes()
    raw = chunk(data, row["hash"], row["dtype"], row["raw_bytes"])
    assert xxhash.xxh3_128_hexdigest(raw) == row["raw_xxh3_128"]


def test_the_worked_example_of_planes_decodes():
    plain = np.array([1.0, -2.0, 0.5, 3.0], "<f4").tobytes()
    stored = "00 00 01 00 00 00 00 00  00 00 00 80  28 b5 2f fd 20 04 21 00 00 7f 80 7e 80"
    assert block(3, bytes.fromhex(stored), 16) == plain


def test_the_worked_example_of_planes_without_a_sign_decodes():
    plain = np.array([1.0, 2.0, 0.5, 3.0], "<f4").tobytes()
    stored = "00 00 00 00 00 00 00 00  00 00 00 08 00 00 00  28 b5 2f fd 20 04 21 00 00 7f 80 7e 80"
    assert block(6, bytes.fromhex(stored), 16) == plain


def test_a_flipped_bit_is_found():
    row = json.loads((ROOT.parent / "chunks-format1.json").read_text())["planes16"]
    data = bytearray((ROOT.parent / "chunk-format1-planes16").read_bytes())
    data[60] ^= 1
    with pytest.raises(AssertionError):
        chunk(bytes(data), row["hash"], row["dtype"], row["raw_bytes"])


# --- ckptd itself ------------------------------------------------------------------------------


def test_r5_ckptd_lists_and_verifies_a_root_of_format_1():
    store = open_store(str(ROOT))
    try:
        assert [str(row.commit.id) for row in survey(store) if row.is_on_line] == line()
        reports = list(verify_all(store, is_data=True))
    finally:
        store.close()
    assert len(reports) == 3
    assert all(report.is_whole for report in reports)


@pytest.fixture
def generators():
    """Put the generators of this process back to where they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])  # noqa: NPY002
    torch.set_rng_state(kept[2])


def _resume(root: Path, step: int | None) -> tuple[Any, dict[str, Any], Any]:
    """Return what `resume` returned, the tensors of the state, and the state."""
    state = {**make_state(), "rng": ckptd.RNGState()}
    with ckptd.Checkpointer(root, daemon=False) as ckpt:
        resumed = ckpt.resume(state, step=step, strict=False)
    return resumed, arrays(state), state


@pytest.mark.parametrize("short", EXPECTED)
def test_r5_ckptd_restores_a_root_of_format_1(short, tmp_path, generators):
    root = tmp_path / "root"
    shutil.copytree(ROOT, root)
    step = int(short.split("-")[0])
    resumed, found, state = _resume(root, None if step == 4 else step)
    assert (resumed.step, f"{resumed.step}-{resumed.attempt:04d}") == (step, short)
    assert json.dumps(found) == json.dumps(EXPECTED[short])
    assert state["model"].restored_version == (1, 0)
    assert state["epoch"] == step
    assert state["mine"].value["rank"] == 0
    assert state["mine"].value["position"].tolist() == [step, 0]


def test_r5_values_of_format_1_come_back_with_their_types(tmp_path, generators):
    root = tmp_path / "root"
    shutil.copytree(ROOT, root)
    found = _resume(root, 2)[2]["values"]
    assert list(found) == list(VALUES)
    for name, value in VALUES.items():  # repr: a NaN is not equal to itself; sets have no order
        is_set = isinstance(value, (set, frozenset))
        assert found[name] == value if is_set else repr(found[name]) == repr(value)
    assert [type(value) for value in found.values()] == [type(value) for value in VALUES.values()]


def test_r5_generators_of_format_1_go_on_where_they_were(tmp_path, generators):
    root = tmp_path / "root"
    shutil.copytree(ROOT, root)
    _resume(root, None)
    found = _draw()
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    torch.manual_seed(4)
    assert found == _draw()


def _draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
